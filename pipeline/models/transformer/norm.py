"""The layer norm of every model, with the optional precision-bottleneck relaxation (spec 2.2)."""

import torch
from torch import nn

from cogview2.pipeline.config.model import CogLMConfig

_RELAXED_MAXIMUM = 8.0


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the hidden size; statistics in float32 whatever the input's dtype.

    With `layernorm_pb_relax` the input is first divided by max|x| / 8 over the whole tensor, batch included, so
    that no square overflows float16. A layer norm does not see the scale of its input, so only the share of
    `layernorm_eps` in the result changes, and with it, slightly, what the rest of the batch does to a sample.
    """

    def __init__(self, config: CogLMConfig) -> None:
        super().__init__(config.hidden, config.layernorm_eps)
        self.pb_relax = config.layernorm_pb_relax

    def forward(self, x_XD: torch.Tensor) -> torch.Tensor:
        """Normalise the last dim; any leading dims."""
        if self.pb_relax:
            largest = x_XD.detach().abs().max().clamp(min=torch.finfo(x_XD.dtype).tiny)
            # In this order: largest / 8 can be too small a number for float16.
            x_XD = x_XD / largest * _RELAXED_MAXIMUM
        return super().forward(x_XD)
