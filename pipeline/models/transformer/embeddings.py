"""The tied output head: logits are scalar products with the word embeddings (spec 2.1, 3.2)."""

import torch
import torch.nn.functional as F


def tied_logits(hidden_XD: torch.Tensor, words_VD: torch.Tensor, rows: int | None = None) -> torch.Tensor:
    """Return float32 logits [..., rows] over the first `rows` word embeddings, for sampling.

    Multiplied in float32 even in mixed precision, as published. The loss makes its own, see coglm/loss.py.

    Args:
        hidden_XD: final hidden states, any leading dims.
        words_VD: the word embeddings.
        rows: how many of them; all by default.
    """
    with torch.autocast(hidden_XD.device.type, enabled=False):
        return F.linear(hidden_XD.float(), words_VD[:rows].float())
