"""Embeddings, layers and final layer norm, with the published parameter names (spec 2.1, 10.2)."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from cogview2.pipeline.config.model import CogLMConfig
from cogview2.pipeline.models.transformer.attention import SelfAttention
from cogview2.pipeline.models.transformer.block import Block
from cogview2.pipeline.models.transformer.init import Embedding
from cogview2.pipeline.models.transformer.norm import LayerNorm

LayerAttention = Callable[[int, SelfAttention, torch.Tensor], torch.Tensor]
"""(layer index, the layer's attention, normed input [B, S, D]) -> attention output [B, S, D]."""


class Transformer(nn.Module):
    """The backbone that CogLM, direct SR and iterative SR share; who sees whom is the caller's business."""

    def __init__(self, config: CogLMConfig, rows: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.activation_checkpointing = False
        self.word_embeddings = Embedding(rows, config.hidden, config.init_std)
        self.position_embeddings = Embedding(config.max_positions, config.hidden, config.init_std)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_layernorm = LayerNorm(config)

    def embed(self, tokens_BS: torch.Tensor, positions_BSD: torch.Tensor) -> torch.Tensor:
        """Return dropout(word embeddings + `positions_BSD`), [B, S, D]."""
        return F.dropout(self.word_embeddings(tokens_BS) + positions_BSD, self.dropout, self.training)

    def forward(self, hidden_BSD: torch.Tensor, attend: LayerAttention) -> torch.Tensor:
        """Run all layers and the final layer norm on embedded tokens; [B, S, D].

        With `activation_checkpointing` set, training keeps only the input of each layer and computes the rest
        again in the backward pass.
        """
        for index, block in enumerate(self.layers):
            assert isinstance(block, Block)
            layer_attend = partial(attend, index, block.attention)
            if self.activation_checkpointing and torch.is_grad_enabled():
                hidden_BSD = checkpoint(block, hidden_BSD, layer_attend, use_reentrant=False)
            else:
                hidden_BSD = block(hidden_BSD, layer_attend)
        return self.final_layernorm(hidden_BSD)
