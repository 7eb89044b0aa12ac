"""Tiny training runs in which chosen batches give numbers that are not finite, or a loss that jumps."""

import json
from pathlib import Path
from typing import Any

import torch
from forked_ranks import plain
from torch import nn

from cogview2.pipeline.config.deepspeed import resolve
from cogview2.pipeline.config.model import CogLMConfig
from cogview2.pipeline.config.training import TrainConfig
from cogview2.pipeline.data.sample_plan import SamplePlan, rank_slice
from cogview2.pipeline.distributed.process import World
from cogview2.pipeline.errors import CogView2Error
from cogview2.pipeline.models.coglm import pipe
from cogview2.pipeline.models.coglm.loss import LossParts
from cogview2.pipeline.models.coglm.masks import IMAGE
from cogview2.pipeline.stage_dir import StageDirectory
from cogview2.pipeline.tokenizers.vocabulary import Vocabulary
from cogview2.pipeline.training.checkpoint import Checkpointer
from cogview2.pipeline.training.engine import PlainEngine, TrainingEngine
from cogview2.pipeline.training.modules import Batch, LossOutput, TrainModule
from cogview2.pipeline.training.preemption import StopFlag
from cogview2.pipeline.training.state.identity import Identity
from cogview2.pipeline.training.state.manifest import Topology
from cogview2.pipeline.training.train_modules.coglm import coglm_engine
from cogview2.pipeline.training.trainer import Trainer

GLOBAL_BATCH, ACCUMULATION = 8, 2
KINDS = ("zero0", "zero1", "pipe")
"""Two data-parallel ranks without and with ZeRO 1; two pipe stages with ZeRO 1."""
Fault = tuple[str, float]
"""("loss", x): x is added to the loss, whose gradient stays as it is. ("gradient", x): multiplies the gradient."""
FAULT_LABELS = {28: float("inf"), 29: 100.0}
"""Labels of a pipeline's batch that add so much to its loss."""
_PIPE = CogLMConfig(
    layers=2, hidden=32, heads=2, dropout=0.1, max_positions=40, text_length=8, image_position=20
)


class Model(TrainModule):
    """A linear model with dropout, which does with loss and gradient what the batch says, and counts its updates."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(8, 8)
        self.model.register_buffer("updates", torch.zeros(()))

    def forward(self, batch: Batch) -> LossOutput:
        out = nn.functional.dropout(self.model(batch["x"]), 0.1, self.training)
        out.register_hook(lambda gradient: gradient * batch["gradient"].amax())
        loss = (out - batch["x"].flip(1)).square().mean() + batch["loss"].amax()
        return LossOutput(loss, torch.zeros(0), torch.zeros(0))

    def end_step(self, step: int) -> dict[str, float]:
        self.model.updates += 1
        return {}


class Batches:
    """Samples numbered by a plan; a faulty batch is faulty on the last data-parallel rank only."""

    def __init__(self, engine: TrainingEngine, faults: dict[int, Fault]) -> None:
        self.plan, self.dataset_sha256 = SamplePlan([48], 3), "0" * 64
        self._rank, self._size, self._faults = engine.data_rank, engine.data_size, faults
        self._make = self._tokens if hasattr(engine, "model_config") else self._vectors
        self.read: list[int] = []

    def _indices(self, number: int) -> list[int]:
        mine = rank_slice(number, GLOBAL_BATCH, self._rank, self._size)
        return [index for _, index in self.plan.positions(mine.start, len(mine))]

    def keys(self, number: int) -> list[str]:
        return [f"sample{index}" for index in self._indices(number)]

    def step(self, number: int) -> list[Batch]:
        self.read.append(number)
        fault = self._faults.get(number) if self._rank == self._size - 1 else None
        samples = [self._make(index, fault) for index in self._indices(number)]
        size = len(samples) // ACCUMULATION
        parts = [samples[first : first + size] for first in range(0, len(samples), size)]
        return [{name: torch.stack([s[name] for s in part]) for name in part[0]} for part in parts]

    @staticmethod
    def _vectors(index: int, fault: Fault | None) -> Batch:
        x = torch.randn(8, generator=torch.Generator().manual_seed(index))
        told = {"loss": 0.0, "gradient": 1.0} | dict([fault] if fault else [])
        return {"x": x} | {name: torch.tensor(value) for name, value in told.items()}

    @staticmethod
    def _tokens(index: int, fault: Fault | None) -> Batch:
        tokens = torch.randint(0, 28, (28,), generator=torch.Generator().manual_seed(index))
        labels, weights = tokens[1:].clone(), torch.ones(27)
        if fault is not None and fault[0] == "gradient":
            weights[3] = fault[1]
        elif fault is not None:
            labels[3] = next(label for label, value in FAULT_LABELS.items() if value == fault[1])
        return {
            "tokens": tokens[:-1],
            "position_ids": torch.arange(27),
            "roles": torch.full((27,), IMAGE),
            "labels": labels,
            "loss_mask": torch.ones(27, dtype=torch.bool),
            "loss_weights": weights,
        }


_true_loss = pipe.coglm_loss


def _told_loss(hidden: Any, words: Any, labels: torch.Tensor, *rest: Any) -> LossParts:
    parts = _true_loss(hidden, words, labels.clamp(max=27), *rest)
    added = sum(value for label, value in FAULT_LABELS.items() if bool((labels == label).any()))
    return parts._replace(loss=parts.loss + added)


class StopAfter(StopFlag):
    """Asks to stop as soon as so many batches were read."""

    def __init__(self, batches: Batches, reads: int | None) -> None:
        super().__init__()
        self._batches, self._reads = batches, reads

    @property
    def is_set(self) -> bool:
        return self._reads is not None and len(self._batches.read) >= self._reads


def settings(
    folder: Path, kind: str, every: int = 2, *, asynchronous: bool = False, **health: Any
) -> TrainConfig:
    """Return the section `train` of a run of 8 steps that logs each of them and saves every `every` steps."""
    stages = 2 if kind == "pipe" else 1
    path = folder / f"{kind}.json"
    content = {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH * stages // (2 * ACCUMULATION),
        "zero_optimization": {"stage": 0 if kind == "zero0" else 1},
    }
    if not path.exists():
        path.write_text(json.dumps(content))
    return TrainConfig.model_validate(
        {
            "steps": 8,
            "global_batch": GLOBAL_BATCH,
            "log_every": 1,
            "deepspeed": str(path),
            "pipeline_parallel": stages,
            "optimizer": {"learning_rate": 1e-2, "schedule": "constant"},
            "checkpoint": {"every_steps": every, "asynchronous": asynchronous},
            "health": health,
        }
    )


def _engine(kind: str, train: TrainConfig, world: World) -> TrainingEngine:
    how = resolve(train.deepspeed, train, world.size, cpu=True)
    if kind == "pipe":
        pipe.coglm_loss = _told_loss  # a fork's own module
        return coglm_engine(_PIPE, Vocabulary.uniform(30, 27), train, how, (0, 3, 6), world, 0)
    torch.manual_seed(0)
    return PlainEngine(Model(), how, train.optimizer, world)


def fit(
    kind: str,
    train: TrainConfig,
    stage: StageDirectory,
    faults: dict[int, Fault],
    rank: int,
    reads: int | None = None,
) -> dict[str, Any]:
    """Train on this one of two ranks; a second call with the same stage goes on.

    Args:
        kind: of `KINDS`.
        train: of `settings`.
        stage: where.
        faults: number of a batch -> what it does.
        rank: of this process.
        reads: ask to stop after so many batches, on rank 1 alone.

    Returns:
        error, the numbers of the batches that were read, the weights (rank 0), the steps that have a checkpoint, and the
        samples consumed by the newest one.
    """
    world = World(rank, 2, rank, torch.device("cpu"))
    engine = _engine(kind, train, world)
    torch.manual_seed(100 + rank)
    topology = Topology(2, train.pipeline_parallel, 0 if kind == "zero0" else 1, "float32")
    batches = Batches(engine, faults)
    trainer = Trainer(
        engine=engine,
        batches=batches,
        train=train,
        stage=stage,
        checkpointer=Checkpointer(stage.checkpoints, world, Identity("f"), topology, train.checkpoint),
        world=world,
        stop=StopAfter(batches, reads if rank == 1 else None),
    )
    error = ""
    try:
        trainer.fit()
    except CogView2Error as caught:
        error = f"{type(caught).__name__}: {caught}"
    state = engine.full_state() or {}
    kept = {name: value.detach().clone() for name, value in state.items()}
    engine.close()
    steps = sorted(int(path.name.removeprefix("step_")) for path in stage.checkpoints.glob("step_*"))
    data = stage.checkpoints / f"step_{steps[-1] if steps else 0:09d}" / "data_state.json"
    consumed = json.loads(data.read_text())["samples_consumed"] if steps else 0
    return {
        "error": [error],
        "read": batches.read,
        "state": plain(kept),
        "saved": steps,
        "consumed": consumed,
    }


def lines(stage: StageDirectory) -> list[tuple[int, str]]:
    """Return step and loss, as hex, of each line of metrics.jsonl."""
    found = [json.loads(line) for line in stage.metrics.read_text().splitlines()]
    return [(line["step"], float(line["loss"]).hex()) for line in found]
