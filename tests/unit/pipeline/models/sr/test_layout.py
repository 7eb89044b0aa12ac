"""Layouts, masks, new positions and LoPAR passes."""

import pytest
import torch

from cogview2.pipeline.config.model import CogLMConfig, DirectSRConfig, IterativeSRConfig
from cogview2.pipeline.models.sr.layout import (
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
