"""Masked cross-entropy, and its split by the kind of label (spec 2.6)."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from cogview2.pipeline.models.coglm.chunked_cross_entropy import weighted_cross_entropy

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


class MaskedLosses(NamedTuple):
    """Cross-entropies of the P loss positions, in nats."""

    total: torch.Tensor
    """Scalar with gradient: sum(w CE)."""
    each: torch.Tensor
    """CE, float32 [P], without gradient."""
    labels: torch.Tensor
    """int64 [P]."""
    weights: torch.Tensor
    """w, float32 [P]."""


def masked_cross_entropy(
    hidden_BSD: torch.Tensor,
    words_VD: torch.Tensor,
    labels_BS: torch.Tensor,
    loss_mask_BS: torch.Tensor,
    loss_weights_BS: torch.Tensor | None = None,
) -> MaskedLosses:
    """Return the cross-entropies at the loss positions, and their weighted sum with gradient.

    The hidden states are gathered first, so logits exist only where there is a loss, and only a chunk at a time.

    Args:
        hidden_BSD: after the final layer norm.
        words_VD: the tied output matrix; the softmax runs over its rows.
        labels_BS: int64, below V wherever the loss counts.
        loss_mask_BS: bool.
        loss_weights_BS: w, float32; 1 by default.
    """
    hidden_PD, labels_P = hidden_BSD[loss_mask_BS], labels_BS[loss_mask_BS]
    if loss_weights_BS is None:
        weights_P = torch.ones(len(labels_P), device=labels_P.device)
    else:
        weights_P = loss_weights_BS[loss_mask_BS].float()
    total, losses_P = weighted_cross_entropy(hidden_PD, words_VD, labels_P, weights_P)
    return MaskedLosses(total, losses_P, labels_P, weights_P)


def coglm_loss(
    hidden_BSD: torch.Tensor,
    words_VD: torch.Tensor,
    labels_BS: torch.Tensor,
    loss_mask_BS: torch.Tensor,
    ranges: LabelRanges,
    loss_weights_BS: torch.Tensor | None = None,
    mass: float | torch.Tensor | None = None,
) -> LossParts:
    """Return sum(w CE) / mass over the loss positions of the micro batch, and its split.

    Args:
        hidden_BSD, words_VD, labels_BS, loss_mask_BS: see masked_cross_entropy.
        ranges: the kinds of labels; their sums and counts are without weights.
        loss_weights_BS: w, float32, above 0 wherever the loss counts; 1 by default.
        mass: what the sum is divided by, see training/normalisation.py; by default the micro batch's own sum(w).
    """
    weighted, losses_P, labels_P, weights_P = masked_cross_entropy(
        hidden_BSD, words_VD, labels_BS, loss_mask_BS, loss_weights_BS
    )
    total = torch.as_tensor(weights_P.sum() if mass is None else mass, dtype=torch.float32)
    # The bound only matters without any loss position: then it makes 0 / 0 a 0.
    loss = weighted / total.clamp(min=torch.finfo(torch.float32).tiny)
    with torch.no_grad():
        kinds = torch.stack([(labels_P >= low) & (labels_P < high) for _, (low, high) in ranges.items()])
        weights = kinds.to(losses_P.dtype)
        return LossParts(loss, (weights * losses_P).sum(1), weights.sum(1))
