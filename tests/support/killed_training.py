"""Real training on forked gloo ranks that can be killed at any moment, and what it did and promised until then."""

import contextlib
import logging
import multiprocessing
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from ctypes import c_char, c_int
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import deepspeed.comm
import deepspeed.ops
import equivalence
import forked_ranks  # noqa: F401 - with what engines import late: ten seconds in every fork
import torch
import torch.utils.tensorboard
from equivalence import Cell

from cogview2.pipeline import fsops
from cogview2.pipeline.config.deepspeed import precision, resolve
from cogview2.pipeline.config.training import CheckpointConfig
from cogview2.pipeline.data.sample_plan import DataState, SamplePlan
from cogview2.pipeline.distributed.process import World
from cogview2.pipeline.distributed.seeding import seed_everything
from cogview2.pipeline.errors import CogView2Error, Preempted
from cogview2.pipeline.stage_dir import StageDirectory
from cogview2.pipeline.training.checkpoint import Checkpointer, Restored
from cogview2.pipeline.training.state.identity import Identity
from cogview2.pipeline.training.state.manifest import Topology
from cogview2.pipeline.training.trainer import Trainer

ENDLESS = 100_000
"""Steps of the schedule; nobody gets there."""
_START_SECONDS = 120.0
_FIRST_STEPS = 3
"""Before the first kill, so that there is something to lose."""


@dataclass(frozen=True)
class Job:
    """What is trained, and how it is disturbed."""

    cell: Cell
    folder: Path
    """Of the stage; the cell's JSON and the notes are beside it."""
    every: int = 1
    """Steps between checkpoints."""
    slow_rank: int | None = 1
    """Its part of a checkpoint takes this much longer: writes of ranks are never at the same moment."""
    slow_seconds: float = 0.06
    until: int = ENDLESS
    """Step after which it stops as if a signal had come."""
    asynchronous: bool = False
    bare: bool = False
    """With DeepSpeed's own `save_checkpoint` and `load_checkpoint`, as their documents show them."""
    log_every: int = 7
    watch: Callable[[int, Any, Checkpointer, Sequence[int]], None] | None = None
    """Called on every rank before it trains, with rank, engine, checkpointer and the process ids of all ranks."""

    @property
    def notes(self) -> Path:
        """Where the ranks write down what they do."""
        return self.folder.parent / f"{self.folder.name} notes"


@dataclass
class Seen:
    """What the ranks wrote down over all attempts."""

    losses: dict[tuple[int, int], set[str]] = field(default_factory=dict)
    """(rank, step) -> losses and norms in hex; one element when every attempt agreed."""
    resumed: list[int] = field(default_factory=list)
    """Step from which each attempt went on, as rank 0 said."""
    acknowledged: int = 0
    """Newest step whose `save` came back on rank 0."""


class Stop:
    """A stop flag that is set at a step."""

    reason = "SIGTERM"

    def __init__(self, until: int) -> None:
        self.until, self.step = until, 0

    @property
    def is_set(self) -> bool:
        return self.step >= self.until


def named(path: Path) -> str:
    """Return in a word what a file or folder of a checkpoint is."""
    name = path.name.lstrip(".").split(".step")[0]
    known = ("rank_", "MANIFEST", "data_state", "staging", "trash", "step_", "latest", "COMMITTED")
    return next((word.strip("_") for word in (*known, "quarantine", "metrics") if word in name), "other")


def note(path: Path, line: str) -> None:
    """Append a line by one write, so that a kill leaves it whole or out."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(descriptor, f"{line}\n".encode())
    os.close(descriptor)


def _observe(job: Job, rank: int, engine: Any, checkpointer: Checkpointer, phase: Any, stop: Stop) -> None:
    """Let the ranks tell what they do, and where they are when they are killed."""
    train_step, finish, restore = engine.train_step, checkpointer._finish, checkpointer.restore
    saving = [False]

    def say(words: str) -> None:
        phase.value = words.encode()[:63]

    def seen(kind: str, path: Path, target: Path | None) -> None:
        if saving[0]:
            say(f"save: after {kind} of {named(target or path)}")

    def step(number: int, batches: Any, rate: float) -> Any:
        say("train")
        result = train_step(number, batches, rate)
        norm = engine.grad_norm()
        note(job.notes / f"losses-{rank}", f"{number} {result.loss.hex()} {norm.hex()}")
        stop.step = number + 1
        return result

    def commit(number: int, *rest: Any) -> None:
        saving[0] = True
        say("save: begins")
        if rank == job.slow_rank and not job.bare:
            time.sleep(job.slow_seconds)
        finish(number, *rest)
        saving[0] = False
        if rank == 0:
            note(job.notes / "acknowledged", str(number))

    def go_on(*rest: Any) -> Any:
        say("restore")
        restored = restore(*rest)
        if rank == 0:
            note(job.notes / "resumed", str(0 if restored is None else restored.step))
        return restored

    fsops.recorder = seen
    engine.train_step, checkpointer._finish, checkpointer.restore = step, commit, go_on  # type: ignore[method-assign]


def _use_deepspeeds_own(engine: Any, checkpointer: Checkpointer, rank: int, job: Job) -> None:
    """Save and load as bare DeepSpeed does: a tag for each step, and a file `latest`."""
    folder = str(checkpointer.folder)
    real = engine.engine.checkpoint_engine.save

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(job.slow_seconds)  # in the middle: before it all ranks meet
        return real(*arguments, **options)

    if rank == job.slow_rank:
        engine.engine.checkpoint_engine.save = slow
    data = DataState.at(SamplePlan([64], 0), "0" * 64, 0)

    def finish(number: int, *_: Any) -> None:
        engine.engine.save_checkpoint(folder, tag=f"step{number}")

    def save(_engine: Any, number: int, _data: Any, _meters: Any) -> None:
        checkpointer._finish(number, data, None)  # type: ignore[arg-type]  # what is observed

    def restore(_engine: Any) -> Restored | None:
        path, _ = engine.engine.load_checkpoint(folder)
        step = int(engine.engine.global_steps)
        consumed = DataState.at(SamplePlan([64], 0), "0" * 64, step * equivalence.GLOBAL_BATCH)
        return None if path is None else Restored(step, consumed, torch.zeros(2, 64))

    checkpointer._finish, checkpointer.save, checkpointer.restore = finish, save, restore  # type: ignore[method-assign]


def _train(job: Job, rank: int, phase: Any, pids: Sequence[int]) -> None:
    cell = job.cell
    seed_everything(equivalence.SEED, rank + 1)
    path = equivalence.json_path(cell, job.folder.parent)
    model = equivalence.CONFIG.model_copy(update={"dropout": 0.1})
    engine: Any = equivalence.build(cell, path, rank, model=model)
    world = World(rank, cell.ranks, rank, torch.device("cpu"))
    checkpoints = CheckpointConfig(every_steps=job.every, asynchronous=job.asynchronous)
    train = equivalence.TRAIN.model_copy(
        update={
            "steps": ENDLESS,
            "checkpoint": checkpoints,
            "log_every": job.log_every,
            "pipeline_parallel": cell.pp,
        }
    )
    resolved = resolve(path, train, cell.ranks, cpu=True)
    topology = Topology(cell.ranks, cell.pp, cell.zero, precision(resolved))
    unit = StageDirectory(job.folder, "pretrain_coglm").create()
    checkpointer = Checkpointer(unit.checkpoints, world, Identity("same"), topology, checkpoints)
    batches: Any = SimpleNamespace(plan=SamplePlan([64], 0), dataset_sha256="0" * 64)
    batches.step = lambda number: equivalence.micro_batches(
        number % 50, engine.data_rank, engine.data_size, engine.accumulation
    )
    stop: Any = Stop(job.until)
    if job.bare:
        _use_deepspeeds_own(engine, checkpointer, rank, job)
    _observe(job, rank, engine, checkpointer, phase, stop)
    if job.watch is not None:
        job.watch(rank, engine, checkpointer, pids)
    trainer = Trainer(
        engine=engine,
        batches=batches,
        train=train,
        stage=unit,
        checkpointer=checkpointer,
        world=world,
        stop=stop,
    )
    with contextlib.suppress(Preempted):
        trainer.fit()


def _main(job: Job, rank: int, port: int, phase: Any, pids: Any) -> None:
    pids[rank] = os.getpid()
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job.cell.ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in own.items()}, MASTER_ADDR="127.0.0.1")
    code = 1
    try:
        torch.set_num_threads(1)
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.utils.logger.setLevel(logging.ERROR)
        logging.disable(logging.INFO)
        deepspeed.init_distributed("gloo")
        _train(job, rank, phase, pids)
        code = 0
    except CogView2Error as error:
        note(job.notes / f"refused-{rank}", str(error))
    except BaseException as error:  # a peer was killed, or a bug: the test reads what it was
        note(
            job.notes / f"failed-{rank}",
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
        )
    finally:
        os._exit(code)


@contextlib.contextmanager
def started(job: Job) -> Iterator[tuple[list[BaseProcess], list[Any]]]:
    """Start an attempt; yields the ranks' processes and where each of them is; none of them outlives the block."""
    job.notes.mkdir(exist_ok=True)
    equivalence.write_json(job.cell, job.folder.parent)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    count = job.cell.ranks
    phases = [context.Array(c_char, 64, lock=False) for _ in range(count)]
    pids = context.Array(c_int, count, lock=False)
    ranks = [
        context.Process(target=_main, args=(job, rank, port, phases[rank], pids)) for rank in range(count)
    ]
    try:
        for process in ranks:
            process.start()
        yield ranks, phases
    finally:
        for process in ranks:
            process.kill()
            process.join()


def run_on(job: Job, limit: float = 300.0) -> None:
    """Let an attempt go on until it stops by itself."""
    with started(job) as (ranks, _):
        deadline = time.monotonic() + limit
        for process in ranks:
            process.join(max(0.0, deadline - time.monotonic()))
            assert process.exitcode == 0, f"{process.exitcode}: {failures(job)}"


def killed(job: Job, rng: random.Random, window: float) -> str:
    """Start an attempt, kill it at a random moment after its first save has begun, and return where rank 0 was then."""
    with started(job) as (ranks, phases):
        deadline = time.monotonic() + _START_SECONDS
        while not phases[0].value.startswith(b"save"):
            assert time.monotonic() < deadline and ranks[0].is_alive(), failures(job)
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, window))
        order = rng.sample(ranks, len(ranks))
        where = phases[0].value.decode()
        for index, process in enumerate(order):
            os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
            if index == 0 and rng.random() < 0.25:
                time.sleep(0.1)  # one rank alone: the others find a peer that is gone
        return where


def failures(job: Job) -> str:
    """Return what ranks said when they failed."""
    found = [path for name in ("refused", "failed") for path in sorted(job.notes.glob(f"{name}-*"))]
    return "; ".join(path.read_text().strip() for path in found) or "nothing was said"


def seen(job: Job) -> Seen:
    """Read what the ranks wrote down."""
    result = Seen()
    for rank in range(job.cell.ranks):
        for line in (job.notes / f"losses-{rank}").read_text().splitlines():
            step, numbers = line.split(" ", 1)
            result.losses.setdefault((rank, int(step)), set()).add(numbers)
    result.resumed = [int(line) for line in (job.notes / "resumed").read_text().split()]
    acknowledged = job.notes / "acknowledged"
    if acknowledged.exists():
        result.acknowledged = max((int(line) for line in acknowledged.read_text().split()), default=0)
    return result


def repeat(job: Job, kills: int, seed: int, window: float) -> dict[str, Any]:
    """Kill a job again and again, letting it go on from where it was; then compare it with one that nobody disturbed.

    Returns:
        kills, inside (of them within a save), lost (acknowledged steps that an attempt did not find), different (steps
        whose numbers are not those of the undisturbed job, to the last bit), steps, points (where rank 0 was -> kills).
    """
    rng, lost = random.Random(seed), 0
    points: dict[str, int] = {}
    run_on(_replaced(job, until=_FIRST_STEPS))
    for _ in range(kills):
        before = seen(job).acknowledged
        where = killed(job, rng, window)
        points[where] = points.get(where, 0) + 1
        if seen(job).resumed[-1] < before:
            lost += 1
    reached = max(step for _, step in seen(job).losses) + 1
    final = _replaced(job, until=reached + 2)
    run_on(final)
    straight = _replaced(final, folder=job.folder.with_name(f"{job.folder.name} straight"), every=ENDLESS)
    run_on(straight)
    expected, found = seen(straight).losses, seen(job).losses
    different = [key for key, numbers in found.items() if numbers != expected.get(key)]
    inside = sum(count for where, count in points.items() if where.startswith("save"))
    return {
        "kills": kills,
        "inside": inside,
        "lost": lost,
        "different": different,
        "steps": reached + 2,
        "points": dict(sorted(points.items(), key=lambda item: -item[1])),
    }


def repeat_bare(job: Job, kills: int, seed: int, window: float) -> dict[str, int]:
    """Kill bare DeepSpeed again and again; a job that does not go on any more is begun anew in an empty folder.

    Returns:
        kills, inside (of them within a save), dead (did not go on), behind (went on from before an acknowledged step).
    """
    rng, found = random.Random(seed), {"kills": kills, "inside": 0, "dead": 0, "behind": 0}
    current = job
    for number in range(kills):
        before = seen(current).acknowledged if (current.notes / "acknowledged").exists() else 0
        try:
            where = killed(current, rng, window)
        except AssertionError:  # it ended before its first save: it could not load what is there
            found["dead"] += 1
            current = _replaced(job, folder=job.folder.with_name(f"{job.folder.name} {number}"))
            continue
        found["inside"] += where.startswith("save")
        found["behind"] += seen(current).resumed[-1] < before
    return found


def _replaced(job: Job, **changes: Any) -> Job:
    return Job(**{**vars(job), **changes})
