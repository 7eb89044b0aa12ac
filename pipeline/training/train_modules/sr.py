"""Training of direct and iterative super-resolution (spec 4.4, 5.2)."""

import torch

from cogview2.pipeline.models.coglm.loss import masked_cross_entropy
from cogview2.pipeline.models.sr.direct import DirectSR
from cogview2.pipeline.models.sr.iterative import IterativeSR
from cogview2.pipeline.models.sr.layout import level0_mask
from cogview2.pipeline.tokenizers.vocabulary import Vocabulary
from cogview2.pipeline.training.modules import Batch, LossOutput, TrainModule
from cogview2.pipeline.training.normalisation import mean_mass, weight_mass


class _SuperresTrainModule(TrainModule):
    """Batches: tokens, position_ids, roles (1 at real text), labels int64 [B, S]; loss_mask bool [B, S]."""

    model: DirectSR | IterativeSR
    metric_names = ("codes", "above_half")
    """Cross-entropy, and the share of codes given a probability above one half."""

    def __init__(self, model: DirectSR | IterativeSR, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.model = model
        self._image_codes = vocabulary.image_codes
        self._mass: torch.Tensor | None = None

    def begin_step(self, step: int, micro_batches: list[Batch]) -> None:
        """Count the masked cells of the global batch, over which the loss is a mean."""
        self._mass = mean_mass(weight_mass(batch["loss_mask"]) for batch in micro_batches)

    def _hidden(self, batch: Batch) -> torch.Tensor:
        raise TypeError(f"{type(self).__name__} does not define _hidden")

    def forward(self, batch: Batch) -> LossOutput:
        """Return the cross-entropy of the masked cells over the image codes, as a share of the global batch's mean."""
        hidden_BSD = self._hidden(batch)
        words_VD = self.model.transformer.word_embeddings.weight[: self._image_codes]
        total, losses_P, *_ = masked_cross_entropy(hidden_BSD, words_VD, batch["labels"], batch["loss_mask"])
        count = torch.tensor(float(losses_P.numel()), device=losses_P.device)
        likely = (losses_P < 0.6931).float().sum()  # probability above one half
        sums = torch.stack([losses_P.sum(), likely])
        return LossOutput(
            total / (count if self._mass is None else self._mass), sums, torch.stack([count, count])
        )


class DirectSRTrainModule(_SuperresTrainModule):
    """All high-resolution codes from text and base codes."""

    model: DirectSR

    def _hidden(self, batch: Batch) -> torch.Tensor:
        text_BL = batch["roles"][:, : self.model.config.text_length].bool()
        mask = level0_mask(text_BL, self.model.base_grid**2)
        return self.model(batch["tokens"], batch["position_ids"], mask)


class IterativeSRTrainModule(_SuperresTrainModule):
    """Masked high-resolution codes from their neighbourhood and text."""

    model: IterativeSR

    def _hidden(self, batch: Batch) -> torch.Tensor:
        return self.model(
            batch["tokens"], batch["position_ids"], batch["roles"][:, : self.model.config.text_length].bool()
        )
