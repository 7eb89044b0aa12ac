"""The tied output head: logits are scalar products with the word embeddings (spec 2.1, 3.2)."""

import torch
import torch.nn.functional as F


def tied_logits(
    hidden_XD: torch.Tensor, words_VD: torch.Tensor, rows: int | None = None, *, full_precision: bool = True
) -> torch.Tensor:
    """Return float32 logits [..., rows] over the first `rows` word embeddings.

    Args:
        hidden_XD: final hidden states, any leading dims.
        words_VD: the word embeddings.
        rows: how many of them; all by default.
        full_precision: multiply in float32 even in mixed precision, as published for sampling; otherwise in
            the working dtype, which saves a float32 copy of the table.
    """
    words = words_VD[:rows]
    if not full_precision:
        return F.linear(hidden_XD, words.to(hidden_XD.dtype)).float()
    with torch.autocast(hidden_XD.device.type, enabled=False):
        return F.linear(hidden_XD.float(), words.float())
