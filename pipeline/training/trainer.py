"""The training loop. `Trainer.train_step` is one optimizer update, whatever the model and the parallelism."""

import logging
import math
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from cogview2.pipeline import fsops
from cogview2.pipeline.attempt import note_step
from cogview2.pipeline.config.training import TrainConfig
from cogview2.pipeline.data.sample_plan import DataState, SamplePlan
from cogview2.pipeline.data.skipped_batches import FILE, SkippedBatch, SkippedBatches
from cogview2.pipeline.distributed import watchdog
from cogview2.pipeline.distributed.process import World, gather_objects
from cogview2.pipeline.distributed.together import on_first
from cogview2.pipeline.errors import NumericError, Preempted
from cogview2.pipeline.stage_dir import StageDirectory
from cogview2.pipeline.training.checkpoint import Checkpointer
from cogview2.pipeline.training.engine import TrainingEngine
from cogview2.pipeline.training.health import Health, Trouble
from cogview2.pipeline.training.meters import ForwardClock, StepMeter, Work, peak_memory_bytes
from cogview2.pipeline.training.metrics import MetricsWriter, gather_rows, sum_over_ranks
from cogview2.pipeline.training.preemption import StopFlag
from cogview2.pipeline.training.schedules import learning_rate

logger = logging.getLogger(__name__)
_HEARTBEAT_SECONDS = 2.0
_NAMED_SAMPLES = 32
"""So many keys of a batch are said in the log; skipped_batches.json has all."""
_REMEDY = "lower train.optimizer.learning_rate"


class StepBatches(Protocol):
    """The micro batches of any batch for this data-parallel rank; a pure function of its number."""

    plan: SamplePlan
    dataset_sha256: str

    def step(self, step: int) -> list[Any]:
        """Return the micro batches of batch `step`, from 0: what that update reads when no batch is left out."""


@runtime_checkable
class NamesSamples(Protocol):
    """Batches whose samples have keys."""

    def keys(self, step: int) -> list[str]:
        """Return the keys of this data-parallel rank's samples of batch `step`."""


SampleCallback = Callable[[int, MetricsWriter | None], None]
"""Called on all ranks with the number of updates done, and the writer on rank 0: draws pictures on the way."""


@dataclass(frozen=True)
class FitResult:
    """What training ended with."""

    step: int
    loss: float | None
    """Of the last step with a finite one; None when there was nothing left to train."""


@dataclass(frozen=True)
class _Step:
    """What all ranks know of a step."""

    extra: dict[str, float]
    """Further numbers to log."""
    must_stop: bool
    """Any rank was asked to stop."""
    finite: bool
    """Loss and gradients."""
    written: bool
    """All ranks have written their part of a checkpoint in the background."""
    trouble: Trouble | None


class Trainer:
    """Trains one model from its newest checkpoint, or from step 0, to its last step."""

    def __init__(
        self,
        *,
        engine: TrainingEngine,
        batches: StepBatches,
        train: TrainConfig,
        stage: StageDirectory,
        checkpointer: Checkpointer,
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
            checkpointer: saves and finds the full state.
            world: this rank among the others.
            stop: set by a signal.
            on_sample: draws on the way.
            work: what a sample costs, for the meters; without it they show samples alone.
        """
        self.engine, self.batches, self.train, self.stage = engine, batches, train, stage
        self.world, self.stop, self.on_sample = world, stop, on_sample
        self.checkpointer = checkpointer
        self._health = Health(train.health)
        self._skipped = SkippedBatches()
        self._skipped_in_a_row = 0
        self._checkpoint: int | None = None
        self._save_is_due = False
        self._writer: MetricsWriter | None = None
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
            NumericError: a loss or gradients are not finite, and `train.health` says or allows nothing else.
        """
        watchdog.enter("restore")
        self._skipped = self._read_skipped()
        done = self._restore()
        try:
            self._open_writer(done)
            while done < self.train.steps:
                note_step(done + 1)
                step = self.train_step(done)
                if self._must_go_back(done, step):
                    done = self._go_back(done, step)
                    self._open_writer(done)
                else:
                    done += 1
                    self._after_step(done, step)
            watchdog.enter("save", done)
            self.checkpointer.finish()
        except NumericError:
            self.checkpointer.finish()  # what was being written is good, and must not be lost with the rest
            raise
        finally:
            self._clock.close()
            if self._writer is not None:
                self._writer.close()
        watchdog.enter("work", self.train.steps)
        return FitResult(self.train.steps, self._loss)

    def train_step(self, step: int) -> _Step:
        """Make update `step` (from 0): read, forward, backward, clip, update; then agree with all ranks."""
        watchdog.enter("data", step + 1)
        begin = time.monotonic()
        batch = self._skipped.number(step)
        micro_batches = self.batches.step(batch) if self.engine.needs_data else []
        reading = time.monotonic() - begin
        watchdog.enter("step", step + 1)
        fsops.hit("train.step")
        rate = learning_rate(step, self.train.steps, self.train.optimizer)
        output = self.engine.train_step(step, micro_batches, rate)
        row = [output.loss, float(self.stop.is_set), reading, self._clock.take()]
        row += [float(peak_memory_bytes(self.world.device)), float(output.finite)]
        row.append(float(self.checkpointer.ready))
        # One small exchange a step: the loss is judged, a signal heeded, and the ranks are compared.
        rows = gather_rows(torch.tensor(row, dtype=torch.float64)).T.tolist()
        losses, stops, reads, forwards, peaks, finites, written = rows
        self._meter.add(time.monotonic() - begin, reads, forwards, max(peaks))
        if self._meter.warning is not None and self.world.is_first:
            logger.warning("step %d: %s", step + 1, self._meter.warning)
        loss = sum(losses) / len(losses)
        finite = math.isfinite(loss) and all(finites)
        if finite:
            self._loss = loss
            self._sums += torch.cat([output.sums, torch.tensor([output.loss])])
            self._counts += torch.cat([output.counts, torch.ones(1)])
        trouble = self._health.observe(step, loss, all(finites), self._checkpoint is not None)
        extra = output.extra | {"learning_rate": rate}
        return _Step(extra, any(stops), finite, all(written), trouble)

    def _must_go_back(self, step: int, result: _Step) -> bool:
        """Say what is wrong with update `step`, if anything is, and whether training goes back. Collective.

        Raises:
            NumericError: it may not go on.
        """
        trouble, health, batch = result.trouble, self.train.health, self._skipped.number(step)
        if trouble is None or trouble.policy == "log":
            self._skipped_in_a_row = 0
            if trouble is not None and self.world.is_first:
                logger.warning("%s; it read batch %d", trouble.what, batch)
            return False
        if trouble.policy == "stop":
            raise NumericError(
                f"{trouble.what}; {_REMEDY}, or set train.health.on_not_finite to skip or rewind"
            )
        if trouble.policy == "skip":
            self._skipped_in_a_row += 1
            if self._skipped_in_a_row > health.max_skipped:
                raise NumericError(
                    f"{trouble.what}, after {health.max_skipped} skipped steps in a row (train.health.max_skipped); "
                    f"{_REMEDY}, or raise the limit"
                )
            samples = self._samples(batch)
            if self.world.is_first:
                logger.warning("%s; batch %d is skipped: %s", trouble.what, batch, _shown(samples))
            return False
        if self._checkpoint is None:
            raise NumericError(
                f"{trouble.what}, and there is no checkpoint to go back to; {_REMEDY}, or train.checkpoint.every_steps"
            )
        if self._skipped.ahead(self._checkpoint) >= health.max_skipped:
            raise NumericError(
                f"{trouble.what}, after {health.max_skipped} batches were left out since the checkpoint of step "
                f"{self._checkpoint} (train.health.max_skipped); {_REMEDY}, or raise the limit"
            )
        return True

    def _go_back(self, step: int, result: _Step) -> int:
        """Leave the batch of update `step` out for good, restore the last checkpoint and return its step. Collective."""
        assert result.trouble is not None
        batch = self._skipped.number(step)
        samples = self._samples(batch)
        self._skipped = self._skipped.add(SkippedBatch(batch, step + 1, result.trouble.what, tuple(samples)))
        watchdog.enter("restore", step + 1)
        self.checkpointer.finish()
        # Before the restore: a job that is killed from here on goes on in the same way.
        path = self.stage.path / FILE
        on_first(lambda: self._skipped.write(path), f"write {path}")
        done = self._restore()
        if self.world.is_first:
            logger.warning(
                "%s; back to step %d, and on without batch %d: %s",
                result.trouble.what,
                done,
                batch,
                _shown(samples),
            )
        self._meter.restart()
        return done

    def _samples(self, batch: int) -> list[str]:
        """Return the keys of a batch, of all ranks; empty where samples have none. Collective."""
        mine = self.batches.keys(batch) if isinstance(self.batches, NamesSamples) else []
        return list(dict.fromkeys(key for keys in gather_objects(mine) for key in keys))

    def _read_skipped(self) -> SkippedBatches:
        """Return the batches that are left out, as rank 0 sees them. Collective."""
        path = self.stage.path / FILE
        return on_first(lambda: SkippedBatches.read(path), f"read {path}")

    def _restore(self) -> int:
        """Restore the newest checkpoint and return its step; 0 without one. Collective."""
        restored = self.checkpointer.restore(self.engine)
        if restored is None:
            assert self._checkpoint is None  # one that was committed is never lost without an error
            return 0
        restored.data.check(self.batches.plan, self.batches.dataset_sha256)
        self._skipped.check(restored.data, restored.step, self.train.global_batch)
        columns = len(self._sums)
        self._sums, self._counts = restored.meters[:, :columns].clone().unbind()
        # Rank 0 keeps the losses for all: like this they survive another number of ranks too.
        self._health.load(sum_over_ranks(restored.meters[:, columns:].clone()))
        self._checkpoint, self._save_is_due, self._skipped_in_a_row = restored.step, False, 0
        return restored.step

    def _open_writer(self, done: int) -> None:
        """Begin to write numbers after step `done`; those that were written after it are dropped."""
        if self._writer is not None:
            self._writer.close()
        if self.world.is_first:
            self._writer = MetricsWriter(self.stage.metrics, self.stage.tensorboard, done)

    def _after_step(self, done: int, step: _Step) -> None:
        last = done == self.train.steps
        if step.written:
            watchdog.enter("save", done)
            self.checkpointer.finish()
        # There is no mean over steps that were all skipped: the next line has them among its own.
        if (done % self.train.log_every == 0 or last) and self._counts[-1]:
            self._log(done, step.extra)
        elif self.world.is_first and time.monotonic() - self._beat_at >= _HEARTBEAT_SECONDS:
            self._beat(done, self._loss)
        every = self.train.sample_every
        if self.on_sample is not None and (last or (every and done % every == 0)):
            watchdog.enter("sample", done)
            self.on_sample(done, self._writer)
        self._save_is_due |= last or done % self.train.checkpoint.every_steps == 0
        if not step.finite:
            return  # nothing is saved, and no signal heeded, until a step is good: checkpoints are good ones
        if step.must_stop or self._save_is_due:
            self._save(done)
        if step.must_stop and not last:
            self.checkpointer.finish()
            raise Preempted(
                f"stopped by {self.stop.reason} after step {done}, which is saved; the same command goes on from there"
            )

    def _save(self, done: int) -> None:
        watchdog.enter("save", done)
        consumed = self._skipped.behind(done) * self.train.global_batch
        data = DataState.at(self.batches.plan, self.batches.dataset_sha256, consumed)
        losses = self._health.state() * self.world.is_first
        meters = torch.cat([torch.stack([self._sums, self._counts]), losses], dim=1)
        self.checkpointer.save(self.engine, done, data, meters)
        self._checkpoint, self._save_is_due = done, False

    def _log(self, done: int, extra: dict[str, float]) -> None:
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
        if self._writer is not None:
            self._writer.scalars(done, values, {"slowest": slowest.name} if slowest is not None else {})
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


def _shown(samples: list[str]) -> str:
    more = f" and {len(samples) - _NAMED_SAMPLES} more" if len(samples) > _NAMED_SAMPLES else ""
    return f"samples {', '.join(samples[:_NAMED_SAMPLES])}{more}" if samples else "its samples have no keys"
