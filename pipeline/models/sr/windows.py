"""Between the transformer's sequences and the grids of local attention.

Dims: B batch, S sequence, N heads, K head dim, D hidden = N * K, G side of the grid, S = G * G.
"""

import torch


def grid_of_heads(x_BNSK: torch.Tensor, side: int) -> torch.Tensor:
    """Lay the cells of every head out as a square, a view [B, G, G, N, K]."""
    return x_BNSK.unflatten(2, (side, side)).permute(0, 2, 3, 1, 4)


def merge_grid(out_BGGNK: torch.Tensor) -> torch.Tensor:
    """Put cells in raster order and heads side by side again: [B, S, D]."""
    return out_BGGNK.flatten(3).flatten(1, 2)
