"""Multi-head attention over explicit masks (spec 2.3).

Dims: B batch, S queries, T keys, N heads, K head dim, D hidden = N * K.
"""

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from cogview2.pipeline.config.model import CogLMConfig
from cogview2.pipeline.models.transformer.backends import Backend, Mask, backend_for, flex_attend
from cogview2.pipeline.models.transformer.init import Linear, output_std

HIDDEN_SCORE = -1e30
HIDDEN_SCORE_HALF = -65_504.0
"""The least float16 number."""
_PUBLISHED_HIDDEN_SCORE = -10_000.0


class KeyValueCache(Protocol):
    """Keeps the keys and values of the tokens seen so far."""

    def append(
        self, layer: int, k_BNSK: torch.Tensor, v_BNSK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the new tokens of a layer and return all of its keys and values, [B, N, T, K]."""


def score_bias(
    visible: torch.Tensor, dtype: torch.dtype, log_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Turn a mask into numbers that are added to the attention scores.

    The published rule is scores + W, then -10000 in place of hidden scores: a hidden key gets weight exactly
    0, and a row without any visible key becomes uniform. Adding -1e30 absorbs the score and W is left out, so
    both hold in float32, float64 and bfloat16. float16 has no such number and takes its least: hidden keys still
    get weight 0, but a row without any visible key follows its scores. Such rows are pads, which nobody sees.

    Args:
        visible: bool, any shape that broadcasts to [B, N, S, T]; True = visible.
        dtype: of the result.
        log_weights: W, float, broadcastable against `visible` (spec 3.2).

    Returns:
        `dtype`, the broadcast shape of both.
    """
    hidden = HIDDEN_SCORE_HALF if dtype == torch.float16 else HIDDEN_SCORE
    weights = torch.zeros((), device=visible.device) if log_weights is None else log_weights
    return torch.where(visible, weights.to(dtype), torch.tensor(hidden, dtype=dtype, device=visible.device))


def split_heads(qkv_BSE: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cut [B, S, 3 D] into queries, keys and values (contiguous thirds), each [B, N, S, K]."""
    batch, length, _ = qkv_BSE.shape
    q, k, v = qkv_BSE.view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    return q, k, v


def merge_heads(out_BNSK: torch.Tensor) -> torch.Tensor:
    """Put the heads side by side again: [B, S, D]."""
    return out_BNSK.transpose(1, 2).flatten(2)


def attend(
    q_BNSK: torch.Tensor,
    k_BNTK: torch.Tensor,
    v_BNTK: torch.Tensor,
    bias: Mask,
    dropout: float,
    alpha: float = 0.0,
) -> torch.Tensor:
    """Softmax attention of scale 1 / sqrt(K); [B, N, S, K].

    Args:
        q_BNSK, k_BNTK, v_BNTK: of one dtype.
        bias: added to the scores, see `score_bias`; or a block mask, without dropout and alpha.
        dropout: probability that an attention weight is dropped.
        alpha: of `relaxed_scores`; 0, the default, takes the fused kernels, whose scores are float32 anyway.
    """
    if not isinstance(bias, torch.Tensor):
        assert not dropout and not alpha, "FlexAttention has neither dropout nor relaxed scores"
        return flex_attend(q_BNSK, k_BNTK, v_BNTK, bias)
    if not alpha:
        return F.scaled_dot_product_attention(
            q_BNSK, k_BNTK, v_BNTK, attn_mask=bias.to(q_BNSK.dtype), dropout_p=dropout
        )
    weights_BNST = relaxed_scores(q_BNSK, k_BNTK, bias, alpha).softmax(-1)
    return F.dropout(weights_BNST, dropout) @ v_BNTK


def relaxed_scores(
    q_BNSK: torch.Tensor, k_BNTK: torch.Tensor, bias: torch.Tensor, alpha: float
) -> torch.Tensor:
    """Return scores whose softmax is that of S = Q K^T / sqrt(K) + bias, but at most 0: (S/a - max(S/a)) a.

    Everything is computed in the working dtype, as published (spec 2.3, PB-relax): S / a must fit float16, S need
    not. The maximum is that of the visible keys of a row; hidden scores are exactly -10000.
    """
    scaled_BNST = (q_BNSK / (alpha * math.sqrt(q_BNSK.shape[-1]))) @ k_BNTK.mT
    hidden = bias <= _PUBLISHED_HIDDEN_SCORE
    scaled_BNST = scaled_BNST + bias.masked_fill(hidden, 0).to(scaled_BNST.dtype) / alpha
    lowest = torch.finfo(scaled_BNST.dtype).min
    top_BNS1 = scaled_BNST.detach().masked_fill(hidden, lowest).amax(-1, keepdim=True)
    return ((scaled_BNST - top_BNS1) * alpha).masked_fill(hidden, _PUBLISHED_HIDDEN_SCORE)


class SelfAttention(nn.Module):
    """Self-attention with the published parameter names."""

    def __init__(self, config: CogLMConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.pb_relax = config.attention_pb_relax
        self.query_key_value = Linear(config.hidden, 3 * config.hidden, config.init_std)
        self.dense = Linear(config.hidden, config.hidden, output_std(config.init_std, config.layers))

    @property
    def active_dropout(self) -> float:
        """The dropout probability of the current mode."""
        return self.dropout if self.training else 0.0

    def backend(self, device: torch.device, dtype: torch.dtype) -> Backend:
        """Return what should attend over a mask made of roles in the current mode; see `backend_for`."""
        head_dim = self.dense.in_features // self.heads
        return backend_for(device, dtype, head_dim, self.active_dropout, self.pb_relax)

    def project(self, x_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the queries, keys and values of `x_BSD`, each [B, N, S, K]."""
        return split_heads(self.query_key_value(x_BSD), self.heads)

    def forward(
        self, x_BSD: torch.Tensor, bias: Mask, layer: int = 0, cache: KeyValueCache | None = None
    ) -> torch.Tensor:
        """Attend inside `x_BSD`, or to all that `cache` holds of `layer`.

        Args:
            x_BSD: after the input layer norm.
            bias: additive, broadcastable to [B, N, S, T]; or, without a cache, a block mask.
            layer: index of the layer in the cache.
            cache: where to keep keys and values; T grows with it.

        Returns:
            [B, S, D], after the output projection and its dropout.
        """
        q, k, v = self.project(x_BSD)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        out = attend(q, k, v, bias, self.active_dropout, self.pb_relax)
        return F.dropout(self.dense(merge_heads(out)), self.dropout, self.training)
