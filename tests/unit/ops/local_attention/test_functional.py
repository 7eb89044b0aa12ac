"""The public call: gradients, tracing, autocast, determinism, choice of the backend, refusals."""

import math
import multiprocessing
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_attention import Call, dense, draw, gradients
from torch.utils.checkpoint import checkpoint

from cogview2.ops.local_attention import available_backends, functional, local_attention_2d, merge_attentions
from cogview2.ops.local_attention.build import BuildError
from cogview2.ops.local_attention.flex import Layout
from cogview2.ops.local_attention.problem import is_aligned

WINDOW = Layout((9, 20), (5, 3))
CAUSAL = Layout((6, 6), (5, 3), True, 0, (3, 3), (3, 3))
JOINT = Layout((6, 9), (3, 5), False, 5, (2, 3), (3, 3))
RUNS = 20


def _small(layout: Layout, dtype: torch.dtype = torch.float64, **options: Any) -> Call:
    return draw(layout, dtype, "cpu", batch=2, heads=2, channels=4, biases=True, **options)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("layout", [WINDOW, CAUSAL, JOINT], ids=["window", "causal", "joint"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck_of_out_and_lse(layout: Layout, dropout: float) -> None:
    call = draw(layout, torch.float64, "cpu", batch=1, heads=2, channels=3, biases=True).leaves()
    call = replace(call, query=call.query[:, :6, :9].detach().requires_grad_()) if layout is WINDOW else call
    if layout is WINDOW:
        narrow = {name: getattr(call, name)[:, :6, :9].detach().requires_grad_() for name in ("key", "value")}
        call = replace(call, layout=Layout((6, 9), (5, 3)), **narrow)
    names = list(call.tensors())

    def function(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(7)
        given = replace(call, **dict(zip(names, tensors, strict=True)))
        return local_attention_2d(**given.keywords(), dropout_p=dropout, return_lse=True, backend="cpu")

    assert torch.autograd.gradcheck(function, tuple(call.tensors().values()))


@pytest.mark.parametrize("layout", [WINDOW, CAUSAL, JOINT], ids=["window", "causal", "joint"])
def test_kernels_drop_the_weights_that_the_reference_drops(layout: Layout) -> None:
    call, found = _small(layout).leaves(), []
    for backend in ("cpu", "reference"):
        torch.manual_seed(11)
        out, lse = local_attention_2d(**call.keywords(), dropout_p=0.35, return_lse=True, backend=backend)
        found.append([out, lse, *gradients(call, out, torch.ones_like(out)).values()])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-10)
    assert not torch.equal(found[0][0], local_attention_2d(**call.keywords(), dropout_p=0.35))


@pytest.mark.parametrize("layout", [WINDOW, CAUSAL, JOINT], ids=["window", "causal", "joint"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_opcheck(layout: Layout, dropout: float) -> None:
    call = _small(layout).leaves()
    seed = torch.tensor([5]) if dropout else None
    arguments = (
        *(call.query, call.key, call.value, call.cross_key, call.cross_value),
        *(call.token_key, call.token_value, call.token_bias, call.cross_bias, seed),
        *(list(layout.kernel_size or ()), list(layout.cross_kernel_size), layout.is_causal, 0.5, dropout),
    )
    results = torch.library.opcheck(torch.ops.cogview2.local_attention_2d.default, arguments)
    assert set(results.values()) == {"SUCCESS"} and len(results) == 4


@pytest.mark.parametrize("layout", [WINDOW, JOINT], ids=["window", "joint"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("threads")
def test_twenty_runs_and_any_number_of_threads_give_the_same_bits(layout: Layout, dtype: torch.dtype) -> None:
    call, first = draw(layout, dtype, "cpu", batch=2, heads=3, channels=20, biases=True).leaves(), None
    weights = torch.randn_like(call.query)
    torch.use_deterministic_algorithms(True)
    try:
        for run in range(RUNS):
            torch.set_num_threads(1 + run % 5)
            out, lse = local_attention_2d(**call.keywords(), return_lse=True, backend="cpu")
            found = [out, lse, *gradients(call, out, weights, lse, torch.ones_like(lse)).values()]
            first = first or found
            assert all(torch.equal(one, other) for one, other in zip(first, found, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("layout", [WINDOW, JOINT], ids=["window", "joint"])
def test_compiled_and_checkpointed_code_computes_the_same(layout: Layout) -> None:
    call = _small(layout, torch.float32).leaves()
    torch._dynamo.reset()

    def function(query: torch.Tensor) -> torch.Tensor:
        return local_attention_2d(**replace(call, query=query).keywords()) * 2.0

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    runs = (function, compiled, lambda query: checkpoint(function, query, use_reentrant=False))
    found = []
    for run in runs:
        out = run(call.query)
        found.append([out, *gradients(call, out, torch.ones_like(out)).values()])
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_a_checkpoint_drops_the_same_weights_when_it_computes_again() -> None:
    call = _small(JOINT, torch.float32).leaves()

    def function(query: torch.Tensor) -> torch.Tensor:
        return local_attention_2d(**replace(call, query=query).keywords(), dropout_p=0.5)

    grads = []
    for run in (function, lambda query: checkpoint(function, query, use_reentrant=False)):
        torch.manual_seed(2)
        out = run(call.query)
        grads.append(gradients(call, out, torch.ones_like(out))["query"])
    assert torch.equal(*grads)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast(backend: Any) -> None:
    call = _small(JOINT, torch.float32).leaves()
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = local_attention_2d(**call.keywords(), return_lse=True, backend=backend)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    cast = {name: t.bfloat16() for name, t in call.tensors().items() if not name.endswith("bias")}
    wanted = local_attention_2d(**replace(call, **cast).keywords(), backend=backend)
    torch.testing.assert_close(out, wanted)
    out.sum().backward()
    assert call.query.grad is not None and call.query.grad.dtype == torch.float32


def test_autocast_of_the_bare_operator_keeps_wide_biases() -> None:
    call = _small(JOINT, torch.float32)
    bias = torch.full_like(call.token_bias, -1e30) if call.token_bias is not None else None
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = torch.ops.cogview2.local_attention_2d(
            *(
                call.query,
                call.key,
                call.value,
                None,
                None,
                call.token_key,
                call.token_value,
                bias,
                None,
                None,
            ),
            *([3, 5], [1, 1], False, 0.5, 0.0),
        )
    wanted = local_attention_2d(
        call.query.bfloat16(), call.key.bfloat16(), call.value.bfloat16(), (3, 5), scale=0.5
    )
    assert lse.dtype == torch.float32 and torch.equal(out, wanted)


def test_only_the_wanted_gradients_are_computed() -> None:
    call = _small(JOINT)
    call.query.requires_grad_()
    assert call.token_bias is not None
    call.token_bias.requires_grad_()
    local_attention_2d(**call.keywords()).sum().backward()
    everything = _small(JOINT).leaves()
    out = local_attention_2d(**everything.keywords())
    wanted = gradients(everything, out, torch.ones_like(out))
    assert torch.equal(call.query.grad, wanted["query"])
    assert torch.equal(call.token_bias.grad, wanted["token_bias"])


def test_the_gradient_of_lse_alone() -> None:
    call = _small(JOINT).leaves()
    found, wanted = (
        torch.autograd.grad(run, list(call.tensors().values()), allow_unused=True)
        for run in (
            local_attention_2d(**call.keywords(), return_lse=True)[1].sin().sum(),
            dense(call)[1].sin().sum(),
        )
    )
    for name, mine, theirs in zip(call.tensors(), found, wanted, strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(mine) if theirs is None else theirs, msg=name)


def test_parts_merge_into_the_whole() -> None:
    call = _small(Layout((6, 9), (3, 5), False, 5)).leaves()
    assert call.token_key is not None and call.token_value is not None and call.token_bias is not None
    whole, whole_lse = local_attention_2d(**call.keywords(), return_lse=True)
    window, window_lse = local_attention_2d(call.query, call.key, call.value, (3, 5), return_lse=True)
    scores = torch.einsum("byxhd,bthd->byxht", call.query, call.token_key) / 2
    scores = scores + call.token_bias[:, None, None, None]
    tokens = torch.einsum("byxht,bthd->byxhd", scores.softmax(-1), call.token_value)
    out, lse = merge_attentions([window, tokens], [window_lse, scores.logsumexp(-1)])
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(lse, whole_lse)
    one = gradients(call, out, torch.ones_like(out))
    for name, other in gradients(call, whole, torch.ones_like(whole)).items():
        torch.testing.assert_close(one[name], other)
    empty, _ = merge_attentions([window, tokens], [window_lse, torch.full_like(window_lse, -math.inf)])
    torch.testing.assert_close(empty, window)
    with pytest.raises(ValueError, match="1 and 2"):
        merge_attentions([window], [window_lse, window_lse])


def test_a_coarser_key_grid_alone_and_fewer_key_batches() -> None:
    torch.manual_seed(0)
    query = torch.randn(4, 6, 9, 2, 8)
    key, value = torch.randn(2, 2, 3, 3, 2, 8).unbind()
    found = [
        local_attention_2d(query, key, value, (3, 3), return_lse=True, backend=backend)
        for backend in ("cpu", "reference")
    ]
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)
    # Query batches 0 and 1 meet key batch 0.
    alone = local_attention_2d(query[1:2], key[:1], value[:1], (3, 3))
    torch.testing.assert_close(found[0][0][1:2], alone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"query": torch.zeros(2, 6, 9, 8)},
            r"query must be .*\[B, Y, X, H, D\], got torch.float32 \[2, 6, 9, 8\]",
        ),
        ({"query": torch.zeros(2, 0, 9, 2, 4)}, "at least 1"),
        ({"query": torch.zeros(2, 6, 9, 2, 4).long()}, "floating-point"),
        ({"key": torch.zeros(2, 6, 9, 3, 4)}, "key needs the shape"),
        ({"value": torch.zeros(2, 6, 8, 2, 4)}, "key and value must have one shape"),
        ({"value": torch.zeros(2, 6, 9, 2, 4).half()}, "value must have the dtype torch.float32"),
        ({"kernel_size": (0, 3)}, "kernel_size must be two whole numbers"),
        ({"kernel_size": 9}, "kernel_size must be two whole numbers"),
        ({"kernel_size": (3.0, 3.0)}, "kernel_size must be two whole numbers"),
        ({"key": None, "value": None}, "key and value must be given"),
        ({"cross_key": None, "cross_value": None}, "belong together"),
        ({"cross_bias": torch.zeros(2)}, r"cross_bias must be one number, got a tensor of \[2\]"),
        ({"cross_bias": torch.ones((), dtype=torch.bool)}, "cross_bias .* floating point"),
        ({"additional_bias": torch.ones(2, 5).bool()}, "additional_bias .* -inf where a key is hidden"),
        ({"kernel_size": (4, 3), "is_causal": True}, "causal kernel_size needs odd sizes"),
        ({"cross_kernel_size": None}, "belong together"),
        ({"cross_value": None}, "cross_key and cross_value belong together"),
        (
            {"cross_key": torch.zeros(2, 4, 3, 2, 4), "cross_value": torch.zeros(2, 4, 3, 2, 4)},
            "rows must be a multiple",
        ),
        ({"additional_values": None}, "additional_keys and additional_values belong together"),
        ({"additional_bias": torch.zeros(2, 4)}, r"additional_bias needs the shape \[2, 5\]"),
        ({"additional_keys": None, "additional_values": None}, "additional_bias needs additional_keys"),
        ({"dropout_p": 1.0}, "dropout_p"),
        ({"backend": "triton"}, "backend must be one of reference, cpu, cuda, flex, got 'triton'"),
        ({"backend": "cuda"}, "serves cuda tensors"),
        ({"backend": "flex", "dropout_p": 0.5}, "no dropout"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    keywords = _small(JOINT, torch.float32).keywords() | change
    with pytest.raises(ValueError, match=message):
        local_attention_2d(**keywords)


def test_a_fallback_is_said_once_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    functional._warn.cache_clear()
    monkeypatch.setattr(functional, "_lack", lambda name: f"no compiler for {name}")
    call = _small(WINDOW, torch.float32)
    with pytest.warns(RuntimeWarning, match="slow reference: no compiler for cpu"):
        out = local_attention_2d(**call.keywords())
    torch.testing.assert_close(out, dense(call)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        local_attention_2d(**call.keywords())
    with pytest.raises(BuildError, match="no compiler for cpu"):
        local_attention_2d(**call.keywords(), backend="cpu")
    functional._warn.cache_clear()


def test_a_fallback_can_be_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    functional._warn.cache_clear()
    monkeypatch.setattr(functional, "_loading_failure", lambda name: "no compiler")
    call = _small(WINDOW, torch.float32)
    torch._dynamo.reset()
    with pytest.warns(RuntimeWarning, match="no compiler"):
        out = torch.compile(local_attention_2d, fullgraph=True, backend="aot_eager")(**call.keywords())
    torch.testing.assert_close(out, dense(call)[0])
    functional._warn.cache_clear()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_window_beyond_the_grid_costs_no_more_than_the_grid(backend: Any) -> None:
    call = _small(JOINT, torch.float32).leaves()
    found = []
    for sizes in ((11, 17), (2**40 + 1, 2**40 + 1)):
        keywords = call.keywords() | {"kernel_size": sizes, "cross_kernel_size": sizes}
        torch.manual_seed(3)
        out = local_attention_2d(**keywords, dropout_p=0.2, backend=backend)
        found.append([out, *gradients(call, out, torch.ones_like(out)).values()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    even = [
        local_attention_2d(call.query, call.key, call.value, (n, n), backend=backend) for n in (18, 2**40)
    ]
    torch.testing.assert_close(*even)


def test_forward_mode_derivatives_are_refused_instead_of_zero() -> None:
    call = _small(JOINT)

    def function(backend: Any) -> Any:
        return lambda key: local_attention_2d(**replace(call, key=key).keywords(), backend=backend)

    with pytest.raises(NotImplementedError, match="'reference'"):
        torch.func.jvp(function("cpu"), (call.key,), (call.key,))
    assert torch.func.jvp(function("reference"), (call.key,), (call.key,))[1].abs().max() > 0


@pytest.mark.parametrize("bits", [-1, 0x7FC00001, 0x7FC12345, -0x3FFFFF])
def test_a_nan_with_payload_stays_one(bits: int) -> None:
    query, key, value = torch.randn(3, 1, 4, 4, 1, 8).unbind()
    key[0, 1, 1, 0, 3] = torch.tensor([bits], dtype=torch.int32).view(torch.float32)[0]
    out = local_attention_2d(query, key, value, (3, 3), backend="cpu")
    assert out.isnan().all(-1).sum() == 9 and out.isnan().any(-1).sum() == 9


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_an_empty_batch(backend: Any) -> None:
    call = draw(JOINT, torch.float32, "cpu", batch=0)
    assert local_attention_2d(**call.keywords(), backend=backend).shape == (0, 6, 9, 2, 64)


def test_parts_without_keys_merge_to_nothing() -> None:
    out, lse = merge_attentions([torch.full((2, 3), math.nan)], [torch.full((2,), -math.inf)])
    assert not out.any() and (lse == -math.inf).all()


def test_backends_say_what_they_lack() -> None:
    found = available_backends()
    assert list(found) == ["reference", "cpu", "cuda", "flex"]
    assert found["reference"] is None and found["cpu"] is None
    if not torch.cuda.is_available():
        assert found["cuda"] == found["flex"] == "no CUDA device is visible"


def _in_child(queue: Any) -> None:
    torch.set_num_threads(1)
    call = draw(WINDOW, torch.float32, "cpu")
    queue.put(float(local_attention_2d(**call.keywords()).sum()))


def test_a_forked_worker_with_one_thread_can_use_it() -> None:
    call = draw(WINDOW, torch.float32, "cpu")
    expected = float(local_attention_2d(**call.keywords()).sum())
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue,))
    child.start()
    try:
        assert queue.get(timeout=60) == expected
    finally:
        child.join(60)
        child.kill()


def test_alignment_is_that_of_every_cell() -> None:
    packed = torch.zeros(2, 4, 4, 3, 2, 8, dtype=torch.bfloat16)
    assert all(is_aligned(part) for part in packed.unbind(3))
    assert not is_aligned(packed.flatten()[1:-7].view(-1, 8))
    assert not is_aligned(torch.zeros(2, 3, 12, dtype=torch.bfloat16)[..., :8])
    # A step that is never taken does not matter.
    assert is_aligned(torch.zeros(8, dtype=torch.bfloat16).as_strided((1, 8), (3, 1)))
    assert not is_aligned(torch.zeros(16, dtype=torch.bfloat16).as_strided((2, 8), (3, 1)))


def test_importing_it_needs_neither_deepspeed_nor_a_build() -> None:
    code = "import sys, cogview2.ops.local_attention as m; assert 'deepspeed' not in sys.modules; print(m.__name__)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=Path("/"), capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "cogview2.ops.local_attention"
