"""What every backend of kernels must compute, against a dense softmax in float64: dtypes, widths, windows, keys.

A test module imports these tests by name and defines the fixture `target`, the backend that they try.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from dense_attention import Call, dense, draw, gradients, masked_sdpa

from cogview2.ops.local_attention import local_attention_2d
from cogview2.ops.local_attention.flex import Layout


class Target(NamedTuple):
    """A backend under test.

    Attributes:
        device: of the tensors.
        run: computes (out, lse) of a call.
        served_by: the kernels of its forward and backward pass.
    """

    device: str
    run: Callable[[Call], tuple[torch.Tensor, torch.Tensor]]
    served_by: Callable[[Call], tuple[str, str]]


WINDOWS = {
    "9x9": Layout((17, 30), (9, 9)),
    "9x5": Layout((17, 30), (9, 5)),
    "17x9 causal": Layout((20, 37), (17, 9), is_causal=True),
    "5x5": Layout((20, 37), (5, 5)),
    "7x7": Layout((17, 30), (7, 7)),
    "1x1": Layout((17, 30), (1, 1)),
    "13x3": Layout((20, 37), (13, 3)),
    "9x9 causal": Layout((17, 30), (9, 9), is_causal=True),
    "even": Layout((17, 30), (4, 6)),
    "larger than the grid": Layout((3, 5), (9, 9)),
    "one cell": Layout((1, 1), (5, 5)),
    "whole strips": Layout((32, 64), (9, 9)),
    "release": Layout((60, 60), (9, 5)),
}
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
HALVES = (torch.bfloat16, torch.float16)
TENSOR_CORE_CHANNELS = (32, 64, 128)
# Largest error of sums of unit normal numbers, in the order out and lse, gradients.
TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.float64: (1e-12, 1e-11)}
# Two kernels, or another order of the keys: weights are rounded to half precision at other places.
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2}


def _with_keys(tokens: int, ratios: tuple[int, int] | None) -> Layout:
    rows, columns = 12, 18
    if ratios is None:
        return Layout((rows, columns), (9, 5), tokens=tokens)
    coarse = (rows // ratios[0], columns // ratios[1])
    return Layout((rows, columns), (9, 5), False, tokens, coarse, (5, 5))


JOINT = {
    f"{tokens} tokens, ratio {ratios}": _with_keys(tokens, ratios)
    for tokens, ratios in [
        (1, None),
        (16, None),
        (64, None),
        (100, None),
        (0, (1, 1)),
        (0, (2, 2)),
        (0, (3, 3)),
        (0, (2, 3)),
        (1, (3, 1)),
        (16, (3, 3)),
        (64, (2, 2)),
        (100, (2, 3)),
    ]
} | {
    "direct": Layout((60, 60), (9, 5), cross_grid=(20, 20), cross_kernel_size=(5, 5)),
    "iterative": Layout((60, 60), (9, 5), tokens=16),
    "causal with coarse": Layout((32, 32), (17, 9), True, 0, (16, 16), (7, 7)),
}


def _large_ones_slow(layouts: dict[str, Layout]) -> list[Any]:
    """Mark the cases whose dense softmax takes a CPU many seconds; on a GPU they all run."""
    return [
        pytest.param(name, marks=pytest.mark.slow) if layout.queries > 1000 else name
        for name, layout in layouts.items()
    ]


def _worst(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert not found.isnan().any()
    return float((found.detach().double() - expected.detach().double()).abs().max())


def _check_exact(target: Target, call: Call) -> None:
    """Compare fp32 or fp64, the gradients through out and lse included."""
    tolerance, gradient_tolerance = TOLERANCES[call.query.dtype]
    true = call.leaves(torch.float64)
    expected, expected_lse = dense(true)
    weights, lse_weights = torch.randn_like(expected), torch.randn_like(expected_lse)
    mine = call.leaves()
    out, lse = target.run(mine)
    assert _worst(out, expected) <= tolerance
    assert _worst(lse, expected_lse) <= tolerance
    weights, lse_weights = weights.to(out.dtype).double(), lse_weights.to(lse.dtype).double()
    wanted = gradients(true, expected, weights, expected_lse, lse_weights)
    for name, gradient in gradients(mine, out, weights, lse, lse_weights).items():
        scale = max(1.0, float(wanted[name].abs().max()))
        assert _worst(gradient, wanted[name]) <= gradient_tolerance * scale, name


def _check_half(target: Target, call: Call) -> None:
    """Compare with the error of a masked SDPA of the same dtype on the same numbers: at most twice that.

    What is rounded once to the dtype may be off by half its last digit, whatever SDPA does.
    """
    true, theirs, mine = call.leaves(torch.float64), call.leaves(), call.leaves()
    expected, expected_lse = dense(true)
    weights = torch.randn_like(expected).to(call.query.dtype).double()
    out, lse = target.run(mine)
    peer = masked_sdpa(theirs)
    last_digit = torch.finfo(call.query.dtype).eps / 2
    assert _worst(out, expected) <= 2 * _worst(peer, expected) + last_digit
    assert _worst(lse, expected_lse) <= 1e-3
    wanted = gradients(true, expected, weights)
    peers = gradients(theirs, peer, weights)
    for name, gradient in gradients(mine, out, weights).items():
        floor = last_digit * max(1.0, float(wanted[name].abs().max()))
        assert _worst(gradient, wanted[name]) <= 2 * _worst(peers[name], wanted[name]) + floor, name


def _check(target: Target, call: Call) -> None:
    fast = call.query.dtype in HALVES and call.query.shape[-1] in TENSOR_CORE_CHANNELS
    for name in target.served_by(call):
        assert name.startswith("cpu" if target.device == "cpu" else "tensor_core" if fast else "plain"), name
    if call.query.dtype in HALVES:
        _check_half(target, call)
    else:
        _check_exact(target, call)


@pytest.mark.parametrize("channels", (20, 32, 64, 128))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", _large_ones_slow(WINDOWS))
def test_windows(target: Target, window: str, dtype: str, channels: int) -> None:
    _check(target, draw(WINDOWS[window], DTYPES[dtype], target.device, channels=channels))


@pytest.mark.parametrize(
    "dtype,channels", (("fp32", 64), ("fp64", 20), ("bf16", 64), ("fp16", 32), ("bf16", 128))
)
@pytest.mark.parametrize("keys", _large_ones_slow(JOINT))
def test_tokens_and_coarse_keys_share_the_softmax(
    target: Target, keys: str, dtype: str, channels: int
) -> None:
    is_half = DTYPES[dtype] in HALVES
    call = draw(JOINT[keys], DTYPES[dtype], target.device, channels=channels, biases=not is_half)
    _check(target, call)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_biases_and_their_gradients_in_half_precision(target: Target, dtype: torch.dtype) -> None:
    call = draw(JOINT["16 tokens, ratio (3, 3)"], dtype, target.device, biases=True)
    true, mine = call.leaves(torch.float64), call.leaves()
    expected, _ = dense(true)
    out, _ = target.run(mine)
    assert _worst(out, expected) <= 2e-2
    weights = torch.randn_like(expected).to(dtype).double()
    wanted = gradients(true, expected, weights)
    for name, gradient in gradients(mine, out, weights).items():
        bound = 2e-2 * max(1.0, float(wanted[name].abs().max()))
        if gradient.dim() == 0:
            # One number for all queries: the rounding errors of their outputs add up like the square root of the count.
            bound = max(bound, 2e-3 * math.sqrt(expected[..., 0].numel()))
        assert _worst(gradient, wanted[name]) <= bound, name


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_hidden_tokens(target: Target, dtype: torch.dtype) -> None:
    call = draw(Layout((12, 18), (9, 5), tokens=40), dtype, target.device)
    found = []
    for hidden in (-math.inf, -1e30, -1e4):
        bias = torch.zeros(2, 40, device=target.device)
        bias[0, 7:] = hidden
        bias[1] = hidden  # all of them, more than one block of keys
        mine = replace(call, token_bias=bias).leaves()
        out, lse = target.run(mine)
        grads = gradients(mine, out, torch.ones_like(out))
        found.append([out, lse, *grads.values()])
        assert all(tensor.isfinite().all() for tensor in found[-1])
        assert not grads["token_value"][1].any()
    for first, other in zip(found[0] * 2, found[1] + found[2], strict=True):
        assert torch.equal(first, other)
    without = local_attention_2d(call.query[1:], call.key[1:], call.value[1:], (9, 5), backend=target.device)
    torch.testing.assert_close(found[0][0][1:], without, atol=CLOSE[dtype], rtol=0)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_layouts_in_memory(target: Target, dtype: torch.dtype) -> None:
    call = draw(JOINT["16 tokens, ratio (3, 3)"], dtype, target.device)
    expected = [*target.run(call)]
    contiguous = replace(call, **{name: tensor.contiguous() for name, tensor in call.tensors().items()})
    channels_apart = replace(call, query=call.query.mT.contiguous().mT, value=call.value.mT.contiguous().mT)
    flat = torch.empty(call.key.numel() + 1, dtype=dtype, device=target.device)[1:]
    misaligned = replace(call, key=flat.view(call.key.shape).copy_(call.key))
    for other, is_same in ((contiguous, True), (channels_apart, True), (misaligned, False)):
        for found, wanted in zip(target.run(other), expected, strict=True):
            if is_same:
                assert torch.equal(found, wanted)
            else:
                torch.testing.assert_close(found, wanted, atol=CLOSE[dtype], rtol=0)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_coarse_grid_shared_by_the_batch(target: Target, dtype: torch.dtype) -> None:
    call = draw(JOINT["direct"], dtype, target.device, batch=3)
    assert call.cross_key is not None and call.cross_value is not None
    shared = {"cross_key": call.cross_key[:1].clone(), "cross_value": call.cross_value[:1].clone()}
    repeated = replace(
        call, **{name: tensor.repeat(3, 1, 1, 1, 1) for name, tensor in shared.items()}
    ).leaves()
    wanted, _ = target.run(repeated)
    parts = {name: tensor.requires_grad_() for name, tensor in shared.items()}
    expanded = replace(call, **{name: part.expand(3, -1, -1, -1, -1) for name, part in parts.items()})
    out, _ = target.run(expanded)
    assert torch.equal(out, wanted)
    out.backward(torch.ones_like(out))
    summed = gradients(repeated, wanted, torch.ones_like(wanted))
    for name, part in parts.items():
        assert part.grad is not None
        torch.testing.assert_close(part.grad, summed[name].sum(0, keepdim=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_empty_batch(target: Target, dtype: str) -> None:
    call = draw(JOINT["16 tokens, ratio (3, 3)"], DTYPES[dtype], target.device, batch=0).leaves()
    out, lse = target.run(call)
    assert out.shape == (0, 12, 18, 2, 64) and lse.shape == (0, 12, 18, 2)
    for name, gradient in gradients(call, out, torch.ones_like(out)).items():
        assert gradient.shape == call.tensors()[name].shape


@pytest.mark.parametrize("scale", (0.0, 1.0, 30.0))
def test_extreme_scores(target: Target, scale: float) -> None:
    call = draw(Layout((12, 18), (9, 9)), torch.bfloat16, target.device)
    out, lse = local_attention_2d(
        call.query, call.key, call.value, (9, 9), scale=scale, return_lse=True, backend=target.device
    )
    loud = replace(call, query=call.query.double() * scale * math.sqrt(64)).leaves(torch.float64)
    expected, expected_lse = dense(loud)
    assert _worst(out, expected) <= 3e-2
    assert _worst(lse, expected_lse) <= 1e-3 * max(1.0, scale)


@pytest.mark.parametrize("keys", ("16 tokens, ratio (3, 3)", "0 tokens, ratio (2, 3)"))
def test_gradcheck(target: Target, keys: str) -> None:
    layout = replace(JOINT[keys], grid=(6, 6), cross_grid=(2, 2) if "3, 3" in keys else (3, 2))
    layout = replace(layout, tokens=min(layout.tokens, 3), kernel_size=(5, 3), cross_kernel_size=(3, 3))
    call = draw(layout, torch.float64, target.device, batch=1, channels=4, biases=True).leaves()
    names = list(call.tensors())

    def function(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return target.run(replace(call, **dict(zip(names, tensors, strict=True))))

    assert torch.autograd.gradcheck(function, tuple(call.tensors().values()))
