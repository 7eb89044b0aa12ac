"""Training of CogLM, plain and as a pipeline (spec 2.6)."""

from typing import Any

from cogview2.pipeline.config.model import CogLMConfig
from cogview2.pipeline.models.coglm.loss import PART_NAMES, LabelRanges, coglm_loss
from cogview2.pipeline.models.coglm.masks import attention_mask
from cogview2.pipeline.models.coglm.model import CogLM
from cogview2.pipeline.tokenizers.vocabulary import Vocabulary
from cogview2.pipeline.training.modules import Batch, LossOutput, TrainModule


def label_ranges(vocabulary: Vocabulary) -> LabelRanges:
    """Return the id ranges by which the loss is split."""
    return LabelRanges((0, vocabulary.image_codes), vocabulary.english, vocabulary.chinese)


class CogLMTrainModule(TrainModule):
    """Batches: tokens, position_ids, roles, labels int64 [B, S]; loss_mask bool, loss_weights float32 [B, S]."""

    model: CogLM
    metric_names = PART_NAMES

    def __init__(
        self, config: CogLMConfig, vocabulary: Vocabulary, activation_checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.model = CogLM(config, vocabulary.rows)
        self.model.transformer.activation_checkpointing = activation_checkpointing
        self._ranges = label_ranges(vocabulary)

    def forward(self, batch: Batch) -> LossOutput:
        """Return the weighted mean cross-entropy of the loss positions; the mask is built here, on the device."""
        model = self.model
        hidden_BSD = model(batch["tokens"], batch["position_ids"], attention_mask(batch["roles"]))
        words_VD = model.transformer.word_embeddings.weight
        labels_BS, loss_mask_BS, weights_BS = batch["labels"], batch["loss_mask"], batch["loss_weights"]
        parts = coglm_loss(hidden_BSD, words_VD, labels_BS, loss_mask_BS, self._ranges, weights_BS)
        return LossOutput(parts.loss, parts.sums, parts.counts)


def pipe_module(
    config: CogLMConfig, vocabulary: Vocabulary, stages: int, pipeline: dict[str, Any], seed: int
) -> Any:
    """Return this rank's share of CogLM as a PipelineModule with `stages` pipe stages.

    Args:
        config: sizes.
        vocabulary: rows of the embedding and ranges of the loss.
        stages: pipe stages.
        pipeline: the `pipeline` section of the resolved DeepSpeed configuration.
        seed: of the fresh weights.
    """
    from cogview2.pipeline.models.coglm.pipe import PipeLoss, build_pipeline_module

    return build_pipeline_module(
        config,
        vocabulary.rows,
        stages,
        PipeLoss(label_ranges(vocabulary)),
        activation_checkpoint_interval=pipeline["activation_checkpoint_interval"],
        partition_method=pipeline["partition"],
        init_seed=seed,
    )
