"""The training loop. `Trainer.train_step` is one optimizer update, whatever the model and the parallelism."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from cogview2.pipeline.config.training import TrainConfig
from cogview2.pipeline.data.sample_plan import DataState, SamplePlan
from cogview2.pipeline.distributed.process import World
from cogview2.pipeline.errors import NumericError, Preempted
from cogview2.pipeline.stage_dir import StageDirectory
from cogview2.pipeline.training.checkpoint import Checkpointer
from cogview2.pipeline.training.engine import TrainingEngine
from cogview2.pipeline.training.metrics import MetricsWriter, sum_over_ranks
from cogview2.pipeline.training.preemption import StopFlag
from cogview2.pipeline.training.schedules import learning_rate

logger = logging.getLogger(__name__)
_HEARTBEAT_SECONDS = 2.0


class StepBatches(Protocol):
    """The micro batches of any step for this data-parallel rank; a pure function of the step."""

    plan: SamplePlan
    dataset_sha256: str

    def step(self, step: int) -> list[Any]:
        """Return the micro batches of update `step`, from 0."""


SampleCallback = Callable[[int, MetricsWriter | None], None]
"""Called on all ranks with the number of updates done, and the writer on rank 0: draws pictures on the way."""


@dataclass(frozen=True)
class FitResult:
    """What training ended with."""

    step: int
    loss: float | None
    resumed_from: int


class Trainer:
    """Trains one model from its newest checkpoint, or from step 0, to its last step."""

    def __init__(
        self,
        *,
        engine: TrainingEngine,
        batches: StepBatches,
        train: TrainConfig,
        stage: StageDirectory,
        fingerprint: str,
        world: World,
        stop: StopFlag,
        on_sample: SampleCallback | None = None,
        unit: str = "samples/s",
    ) -> None:
        self.engine, self.batches, self.train, self.stage = engine, batches, train, stage
        self.world, self.stop, self.on_sample, self.unit = world, stop, on_sample, unit
        self.checkpointer = Checkpointer(stage.checkpoints, world, fingerprint, train.checkpoint.keep_last)
        self._sums = torch.zeros(len(engine.metric_names) + 1)
        self._counts = torch.zeros(len(engine.metric_names) + 1)
        self._logged_at = (0, time.monotonic())
        self._data_wait = 0.0
        self._beat_at = -math.inf
        self._loss: float | None = None

    def fit(self) -> FitResult:
        """Train to the end.

        Raises:
            Preempted: a signal asked to stop; the state is committed.
            NumericError: the loss is not finite.
        """
        restored = self.checkpointer.restore(self.engine)
        first = 0
        if restored is not None:
            restored.data.check(self.batches.plan, self.batches.dataset_sha256)
            first = restored.step
            self._sums, self._counts = restored.meters.unbind()
        writer = (
            MetricsWriter(self.stage.metrics, self.stage.tensorboard, first) if self.world.is_first else None
        )
        self._logged_at = (first, time.monotonic())
        try:
            for step in range(first, self.train.steps):
                extra, must_stop = self.train_step(step)
                self._after_step(step + 1, extra, must_stop, writer)
        finally:
            if writer is not None:
                writer.close()
        return FitResult(self.train.steps, self._loss, first)

    def train_step(self, step: int) -> tuple[dict[str, float], bool]:
        """Make update `step` (from 0): read, forward, backward, clip, update; then agree with all ranks.

        Returns:
            Further numbers to log, and whether any rank was asked to stop.
        """
        waited = time.monotonic()
        micro_batches = self.batches.step(step)
        self._data_wait += time.monotonic() - waited
        rate = learning_rate(step, self.train.steps, self.train.optimizer)
        output = self.engine.train_step(step, micro_batches, rate)
        # One small reduction a step: the loss is judged, and a signal heeded, on all ranks at the same step.
        together = sum_over_ranks(torch.tensor([output.loss, float(self.stop.is_set)], dtype=torch.float64))
        self._loss = float(together[0]) / self.world.size
        if not math.isfinite(self._loss):
            raise NumericError(
                f"the loss of step {step + 1} is {self._loss}; lower train.optimizer.learning_rate"
            )
        self._sums += torch.cat([output.sums, torch.tensor([output.loss])])
        self._counts += torch.cat([output.counts, torch.ones(1)])
        return output.extra | {"learning_rate": rate}, bool(together[1] > 0)

    def _after_step(
        self, done: int, extra: dict[str, float], must_stop: bool, writer: MetricsWriter | None
    ) -> None:
        last = done == self.train.steps
        if done % self.train.log_every == 0 or last:
            self._log(done, extra, writer)
        elif self.world.is_first:
            self._beat(done)
        every = self.train.sample_every
        if self.on_sample is not None and (last or (every and done % every == 0)):
            self.on_sample(done, writer)
        if must_stop or last or done % self.train.checkpoint.every_steps == 0:
            consumed = done * self.train.global_batch
            data = DataState.at(self.batches.plan, self.batches.dataset_sha256, consumed)
            self.checkpointer.save(self.engine, done, data, torch.stack([self._sums, self._counts]))
        if must_stop and not last:
            raise Preempted(
                f"stopped by {self.stop.reason} after step {done}, which is saved; the same command goes on from there"
            )

    def _log(self, done: int, extra: dict[str, float], writer: MetricsWriter | None) -> None:
        """Reduce and write the means since the last log. Collective."""
        totals = sum_over_ranks(torch.stack([self._sums, self._counts]))
        means = (totals[0] / totals[1].clamp(min=1e-12)).tolist()
        seconds = max(time.monotonic() - self._logged_at[1], 1e-9)
        steps = done - self._logged_at[0]
        values = {"loss": means[-1]}
        values |= {
            f"loss_{name}": means[i] for i, name in enumerate(self.engine.metric_names) if totals[1][i] > 0
        }
        norm = self.engine.grad_norm()
        values |= {} if norm is None else {"grad_norm": norm}
        values |= extra | {
            "samples_per_second": steps * self.train.global_batch / seconds,
            "data_wait": self._data_wait / seconds,
        }
        self._sums.zero_()
        self._counts.zero_()
        self._data_wait = 0.0
        self._logged_at = (done, time.monotonic())
        if writer is not None:
            writer.scalars(done, values)
            shown = " ".join(f"{name} {value:.4g}" for name, value in values.items())
            logger.info("step %d/%d %s", done, self.train.steps, shown)
            self._write_beat(done, values["loss"], values["samples_per_second"])

    def _beat(self, done: int) -> None:
        if time.monotonic() - self._beat_at >= _HEARTBEAT_SECONDS:
            seconds = max(time.monotonic() - self._logged_at[1], 1e-9)
            self._write_beat(
                done, self._loss, (done - self._logged_at[0]) * self.train.global_batch / seconds
            )

    def _write_beat(self, done: int, loss: float | None, throughput: float) -> None:
        self._beat_at = time.monotonic()
        left = (self.train.steps - done) * self.train.global_batch / max(throughput, 1e-9)
        self.stage.write_heartbeat(
            done, self.train.steps, loss=loss, throughput=throughput, unit=self.unit, eta_seconds=left
        )
