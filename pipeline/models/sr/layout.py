"""Geometry of super-resolution: sequence layouts, windows, new positions, LoPAR passes (spec 4, 5).

Dims: B batch, S sequence, L text slots (in masks: all level-0 slots), M base cells.
Direct SR:    [text, left-padded | base codes | high-resolution cells]; level 1 is the last part, 0 the rest.
Iterative SR: [text, left-padded | high-resolution cells].
New positions start at max_positions of CogLM. A masked cell carries <start_of_image>.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from cogview2.pipeline.config.model import CogLMConfig, DirectSRConfig, IterativeSRConfig

Row = tuple[np.ndarray, np.ndarray, np.ndarray]
"""tokens int64 [S], position ids int64 [S], real text bool [L]."""

TEXT_PAD = 0
"""Id in the unused text slots, as published: an image code, at position 0, masked wherever it matters."""

RELEASED_PATTERN = (
    (-1, 0, 1, 2, 3, 4),
    (0, -1, 2, -1, -2, 5),
    (1, -2, 3, 4, 5, 6),
    (2, 3, 4, 5, -1, 1),
    (3, -1, -2, 0, -1, 2),
    (4, 5, 6, 1, 3, -2),
)
"""LoPAR pattern: a cell of value m >= 1 becomes final in pass m; the others keep their direct SR code."""
PASSES = 6


def lopar_masks(grid: int) -> list[torch.Tensor]:
    """Return which cells each of the 6 passes draws, bool [grid, grid]: the pattern tiled and cropped."""
    tile = torch.tensor(RELEASED_PATTERN)
    repeats = -(-grid // len(RELEASED_PATTERN))
    values = tile.repeat(repeats, repeats)[:grid, :grid]
    return [values >= step for step in range(1, PASSES + 1)]


def new_position_rows(
    base_grid: int, ratio: int, image_position: int, init: Literal["tiled", "nearest"]
) -> torch.Tensor:
    """Return which CogLM position row every high-resolution cell starts from (spec 4.2).

    Args:
        base_grid: side of the base grid.
        ratio: high-resolution side / base side.
        image_position: position id of <start_of_image>.
        init: `tiled` repeats the base grid from the row of <start_of_image> on (published; one off);
            `nearest` takes the base cell under each fine cell.

    Returns:
        int64 [(base_grid * ratio)^2] in raster order.
    """
    side = torch.arange(base_grid * ratio)
    if init == "tiled":
        first, cell = image_position, side % base_grid
    else:
        first, cell = image_position + 1, side // ratio
    return (first + base_grid * cell[:, None] + cell[None, :]).flatten()


def level0_mask(text_mask_BL: torch.Tensor, base_cells: int) -> torch.Tensor:
    """Return who sees whom among text and base codes, bool [B, 1, L + M, L + M] (spec 4.1).

    Text does not see base codes; real text and base codes do not see pads; pads see the whole text area.
    """
    batch, text_length = text_mask_BL.shape
    base = text_mask_BL.new_ones(batch, base_cells)
    real = torch.cat([text_mask_BL, base], dim=1)
    is_base = torch.cat([torch.zeros_like(text_mask_BL), base], dim=1)
    sees_area = is_base[:, :, None] | ~is_base[:, None, :]
    sees_slot = ~real[:, :, None] | real[:, None, :]
    return (sees_area & sees_slot)[:, None]


def _padded_text(text_ids: Sequence[int], slots: int, longest: int) -> Row:
    text = list(text_ids)[:longest]
    pads = slots - len(text)
    tokens = np.array([TEXT_PAD] * pads + text, dtype=np.int64)
    positions = np.array([0] * pads + list(range(len(text))), dtype=np.int64)
    return tokens, positions, np.arange(slots) >= pads


def direct_row(
    text_ids: Sequence[int],
    base_codes: np.ndarray,
    *,
    config: DirectSRConfig,
    coglm: CogLMConfig,
    ratio: int,
    start_of_image: int,
) -> Row:
    """Lay one direct SR sample out; all high-resolution cells masked.

    Args:
        text_ids: model ids without <start_of_image>; cut to text_length - 1, because the published model
            never saw a text area without a pad.
        base_codes: [M] in raster order.
        config, coglm, ratio: sizes.
        start_of_image: id of the masked cells.
    """
    tokens, positions, real = _padded_text(text_ids, config.text_length, config.text_length - 1)
    base = np.asarray(base_codes, dtype=np.int64).reshape(-1)
    cells = base.size * ratio**2
    base_positions = coglm.image_position + 1 + np.arange(base.size)
    return (
        np.concatenate([tokens, base, np.full(cells, start_of_image)]),
        np.concatenate([positions, base_positions, coglm.max_positions + np.arange(cells)]),
        real,
    )


def iterative_row(
    text_ids: Sequence[int], codes: np.ndarray, *, config: IterativeSRConfig, coglm: CogLMConfig
) -> Row:
    """Lay one iterative SR sample out: the first text_length ids, then `codes` [grid^2], some masked."""
    tokens, positions, real = _padded_text(text_ids, config.text_length, config.text_length)
    cells = np.asarray(codes, dtype=np.int64).reshape(-1)
    new_positions = coglm.max_positions + np.arange(cells.size)
    return np.concatenate([tokens, cells]), np.concatenate([positions, new_positions]), real


def _stack(rows: list[Row], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, positions, real = (
        torch.from_numpy(np.stack(part)).to(device) for part in zip(*rows, strict=True)
    )
    return tokens, positions, real


def direct_inputs(
    text_ids: Sequence[Sequence[int]],
    base_codes_BM: torch.Tensor,
    *,
    config: DirectSRConfig,
    coglm: CogLMConfig,
    ratio: int,
    base_grid: int,
    start_of_image: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return DirectSR's tokens, position ids [B, S] and level-0 mask bool [B, 1, L, L], on the codes' device.

    Args:
        text_ids: model ids of each prompt, without <start_of_image>.
        base_codes_BM: int, base_grid^2 codes each.
        config, coglm, ratio, base_grid: sizes.
        start_of_image: id of the masked cells.
    """
    if base_codes_BM.shape != (len(text_ids), base_grid**2):
        raise ValueError(
            f"base_codes_BM needs the shape ({len(text_ids)}, {base_grid**2}): {len(text_ids)} prompts on a "
            f"grid of {base_grid}; got {tuple(base_codes_BM.shape)}"
        )
    rows = [
        direct_row(ids, codes, config=config, coglm=coglm, ratio=ratio, start_of_image=start_of_image)
        for ids, codes in zip(text_ids, base_codes_BM.cpu().numpy(), strict=True)
    ]
    tokens, positions, real = _stack(rows, base_codes_BM.device)
    return tokens, positions, level0_mask(real, base_grid**2)


def iterative_inputs(
    text_ids: Sequence[Sequence[int]],
    codes_BM: torch.Tensor,
    *,
    config: IterativeSRConfig,
    coglm: CogLMConfig,
    grid: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return IterativeSR's tokens, position ids [B, S] and real text bool [B, L], on the codes' device.

    Args:
        text_ids: model ids of each prompt, without <start_of_image>; the first text_length count.
        codes_BM: int, grid^2 codes each, masked cells already set to <start_of_image>.
        config, coglm, grid: sizes.
    """
    if codes_BM.shape != (len(text_ids), grid**2):
        raise ValueError(
            f"codes_BM needs the shape ({len(text_ids)}, {grid**2}): {len(text_ids)} prompts on a grid of "
            f"{grid}; got {tuple(codes_BM.shape)}"
        )
    codes = codes_BM.cpu().numpy()
    rows = [
        iterative_row(ids, cells, config=config, coglm=coglm)
        for ids, cells in zip(text_ids, codes, strict=True)
    ]
    return _stack(rows, codes_BM.device)
