"""Layouts, masks, new positions and LoPAR passes."""

import itertools

import pytest
import torch

from cogview2.pipeline.config.model import CogLMConfig, DirectSRConfig, IterativeSRConfig
from cogview2.pipeline.config.sampling import IterativeSRSamplingConfig
from cogview2.pipeline.models.sr.layout import (
    RELEASED_PATTERN,
    diagonal_pattern,
    direct_inputs,
    iterative_inputs,
    level0_mask,
    lopar_masks,
    new_position_rows,
)

COGLM = CogLMConfig(layers=1, hidden=8, heads=2, max_positions=64, text_length=8, image_position=16)
CPU = torch.device("cpu")


def _picture(mask: torch.Tensor) -> list[str]:
    return ["".join(".#"[seen] for seen in row) for row in mask.int().tolist()]


def test_released_passes() -> None:
    passes = lopar_masks(60)
    assert [int(mask.sum()) for mask in passes] == [2300, 1900, 1500, 1000, 600, 200]
    assert all((later <= earlier).all() for earlier, later in zip(passes, passes[1:], strict=False))


@pytest.mark.parametrize("grid", [1, 4, 16])
def test_other_grids_crop_the_tiled_pattern(grid: int) -> None:
    for mask, whole in zip(lopar_masks(grid), lopar_masks(60), strict=True):
        assert torch.equal(mask, whole[:grid, :grid])


def test_new_positions_tiled_start_at_the_start_token_nearest_at_the_first_code() -> None:
    tiled = new_position_rows(20, 3, 512, "tiled").view(60, 60)
    assert tiled[0, 0] == 512 and tiled[25, 41] == 512 + 20 * 5 + 1 and tiled.max() == 911
    nearest = new_position_rows(20, 3, 512, "nearest").view(60, 60)
    assert nearest[0, 2] == 513 and nearest[59, 59] == 912 and nearest[4, 7] == 513 + 20 * 1 + 2


def test_level0_picture() -> None:
    real = torch.tensor([[False, True, True], [True, True, True]])
    mask = level0_mask(real, 2)
    assert _picture(mask[0, 0]) == ["###..", ".##..", ".##..", ".####", ".####"]
    assert _picture(mask[1, 0]) == ["###..", "###..", "###..", "#####", "#####"]


def test_direct_inputs_pad_left_and_cut_long_text() -> None:
    config = DirectSRConfig(text_length=4)
    tokens, positions, mask = direct_inputs(
        [[30, 31], [30, 31, 32, 33, 34]],
        torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]),
        config=config,
        coglm=COGLM,
        ratio=2,
        base_grid=2,
        start_of_image=99,
    )
    assert tokens[0].tolist() == [0, 0, 30, 31, 1, 2, 3, 4] + [99] * 16
    assert positions[0].tolist() == [0, 0, 0, 1, 17, 18, 19, 20, *range(64, 80)]
    assert tokens[1, :4].tolist() == [0, 30, 31, 32]
    assert mask[:, 0, -1, :4].tolist() == [[False, False, True, True], [False, True, True, True]]


def test_iterative_inputs_keep_the_first_ids() -> None:
    tokens, positions, real = iterative_inputs(
        [[], [30, 31, 32]],
        torch.tensor([[9, 8, 7, 6], [5, 4, 3, 2]]),
        config=IterativeSRConfig(text_length=2),
        coglm=COGLM,
        grid=2,
    )
    assert tokens.tolist() == [[0, 0, 9, 8, 7, 6], [30, 31, 5, 4, 3, 2]]
    assert positions.tolist() == [[0, 0, 64, 65, 66, 67], [0, 1, 64, 65, 66, 67]]
    assert real.tolist() == [[False, False], [True, True]]


def test_inputs_of_a_wrong_shape_are_refused() -> None:
    codes = torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"\(1, 4\)"):
        iterative_inputs([[1]], codes, config=IterativeSRConfig(), coglm=COGLM, grid=2)
    with pytest.raises(ValueError, match=r"\(2, 4\)"):
        direct_inputs(
            [[1], [2]], codes, config=DirectSRConfig(), coglm=COGLM, ratio=2, base_grid=2, start_of_image=9
        )


SCHEDULES = [
    (6, 0.75, 6),
    (6, 0.64, 6),
    (6, 0.99, 11),
    (9, 0.75, 6),
    (4, 0.5, 3),
    (3, 0.5, 5),
    (2, 0.1, 4),
    (1, 0.5, 1),
]


@pytest.mark.parametrize(("window", "ratio", "rounds"), SCHEDULES)
def test_diagonal_schedule(window: int, ratio: float, rounds: int) -> None:
    """Shares, rounds and order against what the words say, counted cell by cell."""
    values = diagonal_pattern(window, ratio, rounds).tolist()
    cells = {(r, c): values[r][c] for r in range(window) for c in range(window)}
    drawn = {cell: value for cell, value in cells.items() if value > 0}
    share = max(rounds, min(range(window**2 + 1), key=lambda n: abs(n / window**2 - ratio)))
    assert len(drawn) == share and min(cells.values()) >= 0
    assert set(drawn.values()) == set(range(1, rounds + 1))  # no round is empty
    for (a, first), (b, second) in itertools.product(drawn.items(), repeat=2):
        if sum(a) < sum(b):
            assert first <= second  # diagonal after diagonal
    diagonals = sorted({sum(cell) for cell in drawn})
    if rounds > len(diagonals):
        sizes = [list(drawn.values()).count(step) for step in range(1, rounds + 1)]
        assert max(sizes) - min(sizes) <= 1
        return
    counts = [sum(sum(cell) == diagonal for cell in drawn) for diagonal in diagonals]
    costs = []
    for cuts in itertools.combinations(range(1, len(counts)), rounds - 1):
        edges = [0, *cuts, len(counts)]
        costs.append(sum(sum(counts[a:b]) ** 2 for a, b in itertools.pairwise(edges)))
    assert sum(list(drawn.values()).count(step) ** 2 for step in range(1, rounds + 1)) == min(costs)
    assert all(len({drawn[cell] for cell in drawn if sum(cell) == diagonal}) == 1 for diagonal in diagonals)


def test_all_diagonals_of_the_paper() -> None:
    """Nearly everything masked and 2 * window - 1 rounds: one for each diagonal."""
    assert diagonal_pattern(6, 0.99, 11).tolist() == [[r + c + 1 for c in range(6)] for r in range(6)]


@pytest.mark.parametrize(("window", "ratio"), [(6, 0.75), (8, 0.5), (10, 0.9)])
def test_kept_cells_are_spread(window: int, ratio: float) -> None:
    """Every quarter of the tile keeps about its share."""
    kept = torch.from_numpy(diagonal_pattern(window, ratio, 4)) == 0
    half = window // 2
    for quarter in (kept[:half, :half], kept[:half, half:], kept[half:, :half], kept[half:, half:]):
        assert abs(float(quarter.float().mean()) - (1 - ratio)) <= 2 / quarter.numel() + 1e-6


@pytest.mark.parametrize("grid", [3, 6, 16, 60])
def test_diagonal_masks(grid: int) -> None:
    config = IterativeSRSamplingConfig(schedule="diagonal", window=6, mask_ratio=0.75, rounds=4, top_k=(9,))
    masks = lopar_masks(grid, config)
    assert len(masks) == config.passes == 4 and config.top_k_of_passes == (9,) * 4
    finals = [
        int(mask.sum()) - int(later.sum()) for mask, later in itertools.pairwise([*masks, masks[0] & False])
    ]
    assert min(finals) > 0
    assert all((later <= earlier).all() for earlier, later in itertools.pairwise(masks))
    if grid % 6 == 0:
        assert int(masks[0].sum()) == 27 * (grid // 6) ** 2


def test_the_released_schedule_is_the_default() -> None:
    config = IterativeSRSamplingConfig(window=3, mask_ratio=0.1, rounds=2)
    for ours, named in zip(lopar_masks(12), lopar_masks(12, config), strict=True):
        assert torch.equal(ours, named)
    for row, column in itertools.product(range(12), repeat=2):
        value = RELEASED_PATTERN[row % 6][column % 6]
        assert [bool(mask[row, column]) for mask in lopar_masks(12)] == [value >= m for m in range(1, 7)]


def test_schedules_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="5 rounds need as many cells, but a window of 2 has 4"):
        IterativeSRSamplingConfig(schedule="diagonal", window=2, rounds=5, top_k=(1,))
    with pytest.raises(ValueError, match="schedule diagonal has 3 rounds"):
        IterativeSRSamplingConfig(schedule="diagonal", rounds=3)
    config = IterativeSRSamplingConfig(schedule="diagonal", rounds=6)
    with pytest.raises(ValueError, match="tile of side 2 has 4"):
        lopar_masks(2, config)
