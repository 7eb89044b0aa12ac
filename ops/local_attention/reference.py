"""The definition of 2D local attention: gathers over window shifts in plain PyTorch, any device and dtype.

Dims: B batch, N heads, Y X query grid, P window slots, T additional keys, K head dim.
A window of (rows, columns) has the radii (rows // 2, columns // 2). Slot t lies `t // columns - radius` rows
below and `t % columns - radius` columns right of the centre. A causal window ends there, in raster order.
"""

from collections.abc import Iterator

import torch

Kernel = tuple[int, int]
OUTSIDE_SCORE = -10_000.0


def window_offsets(kernel_size: Kernel, is_causal: bool = False) -> list[Kernel]:
    """Return the (row, column) offset of every window slot, in raster order.

    Args:
        kernel_size: rows and columns of the window.
        is_causal: keep only the cells before the centre, and the centre.

    Raises:
        ValueError: a size below 1, or an even size with `is_causal` (the centre would not be the last slot).
    """
    rows, columns = kernel_size
    if rows < 1 or columns < 1:
        raise ValueError(f"kernel_size must be at least 1x1, got {kernel_size}; use for example (9, 5)")
    if is_causal and (rows % 2 == 0 or columns % 2 == 0):
        raise ValueError(f"a causal window needs odd sizes, got {kernel_size}; use for example (9, 5)")
    slots = rows * columns // 2 + 1 if is_causal else rows * columns
    return [(slot // columns - rows // 2, slot % columns - columns // 2) for slot in range(slots)]


def _ratio(queries: int, keys: int, name: str) -> int:
    if keys < 1 or queries % keys:
        raise ValueError(f"{name} of the queries must be a multiple of the keys', got {queries} and {keys}")
    return queries // keys


def _shifts(
    grid: Kernel, key_grid: Kernel, kernel_size: Kernel, is_causal: bool, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield per slot every query's flat key index (clamped) and whether it lies inside, both [Y, X]."""
    row_ratio, column_ratio = _ratio(grid[0], key_grid[0], "rows"), _ratio(grid[1], key_grid[1], "columns")
    centre_rows = torch.arange(grid[0], device=device) // row_ratio
    centre_columns = torch.arange(grid[1], device=device) // column_ratio
    for row_offset, column_offset in window_offsets(kernel_size, is_causal):
        rows, columns = centre_rows + row_offset, centre_columns + column_offset
        row_inside = (rows >= 0) & (rows < key_grid[0])
        column_inside = (columns >= 0) & (columns < key_grid[1])
        flat = rows.clamp(0, key_grid[0] - 1)[:, None] * key_grid[1] + columns.clamp(0, key_grid[1] - 1)
        yield flat, row_inside[:, None] & column_inside


def _grid(x_BNYXK: torch.Tensor) -> Kernel:
    return x_BNYXK.shape[2], x_BNYXK.shape[3]


def _expand_batch(keys: torch.Tensor, batch: int) -> torch.Tensor:
    """Repeat the key batch so that query batch i meets key batch i * keys // batch; flatten the key grid."""
    return keys.repeat_interleave(_ratio(batch, keys.shape[0], "batch"), dim=0).flatten(2, 3)


def similar(
    query: torch.Tensor, key: torch.Tensor, kernel_size: Kernel, *, is_causal: bool = False
) -> torch.Tensor:
    """Score every query against the keys of its window; no scaling (spec section 6).

    Args:
        query: [B, N, Y, X, K].
        key: [B', N, Y', X', K]; B, Y and X are multiples of B', Y' and X'.
        kernel_size: rows and columns of the window, in key cells.
        is_causal: keep only the slots up to the centre.

    Returns:
        [B, N, Y, X, P], accumulated in float32 (float64 for float64 inputs), in the dtype of `query`;
        exactly -10000 where the key lies outside its grid.
    """
    keys = _expand_batch(key, query.shape[0])
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = []
    for flat, inside in _shifts(_grid(query), _grid(key), kernel_size, is_causal, query.device):
        score = (query.to(wide) * keys[:, :, flat].to(wide)).sum(-1)
        scores.append(score.masked_fill(~inside, OUTSIDE_SCORE))
    return torch.stack(scores, dim=-1).to(query.dtype)


def weighting(
    probabilities: torch.Tensor, value: torch.Tensor, kernel_size: Kernel, *, is_causal: bool = False
) -> torch.Tensor:
    """Sum the values of every window, weighted; slots outside the grid contribute nothing (spec section 6).

    Args:
        probabilities: [B, N, Y, X, P].
        value: [B', N, Y', X', K], as `key` of `similar`.
        kernel_size: rows and columns of the window, in value cells.
        is_causal: as in `similar`.

    Returns:
        [B, N, Y, X, K], accumulated as in `similar`, in the dtype of `value`.
    """
    values = _expand_batch(value, probabilities.shape[0])
    wide = torch.promote_types(value.dtype, torch.float32)
    total = torch.zeros((), dtype=wide, device=value.device)
    shifts = _shifts(_grid(probabilities), _grid(value), kernel_size, is_causal, value.device)
    for slot, (flat, inside) in enumerate(shifts):
        weight = probabilities[..., slot].to(wide).masked_fill(~inside, 0.0)
        total = total + weight[..., None] * values[:, :, flat].to(wide)
    return total.to(value.dtype)


def local_attention_2d_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: Kernel,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    cross_key: torch.Tensor | None = None,
    cross_value: torch.Tensor | None = None,
    cross_kernel_size: Kernel | None = None,
    additional_keys: torch.Tensor | None = None,
    additional_values: torch.Tensor | None = None,
    additional_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend to the window, optionally also to a coarser grid's window and to global tokens, in one softmax.

    Args:
        query: [B, N, Y, X, K].
        key, value: the local grid, [B', N, Y', X', K] (usually the grid of the queries).
        kernel_size: rows and columns of the local window.
        is_causal: cut the local window at its centre.
        scale: factor of the queries; 1 / sqrt(K) by default.
        cross_key, cross_value: a coarser grid, [B', N, Y'', X'', K], its window centred under the query.
        cross_kernel_size: rows and columns of the window on the coarser grid.
        additional_keys, additional_values: global tokens that every query may see, [B, N, T, K].
        additional_bias: added to the scores of the global tokens, [B, T]; -10000 hides one.

    Returns:
        [B, N, Y, X, K]. The softmax runs over [additional; cross; local] in float32 or wider.
    """
    query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = []
    if additional_keys is not None:
        score = torch.einsum("bnyxk,bntk->bnyxt", query, additional_keys)
        scores.append(score if additional_bias is None else score + additional_bias[:, None, None, None])
    if cross_key is not None:
        assert cross_kernel_size is not None
        scores.append(similar(query, cross_key, cross_kernel_size))
    scores.append(similar(query, key, kernel_size, is_causal=is_causal))
    wide = torch.promote_types(query.dtype, torch.float32)
    joint = torch.cat(scores, dim=-1).softmax(-1, dtype=wide).to(value.dtype)
    parts = list(joint.split([score.shape[-1] for score in scores], dim=-1))
    out = weighting(parts.pop(), value, kernel_size, is_causal=is_causal)
    if cross_value is not None:
        assert cross_kernel_size is not None
        out = out + weighting(parts.pop(), cross_value, cross_kernel_size)
    if additional_values is not None:
        out = out + torch.einsum("bnyxt,bntk->bnyxk", parts.pop(), additional_values)
    return out


def _dense_mask(grid: Kernel, key_grid: Kernel, kernel_size: Kernel, is_causal: bool) -> torch.Tensor:
    cpu = torch.device("cpu")
    mask = torch.zeros(grid[0] * grid[1], key_grid[0] * key_grid[1], dtype=torch.bool, device=cpu)
    for flat, inside in _shifts(grid, key_grid, kernel_size, is_causal, cpu):
        queries = inside.flatten().nonzero().squeeze(1)
        mask[queries, flat.flatten()[queries]] = True
    return mask


def local_mask(grid: int, kernel_size: Kernel, is_causal: bool = False) -> torch.Tensor:
    """Return who sees whom inside a square grid, bool [grid^2, grid^2], True = visible, on the CPU."""
    return _dense_mask((grid, grid), (grid, grid), kernel_size, is_causal)


def cross_mask(grid: int, ratio: int, kernel_size: Kernel) -> torch.Tensor:
    """Return who sees whom from a square grid to one `ratio` times coarser, bool [grid^2, (grid/ratio)^2]."""
    if grid % ratio:
        raise ValueError(f"the fine grid must be a multiple of the ratio, got {grid} and {ratio}")
    return _dense_mask((grid, grid), (grid // ratio, grid // ratio), kernel_size, False)
