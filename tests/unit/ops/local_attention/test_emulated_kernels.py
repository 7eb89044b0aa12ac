"""The CUDA kernels, run on the CPU by the emulator, against dense attention in float64 with autograd.

The emulator acts as the PTX manual says and makes mistakes visible that a GPU may hide: shared memory starts as
NaN, the target of an asynchronous copy is NaN until it is waited for, and warps run in shuffled order.
"""

import ctypes
import math
import mmap
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from cogview2.ops.local_attention import build
from cogview2.ops.local_attention.problem import (
    Inputs,
    KernelError,
    Library,
    Settings,
    wide_dtype,
    window_extent,
)
from cogview2.ops.local_attention.toolchain import CSRC

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

BITS = 0xFFFFFFFF
SEED = -1234567890123
Kernel = tuple[int, int]


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


@pytest.fixture(scope="module")
def emulated() -> Emulated:
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


TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6, torch.float16: 2.5e-3, torch.bfloat16: 1.5e-2}

PLAIN = {
    "causal": Case((5, 7), (5, 3), causal=True, channels=8, heads=2, batch=2, dtype=torch.float64),
    "even window, all parts": Case(
        (6, 9), (4, 2), ratio=(3, 3), tokens=5, hidden=-1e4, channels=40, heads=2, dtype=torch.float64
    ),
    "window larger than the grid, dropout": Case(
        (6, 8), (9, 15), ratio=(2, 4), tokens=40, hidden=-1e30, channels=5, dropout=0.3, dtype=torch.float64
    ),
    "coarse alone": Case((4, 4), None, ratio=(1, 1), channels=5, dropout=0.1, dtype=torch.float64),
    "tokens alone": Case((4, 4), None, tokens=70, hidden=-math.inf, channels=5, dtype=torch.float64),
    "one cell, one channel": Case((1, 1), (1, 1), channels=1, dtype=torch.float64),
    "float32": Case((6, 9), (9, 5), ratio=(3, 3), tokens=5, hidden=-1e4, heads=2, dtype=torch.float32),
    "bfloat16, 256 channels": Case((6, 9), (9, 5), ratio=(3, 3), tokens=5, channels=256),
    "float16, 70 channels": Case((6, 9), (9, 5), ratio=(3, 3), channels=70, scale=-0.1, dtype=torch.float16),
    "window too large for shared memory": Case((5, 7), (25, 31), heads=3, dtype=torch.float16),
}

TENSOR_CORE = {
    "9x9": Case((16, 16), (9, 9), heads=2, batch=2),
    "released direct super-resolution": Case((24, 24), (9, 5), ratio=(3, 3), cross_kernel=(5, 5), heads=2),
    "released iterative super-resolution": Case((20, 24), (9, 5), tokens=16, hidden=-1e4, heads=2),
    "the paper's": Case((20, 20), (17, 9), causal=True, ratio=(2, 2), cross_kernel=(7, 7)),
    "32 channels": Case((20, 37), (9, 5), channels=32, heads=2, dtype=torch.float16),
    "128 channels": Case((12, 18), (9, 9), tokens=16, hidden=-1e30, channels=128),
    "128 channels, coarse, dropout": Case(
        (9, 18), (3, 5), ratio=(3, 2), channels=128, dropout=0.2, dtype=torch.float16
    ),
    "infinite bias": Case((17, 30), (9, 5), tokens=20, hidden=-math.inf, causal=True),
    "all parts, dropout": Case((12, 12), (5, 5), ratio=(1, 1), tokens=100, hidden=-1e4, heads=2, dropout=0.2),
    "odd ratios": Case((30, 30), (5, 7), ratio=(5, 6), cross_kernel=(3, 5), channels=32),
    "coarse alone": Case(
        (6, 30), None, ratio=(2, 5), cross_kernel=(3, 4), channels=32, scale=-0.2, dtype=torch.float16
    ),
    "tokens alone, most hidden": Case((3, 5), None, tokens=3, hidden=-1e30, scale=-0.2, dtype=torch.float16),
    "window larger than the grid": Case((5, 7), (11, 17), heads=3, dtype=torch.float16),
    "one cell": Case((1, 1), (9, 9)),
    "one key": Case((13, 19), (1, 1), heads=2),
    "even window, many tokens": Case((13, 19), (2, 6), tokens=128, hidden=0.0),
    "tall": Case((75, 3), (7, 5), channels=32, dropout=0.1, causal=True),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_kernels(emulated: Emulated, name: str) -> None:
    inputs, settings = draw(PLAIN[name])
    assert emulated.library.kernel(inputs, settings) == "plain"
    assert emulated.library.kernel(inputs, settings, backward=True) == "plain"
    expect(inputs, settings, run(emulated.library, inputs, settings), TOLERANCE[PLAIN[name].dtype])


@pytest.mark.parametrize("name", TENSOR_CORE)
def test_tensor_core_kernels(emulated: Emulated, name: str) -> None:
    case = TENSOR_CORE[name]
    inputs, settings = draw(case)
    for backward in (False, True):
        kernel = emulated.library.kernel(inputs, settings, backward=backward)
        assert kernel.startswith(f"tensor_core_d{case.channels}_")
    expect(inputs, settings, run(emulated.library, inputs, settings), TOLERANCE[case.dtype])


@pytest.mark.parametrize(
    "case",
    [
        Case((40, 30), (9, 5), ratio=(2, 3), cross_kernel=(5, 4), tokens=20, hidden=-1e4, heads=2),
        Case((37, 20), (1, 3), channels=32, dropout=0.1),
    ],
)
def test_every_plan_gives_the_same_bits(emulated: Emulated, case: Case) -> None:
    inputs, settings = draw(case)
    first = run(emulated.library, inputs, settings)
    try:
        for warps in (4, 8):
            for ahead in (False, True):
                emulated.want(warps, ahead)
                name = emulated.library.kernel(inputs, settings)
                assert name == f"tensor_core_d{case.channels}_{warps}x16"
                again = run(emulated.library, inputs, settings)
                for key, value in first.items():
                    assert torch.equal(value, again[key]), (warps, ahead, key)
    finally:
        emulated.want(0, False)


@pytest.mark.parametrize("name", ["9x9", "released direct super-resolution", "the paper's"])
def test_matrix_loads_meet_no_bank_conflicts(emulated: Emulated, name: str) -> None:
    inputs, settings = draw(TENSOR_CORE[name])
    emulated.bank_conflicts()
    run(emulated.library, inputs, settings)
    assert emulated.bank_conflicts() == 0


def test_unaligned_views_are_served_by_plain_kernels(emulated: Emulated) -> None:
    inputs, settings = draw(Case((8, 8), (5, 5), heads=2))
    shifted = torch.empty(inputs.query.numel() + 1, dtype=torch.bfloat16)[1:].view(inputs.query.shape)
    shifted.copy_(inputs.query)
    assert emulated.library.kernel(inputs, settings) == "tensor_core_d64_8x16"
    inputs = inputs._replace(query=shifted)
    assert emulated.library.kernel(inputs, settings) == "plain"
    expect(inputs, settings, run(emulated.library, inputs, settings), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("name", ["released direct super-resolution", "all parts, dropout"])
def test_gradients_that_nobody_wants_are_left_out(emulated: Emulated, name: str) -> None:
    inputs, settings = draw(TENSOR_CORE[name])
    everything = run(emulated.library, inputs, settings)
    given = [index for index, tensor in enumerate(inputs) if tensor is not None and index != 9]
    for index in given:
        wanted = [index == other for other in range(len(inputs))]
        out, lse = everything["out"], everything["lse"]
        grads = emulated.library.backward(
            inputs, settings, out, lse, everything["grad_out"], everything["grad_lse"], wanted
        )
        field = Inputs._fields[index]
        found = grads[index]
        assert found is not None
        assert torch.equal(found, everything[f"grad {field}"]), field


def test_a_hidden_key_weighs_nothing_whatever_it_holds(emulated: Emulated) -> None:
    inputs, settings = draw(replace(TENSOR_CORE["released iterative super-resolution"], hidden=-math.inf))
    assert inputs.token_key is not None and inputs.token_value is not None
    out, lse = emulated.library.forward(inputs, settings)
    inputs.token_key[:, 8:] = 100
    inputs.token_value[:, 8:] = -100
    again, lse_again = emulated.library.forward(inputs, settings)
    assert torch.equal(out, again) and torch.equal(lse, lse_again)


def test_empty_batch(emulated: Emulated) -> None:
    inputs, settings = draw(Case((8, 8), batch=0, ratio=(2, 2), tokens=3, hidden=0.0))
    found = run(emulated.library, inputs, settings)
    assert found["out"].shape == (0, 8, 8, 1, 64) and found["lse"].shape == (0, 8, 8, 1)
    assert found["grad token_key"].shape == (0, 3, 1, 64)
    assert found["grad cross_bias"] == 0


def test_too_many_channels(emulated: Emulated) -> None:
    inputs, settings = draw(Case((2, 2), channels=257))
    with pytest.raises(KernelError, match="1 to 256 channels per head"):
        emulated.library.forward(inputs, settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offsets_beyond_32_bits(emulated: Emulated, dtype: torch.dtype) -> None:
    case = Case((4, 8), (3, 3), batch=2, tokens=2, dtype=dtype)
    inputs, settings = draw(case)
    expected = run(emulated.library, inputs, settings)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # no reserve: only touched pages cost memory
    try:
        memory = torch.frombuffer(mmap.mmap(-1, 20 * 2**30, flags=flags), dtype=dtype)
    except OSError:
        pytest.skip("this machine reserves no address space of 20 GiB")
    assert inputs.key is not None
    key = memory.as_strided(inputs.key.shape, (2**31 + 2**20, 2**28, 2**20, 64, 1))
    key.copy_(inputs.key)
    found = run(emulated.library, inputs._replace(key=key), settings)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


PROGRAM = """
#include <cstdio>
#include <cstdlib>
#include "cuda/launch.cuh"
using namespace local_attention;
void kernel(int mistake, const char* source, float* seen) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int lane = lane_index();
  BODIES
}
int main(int, char** arguments) {
  alignas(16) char source[64] = {};
  float seen[2] = {-1, -1};
  Failure failure;
  const char* from = source;
  float* to = seen;
  launch(failure, kernel, 1, 64, 1024, nullptr, std::atoi(arguments[1]), from, to);
  std::printf("%f %f", std::abs(seen[0]), std::abs(seen[1]));
}
"""

MISTAKES = {
    "unset shared memory": ("seen[0] = shared[5];", "nan 1.0"),
    "copy not waited for": (
        "copy_async(shared_address(shared), source, true); copy_commit(); seen[0] = shared[0]; copy_wait<0>(); "
        "seen[1] = shared[0];",
        "nan 0.0",
    ),
    "wrong group waited for": (
        "copy_async(shared_address(shared), source, true); copy_commit(); "
        "copy_async(shared_address(shared + 4), source, true); copy_commit(); copy_wait<1>(); "
        "seen[0] = shared[0]; seen[1] = shared[4];",
        "0.000000 nan",
    ),
    "lanes part": (
        "if (lane < 7) warp_barrier(); else shuffle(lane, 0);",
        "lanes of one warp meet at different places: a warp barrier and a shuffle",
    ),
    "lanes leave": (
        "if (lane == 3) return; warp_barrier();",
        "threads 0 and 3 of one warp part: one waits at a warp barrier, one at its end",
    ),
    "a warp leaves": (
        "if (warp_index() == 0) return; block_barrier();",
        "warps wait at a block barrier that others never reach",
    ),
    "load beyond shared memory": (
        "uint32_t r[4]; load_matrices(r, shared_address(shared) + 1024);",
        "a matrix load at shared byte 1024 of 1024",
    ),
    "unaligned copy": (
        "copy_async(shared_address(shared) + 8, source, true);",
        "an asynchronous copy at shared byte 8 of 1024",
    ),
}


def compiled(folder: Path, source: str) -> Path:
    """Compile a program for the emulator and return where it is."""
    (folder / "program.cpp").write_text(source)
    command = ["g++", "-std=c++17", "-O0", "-DLOCAL_ATTENTION_EMULATED", f"-I{CSRC}"]
    subprocess.run([*command, str(folder / "program.cpp"), "-o", str(folder / "program")], check=True)
    return folder / "program"


def test_the_emulator_shows_mistakes(tmp_path: Path) -> None:
    bodies = [
        f"if (mistake == {number}) {{ {body} return; }}" for number, (body, _) in enumerate(MISTAKES.values())
    ]
    program = compiled(tmp_path, PROGRAM.replace("BODIES", "\n  ".join(bodies)))
    for number, (name, (_, message)) in enumerate(MISTAKES.items()):
        result = subprocess.run([program, str(number)], capture_output=True, text=True, timeout=60)
        assert message in result.stdout + result.stderr, name


def test_tiles(tmp_path: Path) -> None:
    """The arithmetic of tile.h against its definitions, in C++."""
    source = """
    #include <cstdio>
    #include <initializer_list>
    #include "tile.h"
    using namespace local_attention;
    #define EXPECT(condition) if (!(condition)) { std::printf("line %d: " #condition, __LINE__); return 1; }
    int main() {
      for (int divisor = 16; divisor < 300; ++divisor)
        for (int n = 0; n < 4000 && n * divisor < 1 << 20; ++n)
          EXPECT(tile::divide_by(n, tile::reciprocal(divisor)) == n / divisor);
      for (int extent : {4, 8, 16})
        for (int ratio = 1; ratio < 40; ++ratio) {
          int most = 0;
          for (int start = 0; start < 40 * extent; start += extent)
            most = highest(most, (start + extent - 1) / ratio - start / ratio + 1);
          EXPECT(most <= tile::coarse_extent(extent, ratio) && tile::coarse_extent(extent, ratio) <= most + 1);
        }
      for (int lane = 0; lane < 32; ++lane) {  // the two middle matrices change places
        const int source = tile::transposed_source(lane);
        EXPECT(tile::transposed_source(source) == lane);
        EXPECT(tile::loaded_partner(source) == lane % 16 && tile::loaded_half(source) == lane / 16);
      }
      const Window windows[] = {{1, 1, 1, 1, 0}, {2, 1, 3, 2, 0}, {4, 0, 2, 2, 1}, {0, 0, 0, 0, 0}};
      for (const Window& w : windows) {
        const int columns = tile::halo_extent(window_columns(w)), rows = tile::halo_extent(window_rows(w));
        const Window back = mirrored(w);
        for (int i = 0; i < 16; ++i)
          for (int n = 0; n < rows * columns; ++n) {
            const int u = n / columns - i / 4, v = n % columns - i % 4;  // from cell i to cell n, both in the halo
            EXPECT(tile::query_sees(w, i, n / columns, n % columns) == sees(w, u - w.top, v - w.left));
            EXPECT(tile::key_seen_by(w, i, n / columns, n % columns) == sees(w, back.top - u, back.left - v));
          }
        int seen = 0;
        for (int group = 0; group * 16 < rows * columns; ++group)
          for (int lane = 0; lane < 32; ++lane)
            seen += __builtin_popcount(tile::element_bits(lane, group, columns, rows * columns,
                [&](int i, int row, int column) { return tile::query_sees(w, i, row, column); }));
        int cells = 0;
        for (int u = -w.top; u <= w.bottom; ++u)
          for (int v = -w.left; v <= w.right; ++v) cells += sees(w, u, v);
        EXPECT(seen == 16 * cells);
      }
      std::printf("all good");
    }
    """
    result = subprocess.run([compiled(tmp_path, source)], capture_output=True, text=True, timeout=60)
    assert result.stdout == "all good"
