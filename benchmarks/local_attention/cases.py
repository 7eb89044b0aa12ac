"""What is measured: grids, windows, their exact amount of work, and the tensors of a call.

Dims: B batch, Y X query grid, H heads, D channels, T tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch

from cogview2.ops.local_attention.flex import Layout

Kernel = tuple[int, int]


@dataclass(frozen=True)
class Case:
    """One row of the tables: a layout of keys, and how many heads of how many channels look at it.

    Attributes:
        name: short and unique; --only looks for parts of it.
        layout: grid, windows and tokens.
        heads, channels: per query.
    """

    name: str
    layout: Layout
    heads: int = 4
    channels: int = 64

    @property
    def window(self) -> Kernel:
        """Rows and columns of the local window, which every case has."""
        assert self.layout.kernel_size is not None
        return self.layout.kernel_size

    @property
    def title(self) -> str:
        layout = self.layout
        words = [f"{layout.grid[0]}x{layout.grid[1]}", f"{self.window[0]}x{self.window[1]}"]
        if layout.is_causal:
            words.append("causal")
        if layout.tokens:
            words.append(f"+ {layout.tokens} tokens")
        if layout.cross_keys:
            grid, window = layout.cross_grid, layout.cross_kernel_size
            words.append(f"+ {grid[0]}x{grid[1]} coarse {window[0]}x{window[1]}")
        return " ".join(words)


def _seen_per_axis(queries: int, keys: int, window: int) -> int:
    """Sum over the queries of an axis how many keys of the window lie inside."""
    ratio, before = queries // keys, window // 2
    total = 0
    for centre in range(keys):
        first, last = max(centre - before, 0), min(centre + window - before - 1, keys - 1)
        total += ratio * (last - first + 1)
    return total


def visible_pairs(case: Case) -> int:
    """Count the pairs of query and key that meet, for one batch and head; borders clipped."""
    layout, (window_rows, window_columns) = case.layout, case.window
    rows, columns = layout.grid
    if layout.is_causal:
        above = _seen_per_axis(rows, rows, window_rows)
        # A causal window has as many rows above its centre as the whole one has below: half of the rest.
        above = (above - rows) // 2
        wide = _seen_per_axis(columns, columns, window_columns)
        local = above * wide + rows * ((wide - columns) // 2 + columns)
    else:
        local = _seen_per_axis(rows, rows, window_rows) * _seen_per_axis(columns, columns, window_columns)
    cross = 0
    if layout.cross_keys:
        cross = _seen_per_axis(rows, layout.cross_grid[0], layout.cross_kernel_size[0])
        cross *= _seen_per_axis(columns, layout.cross_grid[1], layout.cross_kernel_size[1])
    return local + cross + layout.tokens * layout.queries


def useful_flops(case: Case, batch: int, mode: str) -> int:
    """Count what the result needs: two products per pair and channel forward, five backward; exp is free."""
    products = {"forward": 2, "backward": 5, "both": 7}[mode]
    return 2 * products * case.channels * case.heads * batch * visible_pairs(case)


def _elements(case: Case, batch: int) -> tuple[int, int, int]:
    """Elements of the queries, of all keys, and of the lse."""
    layout = case.layout
    per_cell = batch * case.heads * case.channels
    return layout.queries * per_cell, layout.keys * per_cell, layout.queries * batch * case.heads


def least_bytes(case: Case, batch: int, dtype: torch.dtype, mode: str) -> int:
    """Bytes that must cross the memory bus when everything is read and written once per pass.

    forward: reads q, k, v, writes out and lse. backward: two passes that need no atomics, one for dq (reads
    q, k, v, out, its gradient and lse, writes dq and a number per query) and one for dk and dv (reads q, k, v, the
    gradient and both numbers per query).
    """
    queries, keys, numbers = _elements(case, batch)
    size, wide = dtype.itemsize, 4
    forward = (2 * queries + 2 * keys) * size + numbers * wide
    first = (4 * queries + 2 * keys) * size + 2 * numbers * wide
    second = (2 * queries + 4 * keys) * size + 2 * numbers * wide
    return {"forward": forward, "backward": first + second, "both": forward + first + second}[mode]


@dataclass(frozen=True)
class Inputs:
    """The tensors of one call; keys that a case does not have are None.

    Attributes:
        query, key, value: [B, Y, X, H, D], views of one packed projection [B, Y, X, 3, H, D].
        cross_key, cross_value: [B, Y', X', H, D], views of [B, Y', X', 2, H, D].
        additional_keys, additional_values: [B, T, H, D], views of [B, T, 2, H, D].
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cross_key: torch.Tensor | None = None
    cross_value: torch.Tensor | None = None
    additional_keys: torch.Tensor | None = None
    additional_values: torch.Tensor | None = None

    @property
    def leaves(self) -> list[torch.Tensor]:
        """What gradients are taken of."""
        return [tensor for tensor in vars(self).values() if tensor is not None]

    def leaf_copy(self, requires_grad: bool) -> "Inputs":
        """Return the same memory as new leaves of autograd, strides kept."""
        copies: dict[str, Any] = {
            name: None if tensor is None else tensor.detach().requires_grad_(requires_grad)
            for name, tensor in vars(self).items()
        }
        return Inputs(**copies)

    def misaligned(self) -> "Inputs":
        """Return contiguous copies that begin one element behind a 16-byte border."""

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)[1:]
            return flat.view(tensor.shape).copy_(tensor.detach())

        copies: dict[str, Any] = {
            name: None if tensor is None else moved(tensor) for name, tensor in vars(self).items()
        }
        return Inputs(**copies)

    def keywords(self, case: Case) -> dict[str, Any]:
        """The arguments of `local_attention_2d` and `local_attention_2d_flex`."""
        layout = case.layout
        keywords: dict[str, Any] = {
            "query": self.query,
            "key": self.key,
            "value": self.value,
            "kernel_size": case.window,
            "is_causal": layout.is_causal,
        }
        if layout.tokens:
            keywords |= {
                "additional_keys": self.additional_keys,
                "additional_values": self.additional_values,
            }
        if layout.cross_keys:
            keywords |= {
                "cross_key": self.cross_key,
                "cross_value": self.cross_value,
                "cross_kernel_size": layout.cross_kernel_size,
            }
        return keywords


def make_inputs(case: Case, batch: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
    """Draw the tensors of a case from a normal distribution.

    Args:
        case: what to make.
        batch: B.
        dtype, device: of all tensors.
        seed: of the draw.
    """
    generator = torch.Generator(device).manual_seed(seed)
    layout, inner = case.layout, (case.heads, case.channels)

    def packed(*sizes: int) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device=device).normal_(generator=generator)

    query, key, value = packed(batch, *layout.grid, 3, *inner).unbind(3)
    inputs: dict[str, torch.Tensor] = {"query": query, "key": key, "value": value}
    if layout.cross_keys:
        cross = packed(batch, *layout.cross_grid, 2, *inner)
        inputs |= {"cross_key": cross[:, :, :, 0], "cross_value": cross[:, :, :, 1]}
    if layout.tokens:
        tokens = packed(batch, layout.tokens, 2, *inner)
        inputs |= {"additional_keys": tokens[:, :, 0], "additional_values": tokens[:, :, 1]}
    return Inputs(**inputs)


HEADLINE = Case("64x64", Layout((64, 64), (9, 9)))
ITERATIVE = Case("iterative", Layout((60, 60), (9, 5), tokens=16))
DIRECT = Case("direct", Layout((60, 60), (9, 5), cross_grid=(20, 20), cross_kernel_size=(5, 5)))
CAUSAL = Case("causal", Layout((64, 64), (17, 9), is_causal=True))
CAUSAL_COARSE = Case(
    "causal-coarse",
    Layout((64, 64), (17, 9), is_causal=True, cross_grid=(32, 32), cross_kernel_size=(7, 7)),
)
CPU_CASES = (HEADLINE, ITERATIVE, DIRECT, CAUSAL)
GPU_CASES = (HEADLINE, CAUSAL_COARSE, DIRECT, ITERATIVE)
TINY_CASES = (
    Case("tiny", Layout((8, 8), (3, 3)), heads=2, channels=8),
    Case(
        "tiny-joint",
        Layout((6, 9), (5, 3), tokens=3, cross_grid=(2, 3), cross_kernel_size=(3, 3)),
        heads=2,
        channels=8,
    ),
    Case("tiny-causal", Layout((7, 5), (5, 3), is_causal=True), heads=2, channels=8),
)
