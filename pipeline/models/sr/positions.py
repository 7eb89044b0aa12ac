"""The position table of the high-resolution cells, and how it starts from CogLM's (spec 4.2)."""

import torch
from torch import nn

from cogview2.pipeline.config.model import CogLMConfig
from cogview2.pipeline.models.transformer.init import Embedding


class ExtraPositions(nn.Module):
    """Rows for the position ids from max_positions on, under their published name."""

    def __init__(self, base: CogLMConfig, cells: int) -> None:
        super().__init__()
        self.first = base.max_positions
        self.position_embeddings = Embedding(cells, base.hidden, base.init_std)

    def forward(self, position_ids_BS: torch.Tensor) -> torch.Tensor:
        """Return [B, S, D] for ids in [max_positions, max_positions + cells)."""
        return self.position_embeddings(position_ids_BS - self.first)
