"""Masked cross-entropy, and its split by the kind of label (spec 2.6)."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from cogview2.pipeline.models.transformer.embeddings import tied_logits

IdRange = tuple[int, int]


@dataclass(frozen=True)
class LabelRanges:
    """Half-open id ranges by which the loss is split."""

    image: IdRange
    english: IdRange
    chinese: IdRange

    def items(self) -> tuple[tuple[str, IdRange], ...]:
        """Return (name, range) in the order of `PART_NAMES`."""
        return ("image", self.image), ("english", self.english), ("chinese", self.chinese)


PART_NAMES = ("image", "english", "chinese")
"""The order of `LossParts.sums` and `LossParts.counts`."""


class LossParts(NamedTuple):
    """The loss to minimise, and sums and counts that add up over ranks, for the logged means."""

    loss: torch.Tensor
    """Scalar with gradient: (weighted) mean cross-entropy in nats over the loss positions; 0 when there are none."""
    sums: torch.Tensor
    """float32 [3], without gradient: summed cross-entropy of image, English and Chinese labels."""
    counts: torch.Tensor
    """float32 [3]: how many of each."""


def masked_cross_entropy(
    hidden_BSD: torch.Tensor, words_VD: torch.Tensor, labels_BS: torch.Tensor, loss_mask_BS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the float32 cross-entropies [P] of the P loss positions, and their labels [P].

    The hidden states are gathered first, so logits exist only where there is a loss.

    Args:
        hidden_BSD: after the final layer norm.
        words_VD: the tied output matrix; the softmax runs over its rows.
        labels_BS: int64, below V wherever the loss counts.
        loss_mask_BS: bool.
    """
    labels_P = labels_BS[loss_mask_BS]
    logits_PV = tied_logits(hidden_BSD[loss_mask_BS], words_VD, full_precision=False)
    return F.cross_entropy(logits_PV, labels_P, reduction="none"), labels_P


def coglm_loss(
    hidden_BSD: torch.Tensor,
    words_VD: torch.Tensor,
    labels_BS: torch.Tensor,
    loss_mask_BS: torch.Tensor,
    ranges: LabelRanges,
    loss_weights_BS: torch.Tensor | None = None,
) -> LossParts:
    """Return sum(w CE) / sum(w) over the loss positions of the micro batch, and its split.

    Args:
        hidden_BSD, words_VD, labels_BS, loss_mask_BS: see masked_cross_entropy.
        ranges: the kinds of labels; their sums and counts are without weights.
        loss_weights_BS: w, float32, above 0 wherever the loss counts; 1 by default.
    """
    losses_P, labels_P = masked_cross_entropy(hidden_BSD, words_VD, labels_BS, loss_mask_BS)
    if loss_weights_BS is None:
        loss = losses_P.sum() / max(losses_P.numel(), 1)
    else:
        weights_P = loss_weights_BS[loss_mask_BS].float()
        # The bound only matters without any loss position: then it makes 0 / 0 a 0.
        loss = (weights_P * losses_P).sum() / weights_P.sum().clamp(min=torch.finfo(torch.float32).tiny)
    with torch.no_grad():
        kinds = torch.stack([(labels_P >= low) & (labels_P < high) for _, (low, high) in ranges.items()])
        weights = kinds.to(losses_P.dtype)
        return LossParts(loss, (weights * losses_P.detach()).sum(1), weights.sum(1))
