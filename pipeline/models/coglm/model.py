"""CogLM as a plain module: sampling, ZeRO training, small tests (spec 2)."""

import torch
from torch import nn

from cogview2.pipeline.config.model import CogLMConfig
from cogview2.pipeline.models.coglm.visibility import Visibility
from cogview2.pipeline.models.transformer.attention import KeyValueCache, SelfAttention, score_bias
from cogview2.pipeline.models.transformer.embeddings import tied_logits
from cogview2.pipeline.models.transformer.trunk import Transformer


class CogLM(nn.Module):
    """The language model over text and image tokens."""

    def __init__(self, config: CogLMConfig, rows: int) -> None:
        """Build it with fresh weights.

        Args:
            config: sizes.
            rows: rows of the word embeddings, see Vocabulary.rows.
        """
        super().__init__()
        self.config = config
        self.transformer = Transformer(config, rows)

    def forward(
        self,
        tokens_BS: torch.Tensor,
        position_ids_BS: torch.Tensor,
        attention_mask_B1ST: torch.Tensor | Visibility,
        *,
        attention_bias: torch.Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        """Return the hidden states after the final layer norm, [B, S, D].

        Args:
            tokens_BS: int64 model ids.
            position_ids_BS: int64 in [0, max_positions).
            attention_mask_B1ST: bool, True = visible; T = S, or with a cache all tokens so far. In training a
                Visibility, with neither bias nor cache: the device's best backend decides what it becomes.
            attention_bias: float, broadcastable to [B, 1, S, T], added before masking (spec 3.2).
            cache: keys and values of the tokens before; the new ones are appended.
        """
        hidden_BSD = self.transformer.embed(tokens_BS, self.transformer.position_embeddings(position_ids_BS))
        if isinstance(attention_mask_B1ST, Visibility):
            assert attention_bias is None and cache is None
            first = self.transformer.layers[0].attention
            assert isinstance(first, SelfAttention)
            bias = attention_mask_B1ST.mask_for(first, hidden_BSD.dtype)  # all layers are alike
        else:
            bias = score_bias(attention_mask_B1ST, hidden_BSD.dtype, attention_bias)

        def attend(layer: int, attention: SelfAttention, x_BSD: torch.Tensor) -> torch.Tensor:
            return attention(x_BSD, bias, layer, cache)

        return self.transformer(hidden_BSD, attend)

    def logits(self, hidden_XD: torch.Tensor, rows: int | None = None) -> torch.Tensor:
        """Return float32 logits [..., rows] over the first `rows` ids (all by default)."""
        return tied_logits(hidden_XD, self.transformer.word_embeddings.weight, rows)
