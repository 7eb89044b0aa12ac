"""Calls of the emulated CUDA kernels, and dense attention in float64 with autograd, dropout included, beside them."""

import ctypes
import math
from dataclasses import dataclass

import torch

from cogview2.ops.local_attention import build
from cogview2.ops.local_attention.problem import Inputs, Library, Settings, wide_dtype, window_extent

BITS = 0xFFFFFFFF
SEED = -1234567890123
Kernel = tuple[int, int]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6, torch.float16: 2.5e-3, torch.bfloat16: 1.5e-2}


@dataclass(frozen=True)
class Case:
    """One call: a grid Y x X, its window, and what else is in the softmax."""

    grid: Kernel
    kernel: Kernel | None = (3, 3)
    causal: bool = False
    ratio: Kernel | None = None
    cross_kernel: Kernel = (3, 3)
    tokens: int = 0
    hidden: float | None = None
    """Bias of the second half of the tokens."""
    channels: int = 64
    heads: int = 1
    batch: int = 1
    dropout: float = 0.0
    scale: float | None = None
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Emulated:
    """The emulated build, and the two functions that only it has."""

    library: Library
    loaded: ctypes.CDLL

    def want(self, warps: int, ahead: bool) -> None:
        """Make the tensor-core kernels use this many warps in a block, and fetch ahead or not; 0: as they like."""
        self.loaded.local_attention_emulated_plan(ctypes.c_int32(2 * warps + ahead))

    def bank_conflicts(self) -> int:
        """Return how many matrix loads had to wait for a bank since the last question."""
        self.loaded.local_attention_emulated_bank_conflicts.restype = ctypes.c_int64
        return int(self.loaded.local_attention_emulated_bank_conflicts())


def load() -> Emulated:
    """Build the kernels for the emulator, where that is still to be done."""
    loaded = build.load("emulated")
    return Emulated(Library(loaded), loaded)


def draw(case: Case) -> tuple[Inputs, Settings]:
    """Draw the tensors of a case; query, key and value are views of one packed projection."""
    generator = torch.Generator().manual_seed(0)
    batch, rows, columns = case.batch, *case.grid

    def normal(*sizes: int, of: torch.dtype = case.dtype) -> torch.Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(of)

    tail = (case.heads, case.channels)
    query, key, value = normal(batch, rows, columns, 3, *tail).unbind(3)
    inputs = Inputs(query, key, value, *(None,) * 7)
    wide = wide_dtype(case.dtype)
    if case.kernel is None:
        inputs = inputs._replace(key=None, value=None)
    if case.ratio is not None:
        coarse = (batch, rows // case.ratio[0], columns // case.ratio[1], *tail)
        inputs = inputs._replace(
            cross_key=normal(*coarse), cross_value=normal(*coarse), cross_bias=torch.tensor(0.3, dtype=wide)
        )
    if case.tokens:
        keys, values = normal(batch, case.tokens, 2, *tail).unbind(2)
        inputs = inputs._replace(token_key=keys, token_value=values)
        if case.hidden is not None:
            bias = normal(batch, case.tokens, of=wide)
            bias[:, case.tokens // 2 :] = case.hidden
            inputs = inputs._replace(token_bias=bias)
    if case.dropout:
        inputs = inputs._replace(seed=torch.tensor([SEED]))
    scale = case.channels**-0.5 if case.scale is None else case.scale
    return inputs, Settings(case.kernel or (1, 1), case.cross_kernel, case.causal, scale, case.dropout)


def mix(x: torch.Tensor) -> torch.Tensor:
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & BITS
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & BITS
    return x ^ (x >> 16)


def dropout_factors(seed: int, probability: float, planes: int, queries: int, slots: int) -> torch.Tensor:
    """Return 0 or 1 / (1 - p), [B * H, Q, slots], as window.h draws them."""
    plane = torch.arange(planes)
    stream = mix(torch.full_like(plane, (seed + 0x9E3779B9) & BITS))
    stream = mix(stream ^ (seed >> 32 & BITS))
    stream = mix(mix(stream ^ plane) ^ 0x5BD1E995)
    of_query = mix(stream[:, None] ^ (torch.arange(queries) * 0x9E3779B1 & BITS))
    bits = mix(of_query[..., None] ^ (torch.arange(slots) * 0x85EBCA77 & BITS))
    return (bits >= int(probability * 2**32)).double() / (1 - probability)


def window_slots(grid: Kernel, keys: Kernel, kernel: Kernel, causal: bool) -> tuple[torch.Tensor, int]:
    """Return the window slot of every pair, [Q, K], -1 where unseen, and how many slots a window has."""
    top, bottom, left, right = window_extent(kernel, causal)
    y, x = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    centre_y, centre_x = y // (grid[0] // keys[0]), x // (grid[1] // keys[1])
    key_y, key_x = torch.meshgrid(torch.arange(keys[0]), torch.arange(keys[1]), indexing="ij")
    u = key_y.flatten() - centre_y.flatten()[:, None]
    v = key_x.flatten() - centre_x.flatten()[:, None]
    seen = (u >= -top) & (u <= bottom) & (v >= -left) & (v <= right)
    if causal:
        seen &= (u < 0) | ((u == 0) & (v <= 0))
    width = left + right + 1
    return torch.where(seen, (u + top) * width + v + left, -1), (top + bottom + 1) * width


def dense(inputs: Inputs, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out [B, Y, X, H, D] and lse [B, Y, X, H] in float64."""
    batch, rows, columns, heads, channels = inputs.query.shape
    grid, queries = (rows, columns), rows * columns

    def planes(x: torch.Tensor) -> torch.Tensor:
        return x.double().reshape(batch, -1, heads, channels).transpose(1, 2)

    query, scores, values, slots, slot_count = planes(inputs.query) * settings.scale, [], [], [], 0
    if inputs.token_key is not None and inputs.token_value is not None:
        score = query @ planes(inputs.token_key).mT
        bias = inputs.token_bias
        scores.append(score if bias is None else score + bias.double()[:, None, None])
        values.append(planes(inputs.token_value))
        slot_count = inputs.token_key.shape[1]
        slots.append(torch.arange(slot_count).expand(queries, slot_count))
    for key, value, kernel, causal, shift in (
        (inputs.cross_key, inputs.cross_value, settings.cross_kernel_size, False, inputs.cross_bias),
        (inputs.key, inputs.value, settings.kernel_size, settings.is_causal, None),
    ):
        if key is None or value is None:
            continue
        slot, count = window_slots(grid, (key.shape[1], key.shape[2]), kernel, causal)
        score = (query @ planes(key).mT + (0 if shift is None else shift.double())).masked_fill(
            slot < 0, -math.inf
        )
        scores.append(score)
        values.append(planes(value))
        slots.append(slot.clamp_min(0) + slot_count)
        slot_count += count
    score = torch.cat(scores, -1)
    lse = score.logsumexp(-1)
    weight = (score - lse[..., None]).exp()
    if settings.dropout:
        assert inputs.seed is not None
        factor = dropout_factors(int(inputs.seed), settings.dropout, batch * heads, queries, slot_count)
        factor = factor.view(batch, heads, queries, slot_count)
        weight = weight * factor.gather(-1, torch.cat(slots, -1).expand_as(weight))
    out = (weight @ torch.cat(values, -2)).transpose(1, 2)
    return out.unflatten(1, grid), lse.transpose(1, 2).unflatten(1, grid)


def run(library: Library, inputs: Inputs, settings: Settings) -> dict[str, torch.Tensor]:
    """Return out, lse and every gradient."""
    generator = torch.Generator().manual_seed(1)
    out, lse = library.forward(inputs, settings)
    grad_out = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    grad_lse = torch.randn(lse.shape, generator=generator, dtype=torch.float64).to(lse.dtype)
    wanted = [tensor is not None and tensor.is_floating_point() for tensor in inputs]
    grads = library.backward(inputs, settings, out, lse, grad_out, grad_lse, wanted)
    found = {f"grad {name}": g for name, g in zip(Inputs._fields, grads, strict=True) if g is not None}
    return {"out": out, "lse": lse, "grad_out": grad_out, "grad_lse": grad_lse, **found}


def expect(inputs: Inputs, settings: Settings, found: dict[str, torch.Tensor], tolerance: float) -> None:
    """Compare with dense attention: the largest error against the largest element, at least 1."""
    leaves = {
        name: tensor.double().requires_grad_()
        for name, tensor in inputs._asdict().items()
        if tensor is not None and tensor.is_floating_point()
    }
    out, lse = dense(inputs._replace(**leaves), settings)
    grads = torch.autograd.grad(
        [out, lse], list(leaves.values()), [found["grad_out"].double(), found["grad_lse"].double()]
    )
    expected = {"out": out, "lse": lse}
    expected |= {f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    assert expected.keys() == found.keys() - {"grad_out", "grad_lse"}
    for name, true in expected.items():
        error = (found[name].double() - true).abs().max().item() / max(1.0, true.abs().max().item())
        assert error <= tolerance, f"{name}: {error}"  # NaN fails too
