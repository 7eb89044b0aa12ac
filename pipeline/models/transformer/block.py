"""One layer of the transformer: sandwich layer norms around attention and feed-forward (spec 2.2)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from cogview2.pipeline.config.model import CogLMConfig
from cogview2.pipeline.models.transformer.attention import SelfAttention
from cogview2.pipeline.models.transformer.init import Linear, output_std
from cogview2.pipeline.models.transformer.norm import LayerNorm


class FeedForward(nn.Module):
    """Linear, tanh-GELU, linear, dropout."""

    def __init__(self, config: CogLMConfig) -> None:
        super().__init__()
        inner = config.feed_forward_multiplier * config.hidden
        self.dropout = config.dropout
        self.dense_h_to_4h = Linear(config.hidden, inner, config.init_std)
        self.dense_4h_to_h = Linear(inner, config.hidden, output_std(config.init_std, config.layers))

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """Map [B, S, D] to [B, S, D]."""
        inner = F.gelu(self.dense_h_to_4h(x_BSD), approximate="tanh")
        return F.dropout(self.dense_4h_to_h(inner), self.dropout, self.training)


class Block(nn.Module):
    """x + third_ln(attention(input_ln(x))), then x + fourth_ln(mlp(post_attention_ln(x)))."""

    def __init__(self, config: CogLMConfig) -> None:
        super().__init__()
        self.input_layernorm = LayerNorm(config)
        self.attention = SelfAttention(config)
        self.third_layernorm = LayerNorm(config)
        self.post_attention_layernorm = LayerNorm(config)
        self.mlp = FeedForward(config)
        self.fourth_layernorm = LayerNorm(config)
        for norm in (self.third_layernorm, self.fourth_layernorm):
            nn.init.constant_(norm.weight, config.branch_norm_init)

    def forward(
        self, hidden_BSD: torch.Tensor, attend: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Run the layer.

        Args:
            hidden_BSD: the residual stream.
            attend: maps the normed input [B, S, D] to the attention's output [B, S, D]: `self.attention` with
                its mask, or in direct super-resolution a pair of attention sets.

        Returns:
            The residual stream after this layer, [B, S, D].
        """
        hidden_BSD = hidden_BSD + self.third_layernorm(attend(self.input_layernorm(hidden_BSD)))
        return hidden_BSD + self.fourth_layernorm(self.mlp(self.post_attention_layernorm(hidden_BSD)))
