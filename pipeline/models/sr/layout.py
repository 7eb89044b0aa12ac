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
from cogview2.pipeline.config.sampling import IterativeSRSamplingConfig

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
"""Of the released pattern."""

_SPREAD = (0.7548776662466927, 0.5698402909980532)
"""Steps of the plane's additive sequence with the most even points: powers of 1 / 1.3247..., the root of x^3 = x + 1."""


def _merged(counts: Sequence[int], groups: int) -> list[int]:
    """Return the group of each of several diagonals, runs of neighbours with the least sum of squared cell counts.

    Args:
        counts: cells of each diagonal.
        groups: at most len(counts); none is empty. Of equal splits, that with the earliest cuts.
    """
    sums = np.concatenate([[0], np.cumsum(counts)]).tolist()
    # best[end] = (cost, cuts) of the first `end` diagonals in the groups so far.
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    for group in range(1, groups + 1):
        best = {
            end: min(
                (cost + (sums[end] - sums[start]) ** 2, (*cuts, end))
                for start, (cost, cuts) in best.items()
                if start < end
            )
            for end in range(group, len(counts) - (groups - group) + 1)
        }
    cuts = best[len(counts)][1]
    return [sum(cut <= diagonal for cut in cuts) for diagonal in range(len(counts))]


def diagonal_pattern(window: int, mask_ratio: float, rounds: int) -> np.ndarray:
    """Return a LoPAR pattern made by rule, int64 [window, window]: 0 = kept, m >= 1 = final in round m (spec 5.2).

    Kept cells lie spread evenly over the tile. The others follow the diagonals r + c: as there are fewer rounds than
    diagonals as a rule, neighbouring diagonals share one, so that rounds have about equally many cells. With more
    rounds than diagonals, diagonals are cut.

    Args:
        window: side of the tile.
        mask_ratio: share of the cells to draw again; the nearest that whole cells and `rounds` allow.
        rounds: each with at least one cell.

    Raises:
        ValueError: more rounds than cells.
    """
    cells = window**2
    if rounds > cells:
        raise ValueError(
            f"{rounds} LoPAR rounds need as many cells, a tile of side {window} has {cells}; use fewer"
        )
    masked = min(max(round(mask_ratio * cells), rounds), cells)
    row, column = (part.ravel() for part in np.indices((window, window)))
    spread = (row * _SPREAD[0] + column * _SPREAD[1]) % 1.0
    drawn = np.sort(np.argsort(spread, kind="stable")[cells - masked :])
    drawn = drawn[np.argsort((row + column)[drawn], kind="stable")]
    diagonals, index, counts = np.unique((row + column)[drawn], return_inverse=True, return_counts=True)
    values = np.zeros(cells, dtype=np.int64)
    if rounds <= len(diagonals):
        values[drawn] = 1 + np.array(_merged(counts.tolist(), rounds))[index]
    else:
        values[drawn] = 1 + np.arange(masked) * rounds // masked
    return values.reshape(window, window)


def lopar_masks(grid: int, config: IterativeSRSamplingConfig | None = None) -> list[torch.Tensor]:
    """Return which cells each round draws, bool [grid, grid]: a pattern tiled and cropped; the released one by default.

    Args:
        grid: side of the high-resolution grid.
        config: names the schedule. The tile of a diagonal one is cut to the grid, so that no round is empty.

    Raises:
        ValueError: a diagonal schedule with more rounds than cells.
    """
    if config is None or config.schedule == "released":
        pattern, rounds = np.array(RELEASED_PATTERN), PASSES
    else:
        pattern = diagonal_pattern(min(config.window, grid), config.mask_ratio, config.rounds)
        rounds = config.rounds
    repeats = -(-grid // len(pattern))
    values = torch.from_numpy(pattern).repeat(repeats, repeats)[:grid, :grid]
    return [values >= step for step in range(1, rounds + 1)]


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
