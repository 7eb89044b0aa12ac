"""Windows made by shifting and by unfolding, in plain PyTorch: all scores and weights lie in memory.

Dims: B batch, Y X query grid, H heads, D channels, P slots of a window.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from cases import Case, Inputs

Call = Callable[[], torch.Tensor]


def _offsets(kernel_size: tuple[int, int], is_causal: bool) -> list[tuple[int, int]]:
    """Top left corner of every shifted copy inside the padded keys, in raster order."""
    corners = [(row, column) for row in range(kernel_size[0]) for column in range(kernel_size[1])]
    return corners[: len(corners) // 2 + 1] if is_causal else corners


def _inside(
    grid: tuple[int, int], kernel_size: tuple[int, int], is_causal: bool, device: torch.device
) -> torch.Tensor:
    """Whether each shifted copy has a key for a cell, bool [Y, X, P]."""
    rows, columns = (torch.arange(size, device=device) for size in grid)
    slots = []
    for row, column in _offsets(kernel_size, is_causal):
        key_rows, key_columns = rows + row - kernel_size[0] // 2, columns + column - kernel_size[1] // 2
        row_inside = (key_rows >= 0) & (key_rows < grid[0])
        slots.append(row_inside[:, None] & (key_columns >= 0) & (key_columns < grid[1]))
    return torch.stack(slots, dim=-1)


def _finer(tensor: torch.Tensor, first: int, ratios: tuple[int, int]) -> torch.Tensor:
    """Repeat the cells of a coarse grid at dims `first` and `first + 1` under every fine cell."""
    if ratios == (1, 1):
        return tensor
    return tensor.repeat_interleave(ratios[0], first).repeat_interleave(ratios[1], first + 1)


@dataclass(frozen=True)
class _Part:
    """One window of keys: the local one or the coarse one."""

    key: torch.Tensor
    value: torch.Tensor
    kernel_size: tuple[int, int]
    is_causal: bool
    ratios: tuple[int, int]
    hidden: torch.Tensor  # bool [Y, X, 1, P]


def _parts(case: Case, inputs: Inputs) -> list[_Part]:
    layout, device = case.layout, inputs.query.device
    parts = []
    if inputs.cross_key is not None and inputs.cross_value is not None:
        ratios = (layout.grid[0] // layout.cross_grid[0], layout.grid[1] // layout.cross_grid[1])
        inside = _finer(_inside(layout.cross_grid, layout.cross_kernel_size, False, device), 0, ratios)
        window = layout.cross_kernel_size
        hidden = ~inside[:, :, None]
        parts.append(_Part(inputs.cross_key, inputs.cross_value, window, False, ratios, hidden))
    inside = _inside(layout.grid, case.window, layout.is_causal, device)
    hidden = ~inside[:, :, None]
    parts.append(_Part(inputs.key, inputs.value, case.window, layout.is_causal, (1, 1), hidden))
    return parts


def _windowed(
    case: Case,
    inputs: Inputs,
    score: Callable[[torch.Tensor, _Part], torch.Tensor],
    weigh: Callable[[torch.Tensor, _Part], torch.Tensor],
) -> Call:
    """One softmax over [tokens; coarse; local] around two functions of a window.

    Args:
        case, inputs: of the peer.
        score: scaled queries [B, Y, X, H, D] and a window -> [B, Y, X, H, P].
        weigh: probabilities [B, Y, X, H, P] and a window -> [B, Y, X, H, D].
    """
    parts = _parts(case, inputs)

    def call() -> torch.Tensor:
        query = inputs.query / math.sqrt(case.channels)
        scores = [score(query, part).masked_fill(part.hidden, -math.inf) for part in parts]
        if inputs.additional_keys is not None:
            scores.insert(0, torch.einsum("byxhd,bthd->byxht", query, inputs.additional_keys))
        joint = torch.cat(scores, dim=-1).softmax(-1)
        weights = list(joint.split([score.shape[-1] for score in scores], dim=-1))
        out = torch.zeros_like(query)
        if inputs.additional_values is not None:
            out = out + torch.einsum("byxht,bthd->byxhd", weights.pop(0), inputs.additional_values)
        for weight, part in zip(weights, parts, strict=True):
            out = out + weigh(weight, part)
        return out

    return call


def _shifted(keys: torch.Tensor, part: _Part) -> Iterator[torch.Tensor]:
    """Yield the keys that lie at each slot of the windows, [B, Y, X, H, D]."""
    rows, columns = keys.shape[1:3]
    above, left = part.kernel_size[0] // 2, part.kernel_size[1] // 2
    padded = F.pad(keys, (0, 0, 0, 0, left, left, above, above))
    for row, column in _offsets(part.kernel_size, part.is_causal):
        yield _finer(padded[:, row : row + rows, column : column + columns], 1, part.ratios)


def slices(case: Case, inputs: Inputs) -> Call:
    """One shifted view of the keys per slot of the window: the best that plain PyTorch does."""

    def score(query: torch.Tensor, part: _Part) -> torch.Tensor:
        return torch.stack([(query * keys).sum(-1) for keys in _shifted(part.key, part)], dim=-1)

    def weigh(weight: torch.Tensor, part: _Part) -> torch.Tensor:
        total = torch.zeros((), dtype=weight.dtype, device=weight.device)
        for slot, values in enumerate(_shifted(part.value, part)):
            total = total + weight[..., slot, None] * values
        return total

    return _windowed(case, inputs, score, weigh)


def unfold(case: Case, inputs: Inputs) -> Call:
    """A copy of the keys per slot of the window (im2col), then matrix products."""

    def unfolded(keys: torch.Tensor, part: _Part) -> torch.Tensor:
        batch, rows, columns, heads, channels = keys.shape
        above, left = part.kernel_size[0] // 2, part.kernel_size[1] // 2
        images = keys.permute(0, 3, 4, 1, 2).flatten(0, 1)
        copies = F.unfold(images, part.kernel_size, padding=(above, left))
        copies = copies.view(batch, heads, channels, -1, rows, columns)
        return _finer(copies[:, :, :, : part.hidden.shape[-1]], 4, part.ratios)

    def score(query: torch.Tensor, part: _Part) -> torch.Tensor:
        return torch.einsum("byxhd,bhdpyx->byxhp", query, unfolded(part.key, part))

    def weigh(weight: torch.Tensor, part: _Part) -> torch.Tensor:
        return torch.einsum("byxhp,bhdpyx->byxhd", weight, unfolded(part.value, part))

    return _windowed(case, inputs, score, weigh)
