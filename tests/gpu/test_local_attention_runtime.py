"""The CUDA kernels inside PyTorch and on a device: determinism, dropout, streams, compilation, huge tensors, sanitizers."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compiled_kernels import inputs, library, served_by, settings
from dense_attention import dense, draw, gradients
from torch.utils.checkpoint import checkpoint

from cogview2.ops.local_attention import local_attention_2d
from cogview2.ops.local_attention.flex import Layout, local_attention_2d_flex

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
RUNS = 20
JOINT = Layout((36, 48), (9, 5), False, 16, (12, 16), (5, 5))
PLAIN = Layout((36, 48), (9, 9))
HUGE_BATCH = (
    60  # times 64 x 64 cells, 48 heads and 64 channels: more than 2^31 elements in the packed projection
)
HUGE_BYTES = 40 << 30
SANITIZER_SECONDS = 540


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("layout", (PLAIN, JOINT), ids=("window", "joint"))
def test_runs_are_equal_bit_by_bit(layout: Layout, dtype: torch.dtype) -> None:
    call = draw(layout, dtype, DEVICE, heads=8, biases=True).leaves()
    weights, first = torch.randn_like(call.query), None
    for _ in range(RUNS):
        out, lse = local_attention_2d(**call.keywords(), return_lse=True, backend="cuda")
        found = [out, lse, *gradients(call, out, weights).values()]
        first = first or found
        assert all(torch.equal(one, other) for one, other in zip(first, found, strict=True))


def test_a_result_does_not_depend_on_the_batch_around_it() -> None:
    call = draw(JOINT, torch.bfloat16, DEVICE, batch=5, heads=4, biases=True)
    together = local_attention_2d(**call.keywords(), backend="cuda")
    for index in range(5):
        tensors = {name: t if t.dim() == 0 else t[index : index + 1] for name, t in call.tensors().items()}
        alone = local_attention_2d(**replace(call, **tensors).keywords(), backend="cuda")
        torch.testing.assert_close(alone, together[index : index + 1], atol=8e-3, rtol=0)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
def test_deterministic_algorithms_are_not_refused() -> None:
    call = draw(JOINT, torch.bfloat16, DEVICE, biases=True).leaves()
    out = local_attention_2d(**call.keywords(), backend="cuda")
    gradients(call, out, torch.ones_like(out))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_dropout_drops_the_same_weights_as_on_the_cpu(dtype: torch.dtype) -> None:
    call = draw(JOINT, dtype, DEVICE, biases=True)
    host = replace(call, **{name: tensor.cpu() for name, tensor in call.tensors().items()})
    weights = torch.randn_like(call.query)
    found = []
    for one in (call, host):
        kernels, given, numbers = (
            library(one.query.device),
            inputs(one, seed=1234567890123),
            settings(one, 0.3),
        )
        out, lse = kernels.forward(given, numbers)
        wanted = [tensor is not None and tensor.is_floating_point() for tensor in given]
        weights = weights.to(one.query.device)
        grads = kernels.backward(given, numbers, out, lse, weights.contiguous(), None, wanted)
        found.append([out, lse, *(grad for grad in grads if grad is not None)])
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for gpu, cpu in zip(*found, strict=True):
        scale = max(1.0, float(cpu.abs().max()))
        torch.testing.assert_close(gpu.cpu().float(), cpu.float(), atol=tolerance * scale, rtol=0)


def test_dropout_of_the_operator() -> None:
    call = draw(PLAIN, torch.bfloat16, DEVICE)
    torch.manual_seed(3)
    first = local_attention_2d(**call.keywords(), dropout_p=0.5, backend="cuda")
    second = local_attention_2d(**call.keywords(), dropout_p=0.5, backend="cuda")
    torch.manual_seed(3)
    again = local_attention_2d(**call.keywords(), dropout_p=0.5, backend="cuda")
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_the_stream_of_the_caller_is_used() -> None:
    call = draw(PLAIN, torch.bfloat16, DEVICE, heads=8)
    expected = local_attention_2d(**call.keywords(), backend="cuda")
    late = torch.zeros_like(call.query)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # some 50 ms: a kernel on another stream would read zeros
        late.copy_(call.query)
        out = local_attention_2d(**replace(call, query=late).keywords(), backend="cuda")
    stream.synchronize()
    assert torch.equal(out, expected)


def test_the_device_of_the_tensors_is_used() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    call = draw(PLAIN, torch.bfloat16, "cuda:0")
    expected = local_attention_2d(**call.keywords(), backend="cuda")
    moved = replace(call, **{name: tensor.to("cuda:1") for name, tensor in call.tensors().items()})
    out = local_attention_2d(**moved.keywords(), backend="cuda")
    assert out.device.index == 1 and torch.equal(out.cpu(), expected.cpu())


@pytest.mark.parametrize("layout", (PLAIN, JOINT), ids=("window", "joint"))
def test_compiled_code_computes_the_same(layout: Layout) -> None:
    call = draw(layout, torch.bfloat16, DEVICE, biases=True).leaves()
    torch._dynamo.reset()

    def function(**keywords: torch.Tensor) -> torch.Tensor:
        return local_attention_2d(**keywords) * 2.0

    compiled = torch.compile(function, fullgraph=True)
    found = []
    for run in (function, compiled):
        out = run(**call.keywords())
        found.append([out, *gradients(call, out, torch.ones_like(out)).values()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_activation_checkpoints_and_autocast() -> None:
    call = draw(JOINT, torch.float32, DEVICE, biases=True).leaves()

    def function(query: torch.Tensor) -> torch.Tensor:
        return local_attention_2d(**replace(call, query=query).keywords())

    with torch.autocast("cuda", torch.bfloat16):
        direct = function(call.query)
        kept = checkpoint(function, call.query, use_reentrant=False)
    assert direct.dtype == torch.bfloat16 and torch.equal(direct, kept)
    expected = gradients(call, direct, torch.ones_like(direct))
    for name, gradient in gradients(call, kept, torch.ones_like(direct)).items():
        assert torch.equal(gradient, expected[name]), name
        assert gradient.dtype == call.tensors()[name].dtype


@pytest.mark.parametrize("with_bias", (False, True), ids=("no bias", "bias"))
@pytest.mark.parametrize("layout", (PLAIN, JOINT), ids=("window", "joint"))
def test_the_fallback_agrees(layout: Layout, with_bias: bool) -> None:
    call = draw(layout, torch.bfloat16, DEVICE, biases=with_bias).leaves()
    true = call.leaves(torch.float64)
    out, lse = local_attention_2d_flex(**call.keywords(), return_lse=True)
    expected, expected_lse = dense(true)
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-3, rtol=0)
    weights = torch.randn_like(expected).to(torch.bfloat16).double()
    wanted = gradients(true, expected, weights)
    for name, gradient in gradients(call, out, weights).items():
        scale = max(1.0, float(wanted[name].abs().max()))
        torch.testing.assert_close(gradient.double(), wanted[name], atol=3e-2 * scale, rtol=0)


@pytest.mark.parametrize("layout", (PLAIN, JOINT), ids=("window", "joint"))
def test_the_fastest_backend_is_taken_by_itself(layout: Layout) -> None:
    call = draw(layout, torch.bfloat16, DEVICE, biases=True)
    assert all(name.startswith("tensor_core") for name in served_by(call))
    assert torch.equal(
        local_attention_2d(**call.keywords()), local_attention_2d(**call.keywords(), backend="cuda")
    )


def test_more_than_2_to_the_31_elements() -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < HUGE_BYTES:
        pytest.skip(f"needs {HUGE_BYTES >> 30} GiB of free device memory, has {free >> 30}")
    packed = torch.randn(HUGE_BATCH, 64, 64, 3, 48, 64, device=DEVICE, dtype=torch.bfloat16)
    assert packed.numel() > 2**31
    query, key, value = (part.detach().requires_grad_() for part in packed.unbind(3))
    out = local_attention_2d(query, key, value, (9, 9), backend="cuda")
    weights = torch.randn_like(out)
    found = torch.autograd.grad(out, (query, key, value), weights)
    ends = [part[-1:].detach().clone().requires_grad_() for part in (query, key, value)]
    last = local_attention_2d(*ends, (9, 9), backend="cuda")
    torch.testing.assert_close(out[-1:], last, atol=8e-3, rtol=0)
    for whole, end in zip(found, torch.autograd.grad(last, ends, weights[-1:]), strict=True):
        torch.testing.assert_close(whole[-1:], end, atol=3e-2, rtol=0)


def _sanitizer() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    beside = [str(Path(home) / "bin") for home in homes if home]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *beside]))


@pytest.mark.parametrize("tool", ("memcheck", "racecheck", "synccheck"))
def test_a_sanitizer_finds_nothing(tool: str) -> None:
    found = _sanitizer()
    if found is None:
        pytest.skip("needs compute-sanitizer, which comes with the CUDA toolkit")
    script = Path(__file__).with_name("sanitized_run.py")
    environment = os.environ | {
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"
    }  # a cache would hide reads past the end
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    try:
        result = subprocess.run(
            [found, "--tool", tool, "--error-exitcode", "86", sys.executable, str(script)],
            capture_output=True,
            text=True,
            check=False,
            timeout=SANITIZER_SECONDS,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"compute-sanitizer {tool} was not done after {SANITIZER_SECONDS} s")
    said = result.stdout + result.stderr
    if result.returncode == 0 and "all passes ran" in said:
        return
    if result.returncode != 86 and "AssertionError" not in said:
        lines = [line for line in said.splitlines() if line.strip()]
        pytest.skip(f"compute-sanitizer {tool} refuses this device: {(lines or ['no output'])[-1][:200]}")
    pytest.fail(said[-6000:])
