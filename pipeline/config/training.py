"""How long and how fast a network is trained: everything that is not the DeepSpeed JSON's business."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from cogview2.pipeline.config.base import Config

Positive = Annotated[int, Field(ge=1)]


class OptimizerConfig(Config):
    """The optimizer and its schedule (spec 2.7)."""

    kind: Literal["adamw", "muon"] = "adamw"
    """adamw as published. muon: Muon on the matrices of linear layers and convolutions, AdamW on the rest, at the same
    learning rate; small networks need half of the steps or fewer. It needs ZeRO stage 0."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    final_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Learning rate at the last step / peak."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Not applied to biases, layer norms and embeddings."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    gradient_clipping: Annotated[float, Field(gt=0)] = 1.0


class CheckpointConfig(Config):
    """When the full state is committed, and how many are kept."""

    every_steps: Positive = 1000
    keep_last: Annotated[int, Field(ge=2)] = 2
    """At least two: the newest may turn out damaged."""
    keep_every: Annotated[int, Field(ge=0)] = 0
    """Checkpoints of steps that are multiples of it are never deleted; 0 keeps none for ever."""
    asynchronous: bool = False
    """Go on training while a copy of the state is written: costs the memory of the copy. The commit is the same, some steps
    later; what is lost by a kill before it is what was trained since the commit before."""


class HealthConfig(Config):
    """What happens when numbers are not finite, or the loss jumps; judged on all ranks together (docs/training.md)."""

    on_not_finite: Literal["stop", "skip", "rewind"] = "stop"
    """A loss or gradients with NaN or infinity. skip: the step counts, its update is applied nowhere. rewind: back to the last
    checkpoint, and on without the batch that did it."""
    max_skipped: Positive = 3
    """Steps skipped in a row, or batches left out since the last checkpoint; one more stops."""
    spike_sigma: Annotated[float, Field(ge=0)] = 8.0
    """A loss is a spike so many standard deviations above the mean of the last 100; 0 looks for none."""
    on_spike: Literal["log", "rewind"] = "log"
    """rewind: as above; before the first checkpoint a spike is only logged."""

    @model_validator(mode="after")
    def _spikes(self) -> "HealthConfig":
        if self.on_spike == "rewind" and not self.spike_sigma:
            raise ValueError("on_spike rewind needs a spike_sigma above 0; set it, or on_spike to log")
        return self


class TrainConfig(Config):
    """One training run."""

    HOW: ClassVar = frozenset(
        ("deepspeed", "pipeline_parallel", "checkpoint", "log_every", "sample_every", "health")
    )
    """How it is computed, watched and kept, not what comes out: a run goes on when these change."""

    steps: Positive
    """Optimizer updates."""
    global_batch: Positive
    """Samples per step over all ranks. Gradient accumulation is derived from it."""
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    health: HealthConfig = HealthConfig()
    log_every: Positive = 10
    sample_every: Annotated[int, Field(ge=0)] = 0
    """Steps between image grids in TensorBoard; 0 draws only the last."""
    deepspeed: str
    """Name of a file in ds_configs/ or path of a JSON."""
    pipeline_parallel: Positive = 1
    """Pipe stages."""

    @model_validator(mode="after")
    def _warmup(self) -> "TrainConfig":
        if self.optimizer.warmup_steps > self.steps:
            raise ValueError(
                f"optimizer.warmup_steps {self.optimizer.warmup_steps} is above steps {self.steps}"
            )
        return self


def identity(section: Any) -> Any:
    """Return the plain values of a recipe's section without `TrainConfig.HOW`: what its result depends on."""
    if not isinstance(section, Config):
        return section
    plain = section.model_dump(mode="json")
    if isinstance(section, TrainConfig):
        return {key: value for key, value in plain.items() if key not in TrainConfig.HOW}
    if isinstance(getattr(section, "train", None), TrainConfig):
        plain["train"] = identity(section.train)  # type: ignore[attr-defined]  # looked at above
    return plain
