"""The definition of 2D local attention: gathers over window shifts in plain PyTorch, any device and dtype.

Dims: B batch, N H heads, Y X query grid, P window slots, T additional keys, K D head dim.
A window of (rows, columns) has the radii (rows // 2, columns // 2). Slot t lies `t // columns - radius` rows
below and `t % columns - radius` columns right of the centre. A causal window ends there, in raster order.
"""

from collections.abc import Iterator

import torch

Kernel = tuple[int, int]
OUTSIDE_SCORE = -10_000.0
_UINT32 = 0xFFFFFFFF


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
    if keys.shape[0] != batch:
        keys = keys.repeat_interleave(_ratio(batch, keys.shape[0], "batch"), dim=0)
    return keys.flatten(2, 3)


def similar(
    query: torch.Tensor,
    key: torch.Tensor,
    kernel_size: Kernel,
    *,
    is_causal: bool = False,
    outside: float = OUTSIDE_SCORE,
) -> torch.Tensor:
    """Score every query against the keys of its window; no scaling (spec section 6).

    Args:
        query: [B, N, Y, X, K].
        key: [B', N, Y', X', K]; B, Y and X are multiples of B', Y' and X'.
        kernel_size: rows and columns of the window, in key cells.
        is_causal: keep only the slots up to the centre.
        outside: the score of a key outside its grid, -10000 as published.

    Returns:
        [B, N, Y, X, P], accumulated in float32 (float64 for float64 inputs), in the dtype of `query`.
    """
    keys = _expand_batch(key, query.shape[0])
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = []
    for flat, inside in _shifts(_grid(query), _grid(key), kernel_size, is_causal, query.device):
        score = (query.to(wide) * keys[:, :, flat].to(wide)).sum(-1)
        scores.append(score.masked_fill(~inside, outside))
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


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of MurmurHash3 on 32-bit numbers kept in int64."""
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & _UINT32
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & _UINT32
    return x ^ (x >> 16)


def dropout_keep(
    seed: torch.Tensor, batch: int, heads: int, queries: int, slots: int, p: float
) -> torch.Tensor:
    """Return which softmax weights dropout keeps; the arithmetic of csrc/window.h.

    Args:
        seed: one number, int64.
        batch, heads, queries: sizes; queries in raster order.
        slots: of [tokens; coarse window; local window], windows with all their slots.
        p: the probability that a weight is dropped.

    Returns:
        bool [batch, heads, queries, slots], on the device of `seed`.
    """
    device, number = seed.device, seed.reshape(())
    head = torch.arange(batch * heads, device=device)
    x = _mix(((number & _UINT32) + 0x9E3779B9) & _UINT32)
    x = _mix(x ^ ((number >> 32) & _UINT32))
    stream = _mix(_mix(x ^ (head & _UINT32)) ^ (head >> 32) ^ 0x5BD1E995)
    query = (torch.arange(queries, device=device) * 0x9E3779B1) & _UINT32
    slot = (torch.arange(slots, device=device) * 0x85EBCA77) & _UINT32
    bits = _mix(_mix(stream[:, None] ^ query)[:, :, None] ^ slot)
    threshold = min(int(p * 2**32), _UINT32)
    return (bits >= threshold).unflatten(0, (batch, heads))


def local_attention_2d_reference(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    kernel_size: Kernel,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    additional_keys: torch.Tensor | None = None,
    additional_values: torch.Tensor | None = None,
    additional_bias: torch.Tensor | None = None,
    cross_key: torch.Tensor | None = None,
    cross_value: torch.Tensor | None = None,
    cross_kernel_size: Kernel | None = None,
    cross_bias: float | torch.Tensor = 0.0,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to the window, optionally also to a coarser grid's window and to global tokens, in one softmax.

    Args:
        query: [B, Y, X, H, D].
        key, value: the local grid, [B, Y, X, H, D]; None: there is none.
        kernel_size: rows and columns of the local window.
        is_causal: cut the local window at its centre.
        scale: factor of the scores before the biases; 1 / sqrt(D) by default.
        additional_keys, additional_values: global tokens that every query may see, [B, T, H, D].
        additional_bias: added to the scores of the global tokens, [B, T]; -inf hides one.
        cross_key, cross_value: a coarser grid, [B, Y', X', H, D], its window centred under the query.
        cross_kernel_size: rows and columns of the window on the coarser grid.
        cross_bias: added to the scores of the coarser grid.
        dropout_p: probability that a softmax weight is dropped; the others grow by 1 / (1 - p).
        seed: one number, int64; decides which ones, see `dropout_keep`.

    Returns:
        out [B, Y, X, H, D] in the dtype of `query`, and the log-sum-exp of the scores [B, Y, X, H] in float32
        (float64 for float64). Everything in between is in that wider dtype.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    q_BHYXD = query.to(wide).permute(0, 3, 1, 2, 4) * scale
    scores = []
    values = []
    if additional_keys is not None and additional_values is not None:
        score = torch.einsum("bhyxd,bthd->bhyxt", q_BHYXD, additional_keys.to(wide))
        if additional_bias is not None:
            score = score + additional_bias.to(wide)[:, None, None, None]
        scores.append(score)
    windows = (
        (cross_key, cross_value, cross_kernel_size, cross_bias, False),
        (key, value, kernel_size, 0.0, is_causal),
    )
    for keys, grid_values, kernel, bias, causal in windows:
        if keys is None or grid_values is None or kernel is None:
            continue
        k_BHYXD = keys.to(wide).permute(0, 3, 1, 2, 4)
        score = similar(q_BHYXD, k_BHYXD, kernel, is_causal=causal, outside=-torch.inf)
        scores.append(score + torch.as_tensor(bias, dtype=wide, device=query.device))
        values.append((grid_values.to(wide).permute(0, 3, 1, 2, 4), kernel, causal))
    joint = torch.cat(scores, dim=-1)
    lse = joint.logsumexp(-1)
    weights = joint.softmax(-1)
    parts = list(weights.split([score.shape[-1] for score in scores], dim=-1))
    if dropout_p:
        assert seed is not None
        parts = _dropped(parts, [kernel for _, kernel, _ in values], dropout_p, seed)
    out = torch.zeros_like(q_BHYXD)
    if additional_values is not None and additional_keys is not None:
        out = torch.einsum("bhyxt,bthd->bhyxd", parts.pop(0), additional_values.to(wide))
    for part, (grid_value, kernel, causal) in zip(parts, values, strict=True):
        out = out + weighting(part, grid_value, kernel, is_causal=causal)
    return out.permute(0, 2, 3, 1, 4).to(query.dtype), lse.permute(0, 2, 3, 1)


def _dropped(
    parts: list[torch.Tensor], kernels: list[Kernel], p: float, seed: torch.Tensor
) -> list[torch.Tensor]:
    """Drop weights of [tokens, if any; windows]; a causal window has fewer weights than slots."""
    batch, heads, rows, columns, _ = parts[0].shape
    tokens = [part.shape[-1] for part in parts[: len(parts) - len(kernels)]]
    slots = tokens + [kernel[0] * kernel[1] for kernel in kernels]
    keep = dropout_keep(seed, batch, heads, rows * columns, sum(slots), p).unflatten(2, (rows, columns))
    return [
        part * mask[..., : part.shape[-1]] / (1 - p)
        for part, mask in zip(parts, keep.split(slots, dim=-1), strict=True)
    ]


def dense_mask(grid: Kernel, key_grid: Kernel, kernel_size: Kernel, is_causal: bool = False) -> torch.Tensor:
    """Return who sees whom, bool [rows * columns of `grid`, rows * columns of `key_grid`], on the CPU."""
    cpu = torch.device("cpu")
    mask = torch.zeros(grid[0] * grid[1], key_grid[0] * key_grid[1], dtype=torch.bool, device=cpu)
    for flat, inside in _shifts(grid, key_grid, kernel_size, is_causal, cpu):
        queries = inside.flatten().nonzero().squeeze(1)
        mask[queries, flat.flatten()[queries]] = True
    return mask
