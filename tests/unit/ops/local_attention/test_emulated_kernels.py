"""The CUDA kernels, run on the CPU by the emulator, against dense attention in float64 with autograd.

The emulator acts as the PTX manual says and makes mistakes visible that a GPU may hide: shared memory starts as
NaN, the target of an asynchronous copy is NaN until it is waited for, and warps run in shuffled order.
"""

import math
import mmap
import shutil
from dataclasses import replace

import emulated_kernels
import pytest
import torch
from emulated_kernels import TOLERANCE, Case, Emulated, draw, expect, run

from cogview2.ops.local_attention.problem import Inputs, KernelError

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

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


@pytest.fixture(scope="module")
def emulated() -> Emulated:
    return emulated_kernels.load()


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
