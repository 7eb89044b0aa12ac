"""Every competitor of the benchmarks does the work that it is timed for."""

import math
import shutil

import pytest
import torch
from cases import HEADLINE, TINY_CASES, Case, least_bytes, make_inputs, useful_flops
from cases import visible_pairs as count_visible_pairs
from peers import CPU_PEERS, GPU_PEERS, NotForThisCaseError, Peer, ours_plain, separate_and_merged

from cogview2.ops.local_attention.flex import Layout, dense_mask
from cogview2.ops.local_attention.reference import window_offsets

CPU = torch.device("cpu")
TINY = pytest.mark.parametrize("case", TINY_CASES, ids=lambda case: case.name)


def _keys_of(case: Case, row: int, column: int) -> list[int]:
    """Keys that a query sees, counted by hand: [tokens; coarse; local]."""
    layout = case.layout
    assert layout.kernel_size is not None
    keys = list(range(layout.tokens))
    if layout.cross_keys:
        ratios = (layout.grid[0] // layout.cross_grid[0], layout.grid[1] // layout.cross_grid[1])
        for u, v in window_offsets(layout.cross_kernel_size):
            r, c = row // ratios[0] + u, column // ratios[1] + v
            if 0 <= r < layout.cross_grid[0] and 0 <= c < layout.cross_grid[1]:
                keys.append(layout.tokens + r * layout.cross_grid[1] + c)
    for u, v in window_offsets(layout.kernel_size, layout.is_causal):
        r, c = row + u, column + v
        if 0 <= r < layout.grid[0] and 0 <= c < layout.grid[1]:
            keys.append(layout.tokens + layout.cross_keys + r * layout.grid[1] + c)
    return keys


def _expected(case: Case, is_exact: bool) -> torch.Tensor:
    """Attention of every query to the keys counted by hand, or to all, in float64."""
    inputs = make_inputs(case, 2, torch.float32, CPU)
    keys, values = (
        torch.cat([part.flatten(1, -3) for part in parts if part is not None], dim=1).double()
        for parts in (
            (inputs.additional_keys, inputs.cross_key, inputs.key),
            (inputs.additional_values, inputs.cross_value, inputs.value),
        )
    )
    out = torch.empty(inputs.query.shape, dtype=torch.float64)
    for row in range(case.layout.grid[0]):
        for column in range(case.layout.grid[1]):
            seen = _keys_of(case, row, column) if is_exact else slice(None)
            query = inputs.query[:, row, column].double() / math.sqrt(case.channels)
            weights = torch.einsum("bhd,bkhd->bhk", query, keys[:, seen]).softmax(-1)
            out[:, row, column] = torch.einsum("bhk,bkhd->bhd", weights, values[:, seen])
    return out


# FlexAttention compiles for half a minute; tests/unit/ops/local_attention/test_flex.py tries it uncompiled.
PEERS = [
    pytest.param(peer, id=peer.name, marks=[pytest.mark.slow] if peer.name == "FlexAttention" else [])
    for peer in CPU_PEERS
]


@TINY
@pytest.mark.parametrize("peer", PEERS)
def test_a_peer_computes_what_it_says(case: Case, peer: Peer) -> None:
    inputs = make_inputs(case, 2, torch.float32, CPU).leaf_copy(peer.backward)
    out = peer.prepare(case, inputs)()
    torch.testing.assert_close(out.double(), _expected(case, peer.exact), atol=2e-6, rtol=0)
    if peer.backward:
        out.sum().backward()
        assert all(leaf.grad is not None for leaf in inputs.leaves)


def test_parts_that_are_merged_are_one_softmax() -> None:
    case = TINY_CASES[1]
    inputs = make_inputs(case, 2, torch.float32, CPU).leaf_copy(True)
    out = separate_and_merged("cpu")(case, inputs)()
    torch.testing.assert_close(out.double(), _expected(case, True), atol=2e-6, rtol=0)
    out.sum().backward()
    assert all(leaf.grad is not None for leaf in inputs.leaves)


@pytest.mark.parametrize("case", (TINY_CASES[0], TINY_CASES[2]), ids=lambda case: case.name)
def test_the_unfused_peers_of_the_gpu_compute_the_same(case: Case) -> None:
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    unfused = [peer for peer in GPU_PEERS if peer.name.startswith("unfused")]
    assert len(unfused) == 2
    for peer in unfused:
        out = peer.prepare(case, make_inputs(case, 2, torch.float32, CPU))()
        torch.testing.assert_close(out.double(), _expected(case, True), atol=2e-6, rtol=0)


def test_a_peer_that_cannot_express_a_case_says_so() -> None:
    natten = next(peer for peer in GPU_PEERS if peer.name == "NATTEN")
    causal = TINY_CASES[2]
    with pytest.raises(NotForThisCaseError, match="raster-causal"):
        natten.prepare(causal, make_inputs(causal, 1, torch.float32, CPU))
    tiles = next(peer for peer in GPU_PEERS if peer.name == "FlexAttention 8x8 tiles")
    with pytest.raises(NotForThisCaseError, match="8x8 tiles"):
        tiles.prepare(causal, make_inputs(causal, 1, torch.float32, CPU))


SMALL = (
    Case("long window", Layout((20, 24), (17, 9), True, 5, cross_grid=(10, 8), cross_kernel_size=(7, 7))),
    Case("larger than the grid", Layout((3, 4), (9, 9))),
)


@pytest.mark.parametrize("case", (*TINY_CASES, *SMALL, HEADLINE), ids=lambda case: case.title)
def test_visible_pairs_are_those_of_the_mask(case: Case) -> None:
    assert count_visible_pairs(case) == int(dense_mask(case.layout).sum())


def test_work_and_traffic_of_the_known_shape() -> None:
    wide = Case("wide", HEADLINE.layout, heads=48)
    tensor = 8 * 64 * 64 * 48 * 64 * 2
    numbers = 8 * 64 * 64 * 48 * 4
    assert useful_flops(wide, 8, "forward") == 4 * 64 * 48 * 8 * (64 * 9 - 20) ** 2
    assert useful_flops(wide, 8, "both") == 3.5 * useful_flops(wide, 8, "forward")
    assert least_bytes(wide, 8, torch.bfloat16, "forward") == 4 * tensor + numbers
    assert least_bytes(wide, 8, torch.bfloat16, "backward") == 12 * tensor + 4 * numbers


def test_inputs_are_views_of_one_projection() -> None:
    inputs = make_inputs(TINY_CASES[1], 2, torch.float32, CPU)
    assert inputs.key.data_ptr() - inputs.query.data_ptr() == 2 * 8 * 4
    assert not inputs.query.is_contiguous()
    copy = inputs.leaf_copy(True)
    assert copy.query.stride() == inputs.query.stride() and copy.query.is_leaf
    assert len(copy.leaves) == 7
    moved = inputs.misaligned()
    assert moved.query.data_ptr() % 16 == 4 and torch.equal(moved.query, inputs.query)


@TINY
def test_the_plain_kernel_is_called_without_the_operator_around_it(case: Case) -> None:
    out = ours_plain(case, make_inputs(case, 2, torch.float32, CPU))()
    torch.testing.assert_close(out.double(), _expected(case, True), atol=1e-5, rtol=1e-5)
