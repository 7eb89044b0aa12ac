"""What a call of local attention must be, and its one normal form; every refusal names the argument.

Dims: B batch, Y X query grid, H heads, D channels, T additional tokens.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cogview2.ops.local_attention.problem import DATA_TYPES

Kernel = tuple[int, int]
Pair = tuple[torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True)
class Call:
    """A checked call: key batches are those of the query, and a coarse grid is always the cross part."""

    query: torch.Tensor
    """[B, Y, X, H, D]."""
    local: Pair
    """Key and value [B, Y, X, H, D], or None twice."""
    kernel_size: Kernel
    is_causal: bool
    cross: Pair
    """Key and value [B, Y', X', H, D], or None twice."""
    cross_kernel_size: Kernel
    tokens: Pair
    """Keys and values [B, T, H, D] with T > 0, or None twice."""
    token_bias: torch.Tensor | None
    """[B, T]."""


def check(
    query: torch.Tensor,
    local: Pair,
    kernel_size: Any,
    is_causal: bool,
    cross: Pair,
    cross_kernel_size: Any,
    tokens: Pair,
    token_bias: torch.Tensor | None,
) -> Call:
    """Check the arguments of `local_attention_2d` and bring them into normal form.

    Raises:
        ValueError: names the argument, what it needs and what it is.
    """
    _check_query(query)
    batch, rows, columns, heads, channels = query.shape
    grid = (None, None, None, heads, channels)
    if local[0] is None or local[1] is None:
        raise ValueError("key and value must be given; their grid may be coarser than the query's")
    _check_pair(("key", "value"), local, grid, query)
    if (cross[0] is None) != (cross_kernel_size is None):
        raise ValueError("cross_key, cross_value and cross_kernel_size belong together: give all or none")
    kernel = _kernel("kernel_size", kernel_size, is_causal, local[0])
    own: Pair = local
    if local[0].shape[1:3] != query.shape[1:3]:
        if is_causal or cross[0] is not None:
            raise ValueError(
                f"key must have the query's grid {rows}x{columns} in a causal call and beside cross_key, "
                f"got {local[0].shape[1]}x{local[0].shape[2]}"
            )
        cross, cross_kernel_size, own = local, kernel_size, (None, None)
    _check_pair(("cross_key", "cross_value"), cross, grid, query)
    coarse = (1, 1)
    if cross[0] is not None:
        _check_grid("key" if own[0] is None else "cross_key", cross[0], query)
        coarse = _kernel("cross_kernel_size", cross_kernel_size, False, cross[0])
    _check_pair(("additional_keys", "additional_values"), tokens, (batch, None, heads, channels), query)
    if token_bias is not None:
        if tokens[0] is None:
            raise ValueError("additional_bias needs additional_keys and additional_values")
        _check_tensor("additional_bias", token_bias, (batch, tokens[0].shape[1]), query)
        _check_floating("additional_bias", token_bias)
    if tokens[0] is not None and tokens[0].shape[1] == 0:
        tokens, token_bias = (None, None), None
    own = (_expanded("key", own[0], batch), _expanded("value", own[1], batch))
    cross = (_expanded("cross_key", cross[0], batch), _expanded("cross_value", cross[1], batch))
    return Call(query, own, kernel, is_causal, cross, coarse, tokens, token_bias)


def _check_query(query: torch.Tensor) -> None:
    if query.dim() != 5 or query.dtype not in DATA_TYPES:
        raise ValueError(
            f"query must be a floating-point tensor [B, Y, X, H, D], got {query.dtype} {list(query.shape)}"
        )
    if min(query.shape[1:]) < 1:
        raise ValueError(
            f"query needs Y, X, H and D of at least 1, got [B, Y, X, H, D] = {list(query.shape)}"
        )


def _check_tensor(name: str, tensor: torch.Tensor, shape: Sequence[int | None], query: torch.Tensor) -> None:
    fits = tensor.dim() == len(shape) and all(
        size in (None, actual) for size, actual in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(
            f"{name} needs the shape [{wanted}] beside a query of {list(query.shape)}, got {list(tensor.shape)}"
        )
    if tensor.device != query.device:
        raise ValueError(f"{name} must be on {query.device} like the query, got {tensor.device}")


def _check_pair(names: tuple[str, str], pair: Pair, shape: Sequence[int | None], query: torch.Tensor) -> None:
    first, second = pair
    if first is None or second is None:
        if first is not second:
            raise ValueError(f"{names[0]} and {names[1]} belong together: give both or neither")
        return
    for name, tensor in zip(names, (first, second), strict=True):
        _check_tensor(name, tensor, shape, query)
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name} must have the dtype {query.dtype} of the query, got {tensor.dtype}")
    if first.shape != second.shape:
        raise ValueError(
            f"{names[0]} and {names[1]} must have one shape, got {list(first.shape)} and {list(second.shape)}"
        )


def _check_floating(name: str, bias: torch.Tensor) -> None:
    if not bias.is_floating_point():
        raise ValueError(
            f"{name} is added to scores and must be floating point, got {bias.dtype}; write -inf where a key is hidden"
        )


def check_cross_bias(bias: float | torch.Tensor) -> None:
    """Check that `cross_bias` is one number.

    Raises:
        ValueError: it is several, or no floating-point one.
    """
    if not isinstance(bias, torch.Tensor):
        return
    if bias.numel() != 1:
        raise ValueError(f"cross_bias must be one number, got a tensor of {list(bias.shape)}")
    _check_floating("cross_bias", bias)


def _kernel(name: str, kernel: Any, is_causal: bool, keys: torch.Tensor) -> Kernel:
    """Return the window; what reaches past the grid for every query is cut off, for it holds no key."""
    try:
        rows, columns = (operator.index(size) for size in kernel)
    except (TypeError, ValueError):
        rows = columns = 0
    if min(rows, columns) < 1:
        raise ValueError(
            f"{name} must be two whole numbers of at least 1, got {kernel!r}; use for example (9, 5)"
        )
    if is_causal and (rows % 2 == 0 or columns % 2 == 0):
        raise ValueError(f"a causal {name} needs odd sizes, got {(rows, columns)}; use for example (9, 5)")
    return _cut(rows, keys.shape[1]), _cut(columns, keys.shape[2])


def _cut(size: int, cells: int) -> int:
    return max(1, min(size, 2 * cells - size % 2))


def _check_grid(name: str, grid: torch.Tensor, query: torch.Tensor) -> None:
    for axis, word in ((1, "rows"), (2, "columns")):
        if grid.shape[axis] < 1 or query.shape[axis] % grid.shape[axis]:
            raise ValueError(
                f"the query's {word} must be a multiple of {name}'s, "
                f"got {query.shape[axis]} and {grid.shape[axis]}"
            )


def _expanded(name: str, tensor: torch.Tensor | None, batch: int) -> torch.Tensor | None:
    """Repeat the key batch so that query batch i meets key batch i * keys // batch."""
    if tensor is None or tensor.shape[0] == batch:
        return tensor
    groups = tensor.shape[0]
    if groups < 1 or batch % groups:
        raise ValueError(f"the query's batch must be a multiple of {name}'s, got {batch} and {groups}")
    if groups == 1:
        return tensor.expand(batch, *tensor.shape[1:])
    return tensor.repeat_interleave(batch // groups, dim=0)
