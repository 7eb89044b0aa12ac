"""How long and how fast a network is trained: everything that is not the DeepSpeed JSON's business."""

from typing import Annotated, Literal

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


class TrainConfig(Config):
    """One training run."""

    steps: Positive
    """Optimizer updates."""
    global_batch: Positive
    """Samples per step over all ranks. Gradient accumulation is derived from it."""
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
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
