"""2D local attention through PyTorch's FlexAttention: the fallback on a GPU without nvcc, and a peer to measure.

Dims: B batch, Y X query grid, H heads, D channels, T tokens, Q queries (Y * X), K keys in the order
[tokens; cross; local], each part in raster order.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    FlexKernelOptions,
    create_block_mask,
    flex_attention,
)

Kernel = tuple[int, int]

BLOCK_SIZE = 128
SMALLEST_CHANNELS = 16  # of the Triton kernels
# Every combination of grid, window, dtype and batch is one compilation, and Dynamo's default of 8 per function is
# for code that recompiles by mistake. Past the limit it raises (fullgraph) instead of materializing all scores.
COMPILATIONS = 256
# A bias of -inf would make -inf - -inf where a whole block is hidden; this is exactly weight 0 all the same.
HIDDEN_BIAS = -1e30


@dataclass(frozen=True)
class Layout:
    """The sizes that decide which keys a query sees.

    Attributes:
        grid: rows and columns of the queries, and of the local keys.
        kernel_size: rows and columns of the local window; None: there are no local keys.
        is_causal: the local window ends at its centre, in raster order.
        tokens: how many keys every query sees.
        cross_grid: rows and columns of the coarse keys; each divides the grid's. (0, 0): there are none.
        cross_kernel_size: rows and columns of their window.
    """

    grid: Kernel
    kernel_size: Kernel | None
    is_causal: bool = False
    tokens: int = 0
    cross_grid: Kernel = (0, 0)
    cross_kernel_size: Kernel = (1, 1)

    @property
    def queries(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def cross_keys(self) -> int:
        return self.cross_grid[0] * self.cross_grid[1]

    @property
    def keys(self) -> int:
        return self.tokens + self.cross_keys + (0 if self.kernel_size is None else self.queries)


def _in_window(row: torch.Tensor, column: torch.Tensor, kernel_size: Kernel) -> torch.Tensor:
    above, left = kernel_size[0] // 2, kernel_size[1] // 2
    rows = (row >= -above) & (row < kernel_size[0] - above)
    return rows & (column >= -left) & (column < kernel_size[1] - left)


def visible(layout: Layout, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Say who sees whom.

    Args:
        layout: the sizes.
        query, key: indices below `layout.queries` and `layout.keys`, integers of any shapes that broadcast.

    Returns:
        bool, the broadcast shape of both; True = visible.
    """
    rows, columns = layout.grid
    query_row, query_column = query // columns, query % columns
    seen = key < layout.tokens
    if layout.cross_keys:
        row_ratio, column_ratio = rows // layout.cross_grid[0], columns // layout.cross_grid[1]
        cell = key - layout.tokens
        row = cell // layout.cross_grid[1] - query_row // row_ratio
        column = cell % layout.cross_grid[1] - query_column // column_ratio
        coarse = (cell >= 0) & (cell < layout.cross_keys)
        seen = seen | (coarse & _in_window(row, column, layout.cross_kernel_size))
    if layout.kernel_size is None:
        return seen
    cell = key - (layout.tokens + layout.cross_keys)
    row, column = cell // columns - query_row, cell % columns - query_column
    local = (cell >= 0) & _in_window(row, column, layout.kernel_size)
    if layout.is_causal:
        local = local & ((row < 0) | ((row == 0) & (column <= 0)))
    return seen | local


def dense_mask(layout: Layout, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return `visible` for all pairs, bool [Q, K]."""
    query = torch.arange(layout.queries, device=device)
    return visible(layout, query[:, None], torch.arange(layout.keys, device=device))


@functools.lru_cache(maxsize=128)
def block_mask(layout: Layout, device: torch.device, block_size: int = BLOCK_SIZE) -> BlockMask:
    """Return the mask of a layout for any batch and head; made once, since making it costs more than attending."""

    def mask_mod(
        batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        return visible(layout, query, key)

    return create_block_mask(
        mask_mod, None, None, layout.queries, layout.keys, device=device, BLOCK_SIZE=block_size
    )


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    mask: BlockMask,
    scale: float,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[B, H, Q, D], twice [B, H, K, D] and a bias of [B, K] -> [B, H, Q, D] and, if wanted, the lse [B, H, Q]."""

    def score_mod(
        score: torch.Tensor, batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        assert bias is not None
        return score + bias[batch, key]

    # Named, because the kernel that is chosen for few queries has no backward pass.
    options: FlexKernelOptions = {"BACKEND": "TRITON"}
    out, extra = flex_attention(
        query,
        key,
        value,
        score_mod=None if bias is None else score_mod,
        block_mask=mask,
        scale=scale,
        kernel_options=options,
        return_aux=AuxRequest(lse=return_lse),
    )
    return out, extra.lse


@functools.cache
def _compiled(mode: str | None = None) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    return torch.compile(_attend, dynamic=False, fullgraph=True, mode=mode)


def _heads_first(*parts: torch.Tensor | None) -> torch.Tensor:
    """Tensors [B, ..., H, D] -> one behind the other, [B, H, K, D]; one part alone stays a view where it can."""
    flat = [part.flatten(1, -3) for part in parts if part is not None]
    if not torch.is_grad_enabled():
        # A view of a parameter still says requires_grad, and FlexAttention on the CPU refuses that.
        flat = [part.detach() for part in flat]
    return (flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)).transpose(1, 2)


def _key_bias(
    layout: Layout,
    batch: int,
    additional_bias: torch.Tensor | None,
    cross_bias: float | torch.Tensor,
    like: torch.Tensor,
) -> torch.Tensor | None:
    """Return what is added to the score of each key, [B, K], or None where that is nothing."""
    wide = torch.promote_types(like.dtype, torch.float32)
    with_tokens = layout.tokens > 0 and additional_bias is not None
    with_cross = layout.cross_keys > 0 and (isinstance(cross_bias, torch.Tensor) or cross_bias != 0.0)
    if not with_tokens and not with_cross:
        return None
    bias = torch.zeros(batch, layout.keys, dtype=wide, device=like.device)
    tokens, cross = layout.tokens, layout.tokens + layout.cross_keys
    parts = [bias[:, :tokens], bias[:, tokens:cross], bias[:, cross:]]
    if with_tokens and additional_bias is not None:
        parts[0] = parts[0] + additional_bias.to(wide).clamp_min(HIDDEN_BIAS)
    if with_cross:
        parts[1] = parts[1] + torch.as_tensor(cross_bias, dtype=wide, device=like.device)
    return torch.cat(parts, dim=1)


def missing_for_flex(query: torch.Tensor, dropout_p: float = 0.0, *others: torch.Tensor | None) -> str | None:
    """Say in one sentence why FlexAttention cannot serve a query beside `others`, or None."""
    if dropout_p:
        return f"FlexAttention has no dropout, got dropout_p={dropout_p}; use the backend 'cuda' or 'cpu'"
    needs_grad = any(tensor is not None and tensor.requires_grad for tensor in (query, *others))
    if not query.is_cuda and needs_grad and torch.is_grad_enabled():
        return "FlexAttention has no backward pass on the CPU; use the backend 'cpu' or 'reference'"
    if query.is_cuda and query.dtype == torch.float64:
        return "FlexAttention has no float64 kernel for CUDA; use the backend 'cuda' or 'reference'"
    if query.is_cuda and query.shape[-1] < SMALLEST_CHANNELS:
        return f"FlexAttention needs at least {SMALLEST_CHANNELS} channels on CUDA, got {query.shape[-1]}"
    return None


def local_attention_2d_flex(
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
    return_lse: bool = False,
    compiled: bool | None = None,
    mode: str | None = None,
    block_size: int = BLOCK_SIZE,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend to the window, optionally also to a coarser grid's window and to tokens, in one softmax.

    The gradient of a bias is summed by atomics here, in no fixed order; all other gradients are deterministic.

    Args:
        query, key, value: [B, Y, X, H, D], channels contiguous. Key and value None: no window of the own grid.
        kernel_size: rows and columns of the window.
        is_causal: cut the window at its centre, in raster order.
        scale: factor of the scores before the biases; 1 / sqrt(D) by default.
        additional_keys, additional_values: tokens that every query sees, [B, T, H, D].
        additional_bias: added to their scores, [B, T]; -inf hides one.
        cross_key, cross_value: a coarser grid, [B, Y', X', H, D], its window centred under the query.
        cross_kernel_size: rows and columns of that window, in coarse cells.
        cross_bias: added to the coarse scores.
        dropout_p: must be 0.
        return_lse: also return the logarithm of the softmax's denominator.
        compiled: one fused kernel instead of all scores in memory; by default on CUDA only.
        mode: of `torch.compile`.
        block_size: queries and keys in a block that the mask keeps or skips.

    Returns:
        [B, Y, X, H, D] in the dtype of `query`, and with `return_lse` also [B, Y, X, H], at least float32.

    Raises:
        ValueError: `missing_for_flex` has a reason.
    """
    given = (key, value, additional_keys, additional_values, additional_bias, cross_key, cross_value)
    reason = missing_for_flex(query, dropout_p, *given)
    if reason is not None:
        raise ValueError(reason)
    batch, rows, columns, heads, channels = query.shape
    cross_grid = (0, 0) if cross_key is None else (cross_key.shape[1], cross_key.shape[2])
    tokens = 0 if additional_keys is None else additional_keys.shape[1]
    layout = Layout(
        grid=(rows, columns),
        kernel_size=None if key is None else kernel_size,
        is_causal=is_causal,
        tokens=tokens,
        cross_grid=cross_grid,
        cross_kernel_size=cross_kernel_size or (1, 1),
    )
    q_BHQD = _heads_first(query)
    k_BHKD = _heads_first(additional_keys, cross_key, key)
    v_BHKD = _heads_first(additional_values, cross_value, value)
    scale = 1 / math.sqrt(channels) if scale is None else scale
    if q_BHQD.numel() == 0:
        # Nothing to attend; the sum keeps every input in the graph.
        out = query + (k_BHKD.sum() + v_BHKD.sum())
        wide = torch.promote_types(query.dtype, torch.float32)
        return (out, out.to(wide).sum(-1)) if return_lse else out
    bias = _key_bias(layout, batch, additional_bias, cross_bias, query)
    mask = block_mask(layout, query.device, block_size)
    compiled = query.is_cuda if compiled is None else compiled
    arguments = (q_BHQD, k_BHKD, v_BHKD, bias, mask, scale, return_lse)
    if not compiled or torch.compiler.is_compiling():
        out_BHQD, lse_BHQ = _attend(*arguments)
    else:
        with torch._dynamo.config.patch(
            recompile_limit=COMPILATIONS, accumulated_recompile_limit=COMPILATIONS
        ):
            out_BHQD, lse_BHQ = _compiled(mode)(*arguments)
    out = out_BHQD.transpose(1, 2).unflatten(1, (rows, columns))
    if not return_lse:
        return out
    assert lse_BHQ is not None
    return out, lse_BHQ.transpose(1, 2).unflatten(1, (rows, columns))
