"""Kills at one operation of a save or a start, chosen by its number, instead of at random moments.

An undisturbed job tells the operations of one of its saves (or of a start); then every one of them is the one right before
which all ranks get SIGKILL at once.
"""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from killed_training import ENDLESS, Job, failures, named, note, run_on, seen, started

from cogview2.pipeline import fsops
from cogview2.pipeline.errors import CheckpointError
from cogview2.pipeline.training import trainer
from cogview2.pipeline.training.checkpoint import COMMITTED
from cogview2.pipeline.training.state.manifest import committed_steps, folder_name, verify

_KEPT = 2
"""Checkpoints that always stay, once there were so many (`keep_last`)."""
SAVE, START = "save", "start"
_CAME_BACK = "the save came back"
_LIMIT_SECONDS = 120.0
_REMOVALS = ("os.remove", "os.rmdir")
_OWN = {
    "COMMITTED.json",
    "checkpoints",
    "output",
    "samples",
    "tensorboard",
    "metrics.jsonl",
    "heartbeat.json",
}


@dataclass(frozen=True)
class Point:
    """An operation of one rank, right before which everything is killed."""

    rank: int
    number: int
    """In its window, from 0."""
    name: str
    """The fault point, and what the operation did where it succeeded."""

    def __str__(self) -> str:
        return f"rank {self.rank}, before operation {self.number}: {self.name}"


@dataclass
class Watch:
    """Counts the operations of every rank within one window, a save until it came back, or a start until training begins."""

    notes: Path
    """Where it writes down what it saw."""
    window: str = ""
    """SAVE or START; nothing is counted without one."""
    turn: int = 0
    """Which save of the attempt, from 0."""
    point: Point | None = None
    """Where to kill; None: write the operations down."""
    quarantined: int = 0
    """Checkpoints that must have been put aside by the time the state is restored."""
    names: list[str] = field(default_factory=list)
    _armed: bool = False
    _last: int = 0

    def __call__(self, rank: int, engine: Any, checkpointer: Any, pids: Sequence[int]) -> None:
        """Begin to watch this process; it is a fork, and nothing is put back."""
        self._rank, self._pids = rank, pids
        trainer._HEARTBEAT_SECONDS = float("inf")  # the clock would add operations
        self._look_around(checkpointer)
        if self.window == SAVE:
            self._saves(checkpointer)
        elif self.window == START:
            self._starts(engine, checkpointer)
        hit, told = fsops.hit, fsops.recorder

        def watched(name: str) -> None:
            if name != "train.step":
                self._last = len(self.names)
                self._operation(name)
            hit(name)

        def tell(kind: str, path: Path, target: Path | None) -> None:
            if self._armed and self._last < len(self.names):
                self.names[self._last] += f", {kind} of {named(target or path)}"
                self._last = len(self.names)
            if told is not None:
                told(kind, path, target)

        def audited(event: str, arguments: tuple[Any, ...]) -> None:
            if self._armed and event in _REMOVALS and ".tmp." not in str(arguments[0]):
                self._operation(event)

        fsops.hit, fsops.recorder = watched, tell
        sys.addaudithook(audited)

    def _look_around(self, checkpointer: Any) -> None:
        restore = checkpointer.restore

        def looked(*arguments: Any) -> Any:
            restored = restore(*arguments)
            for name in foreign(checkpointer.folder.parent, self.quarantined) if self._rank == 0 else []:
                note(self.notes / "foreign", name)
            return restored

        checkpointer.restore = looked

    def _saves(self, checkpointer: Any) -> None:
        stage, finish, turns = checkpointer._stage, checkpointer._finish, [0]

        def begin(*arguments: Any) -> Any:
            self._armed = turns[0] == self.turn
            turns[0] += 1
            return stage(*arguments)

        def end(*arguments: Any) -> None:
            finish(*arguments)
            self._close(_CAME_BACK)

        checkpointer._stage, checkpointer._finish = begin, end

    def _starts(self, engine: Any, checkpointer: Any) -> None:
        restore, train_step = checkpointer.restore, engine.train_step

        def begin(*arguments: Any) -> Any:
            self._armed = True
            return restore(*arguments)

        def end(*arguments: Any) -> Any:
            self._close("training begins")
            return train_step(*arguments)

        checkpointer.restore, engine.train_step = begin, end

    def _operation(self, name: str) -> None:
        if not self._armed:
            return
        if self.point is not None and (self.point.rank, self.point.number) == (self._rank, len(self.names)):
            for pid in sorted(self._pids, key=lambda pid: pid == os.getpid()):  # itself last
                os.kill(pid, signal.SIGKILL)
        self.names.append(name)

    def _close(self, name: str) -> None:
        if self._armed:
            self._operation(name)
            self._armed = False
            if self.point is None:
                (self.notes / f"operations-{self._rank}").write_text(json.dumps(self.names))


@dataclass(frozen=True)
class Reference:
    """What nobody disturbed."""

    losses: dict[tuple[int, int], set[str]]
    points: list[Point]
    """Of its third save, the last of other ranks before those of rank 0."""

    def where(self, name: str, rank: int = 0) -> Point:
        """Return the first operation of a rank whose name holds `name`."""
        return next(point for point in self.points if point.rank == rank and name in point.name)

    def commits(self, point: Point) -> bool:
        """Return whether the checkpoint is committed when the job dies there."""
        renamed = point.rank == 0 and point.number > self.where("rename of step").number
        return renamed or point.name == _CAME_BACK


def reference(job: Job, steps: int) -> Reference:
    """Train `steps` steps undisturbed, a save after each, and write down the operations of the third."""
    points = operations(job, Watch(job.notes, SAVE, 2), steps)
    return Reference(seen(job).losses, points)


def operations(job: Job, watch: Watch, until: int) -> list[Point]:
    """Let an attempt go on undisturbed, and return what it did in a window: first other ranks, then rank 0."""
    run_on(replace(job, until=until, watch=watch))
    return [
        Point(rank, number, name)
        for rank in reversed(range(job.cell.ranks))
        for number, name in enumerate(json.loads((job.notes / f"operations-{rank}").read_text()))
    ]


@dataclass
class Found:
    """What a sweep found."""

    points: int = 0
    lost: list[str] = field(default_factory=list)
    """Points after which a step was gone that was committed or acknowledged."""
    broken: list[str] = field(default_factory=list)
    """What was wrong with the files right after a kill."""
    foreign: list[str] = field(default_factory=list)
    """What the next start left lying about."""
    different: list[tuple[int, int]] = field(default_factory=list)
    """(rank, step) whose numbers are not those of the undisturbed job, to the last bit."""
    steps: int = 0

    def resumed(self, job: Job, expected: int, killed: Point | None) -> None:
        """Judge from where the newest attempt went on after a kill at a point."""
        if (step := seen(job).resumed[-1]) != expected:
            self.lost.append(f"after the kill of {killed}: went on from {step} instead of {expected}")

    def finish(self, undisturbed: Reference, job: Job, expected: int, killed: Point, watch: Watch) -> None:
        """Let a job go on for two steps, and judge all that it did."""
        run_on(replace(job, until=expected + 2, watch=watch))
        self.resumed(job, expected, killed)
        noted = seen(job)
        self.different += [key for key, numbers in noted.losses.items() if numbers != undisturbed.losses[key]]
        self.steps += len(noted.losses)
        path = job.notes / "foreign"
        self.foreign += path.read_text().splitlines() if path.exists() else []

    def __str__(self) -> str:
        counts = f"{len(self.lost)} lost, {len(self.broken)} broken, {len(self.foreign)} foreign"
        return f"{self.points} points: {counts}, {len(self.different)} of {self.steps} steps different"

    @property
    def is_good(self) -> bool:
        """Whether nothing was wrong."""
        return not (self.lost or self.broken or self.foreign or self.different)


def kill_at(job: Job, point: Point, watch: Watch) -> None:
    """Start an attempt that dies at `point`."""
    job = replace(job, until=ENDLESS, watch=replace(watch, point=point))
    with started(job) as (ranks, _):
        deadline = time.monotonic() + _LIMIT_SECONDS
        for process in ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in ranks]
        assert codes == [-signal.SIGKILL] * len(ranks), f"{point}: {codes}, {failures(job)}"


def broken(folder: Path, committed: int) -> list[str]:
    """Return what is wrong with the files of a stage at any moment; as many steps were committed as are told."""
    found, steps = [], committed_steps(folder / "checkpoints")
    for step in steps:
        try:
            verify(folder / "checkpoints" / folder_name(step))
        except CheckpointError as error:
            found.append(str(error))
    marker = folder / COMMITTED
    promised = int(json.loads(marker.read_text())["step"]) if marker.exists() else 0
    if promised > max(steps, default=0):
        found.append(f"{COMMITTED} names step {promised}, which is not committed")
    if len(steps) < min(_KEPT, committed):
        found.append(f"only the checkpoints {steps} are left")
    return found


def foreign(folder: Path, quarantined: int = 0) -> list[str]:
    """Return what does not belong into a stage once it has started."""
    names = [path.name for path in folder.iterdir() if path.name not in _OWN]
    inside = {path.name for path in (folder / "checkpoints").iterdir()} - {"latest"}
    steps = {folder_name(step) for step in committed_steps(folder / "checkpoints")}
    aside = sorted(path.name for path in (folder / "checkpoints/quarantine").glob("*"))
    names += sorted(inside - steps - {"quarantine"})
    return names + ([] if len(aside) == quarantined else [f"quarantine: {aside}"])


def sweep(undisturbed: Reference, job: Job, points: Iterable[Point], turn: int) -> Found:
    """Kill a job at one point after the other, each attempt going on from where the one before was killed.

    Args:
        undisturbed: the job as it ought to be, with more steps than this one gets.
        job: an empty folder, or one that began like this.
        points: of `undisturbed`.
        turn: which save of each attempt they are in, from 0.
    """
    found = Found()
    before, last, watch = 0, None, Watch(job.notes, SAVE, turn)
    for point in points:
        kill_at(job, point, watch)
        found.points += 1
        found.resumed(job, before, last)
        before, last = before + turn + undisturbed.commits(point), point
        if (said := seen(job).acknowledged) > before:
            found.lost.append(f"{point}: step {said} is acknowledged, {before} is committed")
        found.broken += [f"{point}: {what}" for what in broken(job.folder, before)]
    assert last is not None
    found.finish(undisturbed, job, before, last, Watch(job.notes))
    return found


def damage_newest(folder: Path) -> None:
    """Flip a bit of the newest checkpoint, and leave about what a killed save and a killed deletion leave."""
    newest = folder / "checkpoints" / folder_name(committed_steps(folder / "checkpoints")[-1])
    for name in (f".staging.{newest.name}.0", f".trash.{newest.name}.0"):
        shutil.copytree(newest, newest.with_name(name))
    path = newest / "rank_00001.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def sweep_start(undisturbed: Reference, job: Job, until: int, only: str = "") -> Found:
    """Kill starts that find a damaged newest checkpoint, at every operation; each in a copy of the same stage.

    Args:
        undisturbed: the job as it ought to be.
        job: an empty folder.
        until: steps that it trains before; it has as many checkpoints as are kept, and loses the newest.
        only: points whose name holds this.
    """
    run_on(replace(job, until=until, watch=Watch(job.notes)))
    damage_newest(job.folder)

    def copy(name: str) -> Job:
        other = replace(job, folder=job.folder.with_name(name))
        shutil.copytree(job.folder, other.folder)
        shutil.copytree(job.notes, other.notes)
        return other

    tried = copy("start")
    points, found = operations(tried, Watch(tried.notes, START, quarantined=1), until + 1), Found()
    for point in (point for point in points if only in point.name):
        tried = copy(f"start {point.rank} {point.number}")
        kill_at(tried, point, Watch(tried.notes, START, quarantined=1))
        found.points += 1
        found.finish(undisturbed, tried, until - 1, point, Watch(tried.notes, quarantined=1))
    return found
