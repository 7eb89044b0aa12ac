"""The training loop. `Trainer.train_step` is one optimizer update, whatever the model and the parallelism."""

import logging
import math
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from cogview2.pipeline.attempt import note_step
from cogview2.pipeline.config.training import TrainConfig
from cogview2.pipeline.data.sample_plan import DataState, SamplePlan
from cogview2.pipeline.distributed.process import World, gather_objects
from cogview2.pipeline.errors import NumericError, Preempted
from cogview2.pipeline.stage_dir import StageDirectory
from cogview2.pipeline.training.checkpoint import Checkpointer
from cogview2.pipeline.training.engine import TrainingEngine
from cogview2.pipeline.training.meters import ForwardClock, StepMeter, Work, peak_memory_bytes
from cogview2.pipeline.training.metrics import MetricsWriter, gather_rows, sum_over_ranks
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
        work: Work | None = None,
    ) -> None:
        """Set up; collective.

        Args:
            engine: trains.
            batches: what it trains on.
            train: steps, schedule, checkpoints.
            stage: where everything is written.
            fingerprint: of the settings; checkpoints of another one are refused.
            world: this rank among the others.
            stop: set by a signal.
            on_sample: draws on the way.
            work: what a sample costs, for the meters; without it they show samples alone.
        """
        self.engine, self.batches, self.train, self.stage = engine, batches, train, stage
        self.world, self.stop, self.on_sample = world, stop, on_sample
        self.checkpointer = Checkpointer(stage.checkpoints, world, fingerprint, train.checkpoint.keep_last)
        self._sums = torch.zeros(len(engine.metric_names) + 1)
        self._counts = torch.zeros(len(engine.metric_names) + 1)
        self._clock = ForwardClock(engine.module, world.device)
        self._meter = StepMeter(work or Work(), train.global_batch, gather_objects(socket.gethostname()))
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
        try:
            for step in range(first, self.train.steps):
                note_step(step + 1)
                extra, must_stop = self.train_step(step)
                self._after_step(step + 1, extra, must_stop, writer)
        finally:
            self._clock.close()
            if writer is not None:
                writer.close()
        return FitResult(self.train.steps, self._loss, first)

    def train_step(self, step: int) -> tuple[dict[str, float], bool]:
        """Make update `step` (from 0): read, forward, backward, clip, update; then agree with all ranks.

        Returns:
            Further numbers to log, and whether any rank was asked to stop.
        """
        begin = time.monotonic()
        micro_batches = self.batches.step(step) if self.engine.needs_data else []
        reading = time.monotonic() - begin
        rate = learning_rate(step, self.train.steps, self.train.optimizer)
        output = self.engine.train_step(step, micro_batches, rate)
        row = [output.loss, float(self.stop.is_set), reading, self._clock.take()]
        row.append(float(peak_memory_bytes(self.world.device)))
        # One small exchange a step: the loss is judged, a signal heeded, and the ranks are compared.
        losses, stops, reads, forwards, peaks = gather_rows(torch.tensor(row, dtype=torch.float64)).T.tolist()
        self._meter.add(time.monotonic() - begin, reads, forwards, max(peaks))
        self._loss = sum(losses) / len(losses)
        if not math.isfinite(self._loss):
            raise NumericError(
                f"the loss of step {step + 1} is {self._loss}; lower train.optimizer.learning_rate"
            )
        self._sums += torch.cat([output.sums, torch.tensor([output.loss])])
        self._counts += torch.cat([output.counts, torch.ones(1)])
        return output.extra | {"learning_rate": rate}, any(stops)

    def _after_step(
        self, done: int, extra: dict[str, float], must_stop: bool, writer: MetricsWriter | None
    ) -> None:
        last = done == self.train.steps
        if done % self.train.log_every == 0 or last:
            self._log(done, extra, writer)
        elif self.world.is_first and time.monotonic() - self._beat_at >= _HEARTBEAT_SECONDS:
            self._beat(done, self._loss)
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
        values = {"loss": means[-1]}
        values |= {
            f"loss_{name}": means[i] for i, name in enumerate(self.engine.metric_names) if totals[1][i] > 0
        }
        norm = self.engine.grad_norm()
        values |= {} if norm is None else {"grad_norm": norm}
        values |= extra | self._meter.values(self.train.steps - done)
        slowest = self._meter.slowest()
        self._sums.zero_()
        self._counts.zero_()
        if writer is not None:
            writer.scalars(done, values, {"slowest": slowest.name} if slowest is not None else {})
            shown = " ".join(f"{name} {value:.4g}" for name, value in values.items())
            slow = f" slowest {slowest.name}" if slowest is not None else ""
            logger.info("step %d/%d %s%s", done, self.train.steps, shown, slow)
            self._beat(done, values["loss"])
        self._meter.restart()

    def _beat(self, done: int, loss: float | None) -> None:
        self._beat_at = time.monotonic()
        values, slowest = self._meter.values(self.train.steps - done), self._meter.slowest()
        throughput, unit = self._meter.rate(values)
        self.stage.write_heartbeat(
            done,
            self.train.steps,
            loss=loss,
            throughput=throughput,
            unit=unit,
            eta_seconds=values.get("eta_seconds"),
            meters=values,
            slowest=slowest.name if slowest is not None else None,
        )
