"""What every stage process does around its work: identity, logs, signals, lock, process group, outcome."""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from cogview2.pipeline import fsops
from cogview2.pipeline import logging as our_logging
from cogview2.pipeline.attempt import HUNG, LOST, Attempt, noted_step
from cogview2.pipeline.config.stages import Recipe
from cogview2.pipeline.distributed import watchdog
from cogview2.pipeline.distributed.process import (
    World,
    claimed_rank,
    planned_ranks,
    process_group,
    world_from_environment,
)
from cogview2.pipeline.distributed.seeding import seed_everything
from cogview2.pipeline.errors import CogView2Error, ExitCode, LaunchError, Preempted
from cogview2.pipeline.locking import Held
from cogview2.pipeline.run_dir import RunDirectory, StageDirectory
from cogview2.pipeline.training.preemption import StopFlag
from cogview2.stages._stopping import meet

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageContext:
    """Everything that a stage gets."""

    run: RunDirectory
    recipe: Recipe
    stage: StageDirectory
    world: World
    stop: StopFlag
    lock: Held | None = None
    """The stage's lock, on rank 0: checked before what must be written once only."""

    def finish(self, unit: StageDirectory, extra: dict[str, object] | None = None) -> None:
        """Write the DONE record of the stage or of a part of it; rank 0 only, last of all.

        Raises:
            LockedError: another job took the stage over meanwhile.
        """
        if self.lock is not None:
            self.lock.check()
        unit.write_done(
            self.run.inputs(unit.name, self.recipe),
            unit.output_files(),
            self.run.fingerprint(self.recipe, unit.name),
            extra,
        )


Job = Callable[[StageContext], None]


def run_stage(name: str, job: Job, *, collective: bool = True) -> None:
    """Run `job` as this rank's part of stage `name`, and leave with its exit code.

    Args:
        name: of the stage.
        job: the work.
        collective: open the process group before the job; False leaves that to the job.
    """
    parser = argparse.ArgumentParser(prog=f"cogview2.stages.{name}")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument(
        "--attempt", type=int, required=True, help="number of the attempt, given by the launcher"
    )
    parser.add_argument(
        "--local_rank", type=int, default=0, help="accepted from launchers; the environment counts"
    )
    arguments = parser.parse_args()
    fsops.restrict_umask()
    stop = StopFlag().install()  # before the process id is written: from then on signals come
    run = RunDirectory(arguments.run_dir)
    stage = run.stage(name).create()
    attempt = stage.attempt(arguments.attempt)
    world = _who_am_i(run, attempt)
    attempt.write_pid(world.rank)
    our_logging.setup(logging.INFO, world.rank, attempt.rank_log(world.rank))
    stop.share(attempt.stop_path, world.rank)
    code = ExitCode.FAILED
    try:
        code = _guarded(attempt, world, lambda: _work(run, stage, attempt, world, stop, job, collective))
    except BaseException:  # a bug in what should hold all others
        logger.exception("rank %d ended without an outcome", world.rank)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit: after a failure, threads of gloo that wait for a dead peer would keep the process alive.
        logging.shutdown()
        os._exit(int(code))


def _who_am_i(run: RunDirectory, attempt: Attempt) -> World:
    """Return this rank's place in the job that its launcher planned; leave with an outcome where there is none."""
    try:
        return world_from_environment(planned_ranks(attempt.path), run.recipe_path)
    except LaunchError as error:
        print(f"cogview2: {error}", file=sys.stderr, flush=True)  # noqa: T201 - there is no log yet
        attempt.write_outcome(claimed_rank(), type(error).__name__, error.exit_code, None, str(error))
        os._exit(int(error.exit_code))


def _work(
    run: RunDirectory,
    stage: StageDirectory,
    attempt: Attempt,
    world: World,
    stop: StopFlag,
    job: Job,
    collective: bool,
) -> None:
    recipe = run.load_recipe()
    watchdog.start(attempt, world.rank, world.size, recipe.launch.watchdog)
    seed_everything(recipe.seed, world.rank)
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(stage.lock(f"stage {stage.name}")) if world.is_first else None
        if collective:
            # Collectives must not give up before the watchdog, which can say whom they wait for.
            stack.enter_context(process_group(world, 2 * recipe.launch.watchdog.longest))
            our_logging.quiet_libraries()
            meet(stop, "before it began; the same command starts it again")
        job(StageContext(run, recipe, stage, world, stop, lock))


_LOST_CONNECTION = ("gloo", "NCCL", "Connection", "Broken pipe", "TCPStore")
"""In what gloo, NCCL and the store say when the other end is gone."""


def _failed_before(attempt: Attempt, world: World, error: BaseException) -> str | None:
    """Return which rank's failure ended the collective of this one, in a sentence; None where it was none or is not known."""
    first = attempt.first_failure()
    if first is None or first.rank == world.rank or first.reason == HUNG or first.code == ExitCode.REQUEUE:
        return None
    lost = isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and _is_of_connections(str(error))
    )
    if not lost:
        return None
    if _is_of_connections(first.message):  # the rank that they both lost has left no record
        return None
    return (
        f"rank {first.rank} (host {first.host}) failed before, while this rank waited for it: {first.reason}: "
        f"{first.message}; look at {attempt.rank_log(first.rank)}"
    )


def _is_of_connections(message: str) -> bool:
    """Return whether a message is one of a collective's whose other end is gone."""
    return any(word in message for word in _LOST_CONNECTION)


def _guarded(attempt: Attempt, world: World, work: Callable[[], None]) -> ExitCode:
    """Run `work` and write this rank's outcome, whatever happens; its code counts even where no record can be written."""

    def record(reason: str, code: ExitCode, message: str) -> ExitCode:
        try:
            attempt.write_outcome(world.rank, reason, code, noted_step(), message)
        except (CogView2Error, OSError):  # for example on the full disk that ended the work
            logger.exception("could not write the outcome of rank %d", world.rank)
        return code

    try:
        work()
    except Preempted as error:
        logger.warning("%s", error)
        return record("preempted", error.exit_code, str(error))
    except CogView2Error as error:
        logger.error("%s", error)
        return record(type(error).__name__, error.exit_code, str(error))
    except BaseException as error:  # the outcome must be written for every kind of end
        before = _failed_before(attempt, world, error)
        if before is not None:
            watchdog.heed_hang()
            logger.error("%s", before)
            return record(LOST, ExitCode.FAILED, before)
        logger.exception("unexpected error")
        watchdog.heed_hang()
        text = f"{type(error).__name__}: {error}{watchdog.gone()}"
        return record(type(error).__name__, ExitCode.FAILED, text)
    return record("done", ExitCode.DONE, "")
