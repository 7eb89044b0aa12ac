"""Training of CogLM, plain and as a pipeline (spec 2.6)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cogview2.pipeline.config.deepspeed import weights_dtype
from cogview2.pipeline.config.model import CogLMConfig
from cogview2.pipeline.config.training import TrainConfig
from cogview2.pipeline.distributed.process import World
from cogview2.pipeline.models.coglm.loss import PART_NAMES, LabelRanges, coglm_loss
from cogview2.pipeline.models.coglm.model import CogLM
from cogview2.pipeline.models.coglm.visibility import Visibility
from cogview2.pipeline.tokenizers.vocabulary import Vocabulary
from cogview2.pipeline.training.engine import DeepSpeedConfig, PipeEngine, PlainEngine, TrainingEngine
from cogview2.pipeline.training.modules import Batch, LossOutput, TrainModule
from cogview2.pipeline.training.normalisation import mean_mass, weight_mass
from cogview2.pipeline.weights.files import load_model, load_weights


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
        self._mass: torch.Tensor | None = None

    def begin_step(self, step: int, micro_batches: list[Batch]) -> None:
        """Add up the loss weights of the global batch, over which the loss is a mean."""
        self._mass = mean_mass(
            weight_mass(batch["loss_mask"], batch["loss_weights"]) for batch in micro_batches
        )

    def forward(self, batch: Batch) -> LossOutput:
        """Return the weighted cross-entropy of the loss positions, as a share of the global batch's mean."""
        model = self.model
        hidden_BSD = model(batch["tokens"], batch["position_ids"], Visibility(batch["roles"]))
        words_VD = model.transformer.word_embeddings.weight
        labels_BS, loss_mask_BS, weights_BS = batch["labels"], batch["loss_mask"], batch["loss_weights"]
        parts = coglm_loss(
            hidden_BSD, words_VD, labels_BS, loss_mask_BS, self._ranges, weights_BS, self._mass
        )
        return LossOutput(parts.loss, parts.sums, parts.counts)


def coglm_engine(
    config: CogLMConfig,
    vocabulary: Vocabulary,
    train: TrainConfig,
    deepspeed: DeepSpeedConfig,
    bounds: Sequence[int],
    world: World,
    seed: int,
    start: Path | None = None,
) -> TrainingEngine:
    """Return CogLM ready to train: plain, or this rank's pipe stage. The same weights whatever the parallelism.

    Args:
        config: sizes.
        vocabulary: rows of the embedding and ranges of the loss.
        train: optimizer and pipe stages.
        deepspeed: resolved configuration.
        bounds: of the pipe stages, see config/partition.py; only looked at when there are several.
        world: this rank among the others.
        seed: of the fresh weights.
        start: weights file to start from, of a run or imported; without one the weights are fresh.
    """
    if train.pipeline_parallel > 1:
        module = _pipe_module(config, vocabulary, bounds, deepspeed["pipeline"], seed)
        if start is not None:
            from cogview2.pipeline.models.coglm.pipe import load_plain_state

            load_plain_state(module, load_weights(start), config)
        return PipeEngine(module, deepspeed, train.optimizer, config)
    plain = _plain_module(config, vocabulary, deepspeed, world, seed, start)
    return PlainEngine(plain, deepspeed, train.optimizer, world)


def _plain_module(
    config: CogLMConfig,
    vocabulary: Vocabulary,
    deepspeed: DeepSpeedConfig,
    world: World,
    seed: int,
    start: Path | None,
) -> CogLMTrainModule:
    """Build the model on its device in the type of its weights: the host never holds all of it.

    Nothing is lost by rounding so early: DeepSpeed makes its float32 masters from the rounded weights in any case.
    """
    from cogview2.pipeline.models.coglm.pipe import init_as_pipe

    dtype = getattr(torch, weights_dtype(deepspeed))
    with torch.device("meta"):
        module = CogLMTrainModule(config, vocabulary, "activation_checkpointing" in deepspeed)
    if start is None:
        init_as_pipe(module.model, seed, world.device, dtype)
        return module
    loaded = load_model(
        lambda: CogLM(config, vocabulary.rows), start, device=world.device, dtype=dtype
    ).train()
    for name, parameter in loaded.named_parameters():
        owner, _, own = name.rpartition(".")
        # Copied: what is not converted is still a map of the file, which may be replaced while training goes on.
        module.model.get_submodule(owner).register_parameter(
            own, torch.nn.Parameter(parameter.detach().clone())
        )
    return module


def _pipe_module(
    config: CogLMConfig,
    vocabulary: Vocabulary,
    bounds: Sequence[int],
    pipeline: DeepSpeedConfig,
    seed: int,
) -> Any:
    from cogview2.pipeline.models.coglm.pipe import PipeLoss, build_pipeline_module

    return build_pipeline_module(
        config,
        vocabulary.rows,
        len(bounds) - 1,
        PipeLoss(label_ranges(vocabulary)),
        bounds=bounds,
        activation_checkpoint_interval=pipeline["activation_checkpoint_interval"],
        init_seed=seed,
    )
