"""Checkpoints that exist whole or not at all: staging, manifest, one rename (docs/reliability.md).

checkpoints/step_000001200/{rank_00000.safetensors, ..., data_state.json, MANIFEST.json}
"""

import contextlib
import hashlib
import json
import logging
import secrets
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from cogview2.pipeline import fsops
from cogview2.pipeline.config.training import CheckpointConfig
from cogview2.pipeline.data.sample_plan import DataState
from cogview2.pipeline.distributed.process import World
from cogview2.pipeline.distributed.seeding import random_state
from cogview2.pipeline.distributed.together import on_first, together
from cogview2.pipeline.errors import CheckpointError, CogView2Error
from cogview2.pipeline.stage_dir import package_versions
from cogview2.pipeline.training.engine import TrainingEngine
from cogview2.pipeline.training.state.files import RankState, file_name, write_rank_state
from cogview2.pipeline.training.state.host_memory import Need, available_bytes, lack
from cogview2.pipeline.training.state.identity import Fence, Identity
from cogview2.pipeline.training.state.loading import open_together, take_own_over
from cogview2.pipeline.training.state.manifest import (
    DATA_STATE,
    MANIFEST,
    FileRecord,
    Manifest,
    Topology,
    UnreadableError,
    committed_steps,
    damage,
    folder_name,
    read_manifest,
    verify,
)

logger = logging.getLogger(__name__)
COMMITTED = "COMMITTED.json"
"""Beside checkpoints/: the newest step that was ever committed, so that a stage that lost all of them never begins at 0."""
_QUARANTINE = "quarantine"
_SPARE = 1.2
"""Free space must be this much more than what is to be written."""


@dataclass(frozen=True)
class Restored:
    """A checkpoint that was loaded."""

    step: int
    data: DataState
    meters: torch.Tensor
    """What this rank had summed up since the last logged step."""


@dataclass
class _Pending:
    """A state that is being written while training goes on."""

    step: int
    data: DataState
    written: "Future[FileRecord]"


class Checkpointer:
    """Saves, finds and loads the checkpoints of one model of one stage. All methods but `ready` are collective."""

    def __init__(
        self,
        folder: Path,
        world: World,
        identity: Identity,
        topology: Topology,
        config: CheckpointConfig,
        fence: Fence | None = None,
    ) -> None:
        """Work in `folder`.

        Args:
            folder: checkpoints/ of a unit.
            world: this rank among the others.
            identity: a checkpoint of another one is refused.
            topology: of this job; checkpoints of another one are taken over.
            config: how many are kept, and whether training goes on while one is written.
            fence: the lock that rank 0 holds, None on other ranks and where nobody locks.
        """
        self.folder, self.world, self.identity = folder, world, identity
        self.topology, self.config, self.fence = topology, config, fence
        self._pending: _Pending | None = None
        self._mark: str | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if config.asynchronous else None

    # --- saving -------------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether a state is being written in the background, and this rank's part of it is there."""
        return self._pending is not None and self._pending.written.done()

    def save(self, engine: TrainingEngine, step: int, data: DataState, meters: torch.Tensor) -> None:
        """Save the full state after `step` updates; what is on disk before stays until the commit.

        With `asynchronous` the state is copied, where the memory of all hosts holds the copies, and committed by a later
        `finish`: training may go on.

        Args:
            engine: gives weights and optimizer.
            step: updates done.
            data: where training stands in its data.
            meters: this rank's sums since the last logged step, so that the next logged means are exact too.

        Raises:
            RunDirectoryError: on every rank, when any rank could not write its part.
            CheckpointError: a number of the state is not finite.
        """
        self.finish()
        if self._is_committed(step):
            return
        state, copied = self._stage(step, engine, meters)
        path = self._staging(step) / file_name(self.world.rank)
        if copied and self._writer is not None:
            self._pending = _Pending(step, data, self._writer.submit(_write, path, state))
        else:
            self._finish(step, data, lambda: _write(path, state))

    def finish(self) -> None:
        """Commit what is being written, after waiting for it; nothing when nothing is.

        Raises:
            RunDirectoryError, CheckpointError: see `save`.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        self._finish(pending.step, pending.data, pending.written.result)

    def _finish(self, step: int, data: DataState, write: Callable[[], FileRecord]) -> None:
        try:
            records = together(write, f"write its part of step {step}")
            fsops.hit("checkpoint.written")
            together(lambda: self._commit(step, data, records), f"commit step {step}")
        except CogView2Error as error:
            if self.world.is_first:
                with contextlib.suppress(
                    OSError, CogView2Error
                ):  # the disk that failed; the next start tries again
                    fsops.discard(self._staging(step))
            raise type(error)(f"{error}; the checkpoint before is untouched") from error

    def _is_committed(self, step: int) -> bool:
        """Return whether the step has a good checkpoint already; a bad one of that step is moved away first."""

        def look() -> bool:
            folder = self.folder / folder_name(step)
            if not folder.exists():
                return False
            try:
                verify(folder)
            except CheckpointError as error:
                self._put_aside(folder, str(error))
                return False
            return True

        return any(together(look if self.world.is_first else lambda: False, f"look at step {step}"))

    def _stage(self, step: int, engine: TrainingEngine, meters: torch.Tensor) -> tuple[RankState, bool]:
        """Return what this rank writes, and whether it is a copy; make an empty staging folder for all of them."""
        taken: list[RankState] = []

        def take() -> Need:
            state = engine.state()
            state.own |= random_state() | {"meters": meters}
            taken.append(state)
            return Need(socket.gethostname(), state.nbytes, available_bytes() if self._writer else None)

        needs = together(take, f"take the state of step {step}")
        problem = lack(needs) if self._writer is not None else None
        copied = self._writer is not None and problem is None
        if problem is not None and self.world.is_first:
            logger.warning("training waits while step %d is written: %s", step, problem)

        def make() -> str | None:
            if copied:
                taken[0] = taken[0].copy()
            if not self.world.is_first:
                return None
            self._own()
            fsops.require_space(self.folder, int(sum(need.size for need in needs) * _SPARE))
            self._mark = secrets.token_hex(4)
            fsops.make_dirs(self._staging(step))
            return self._mark

        self._mark = together(make, f"make room for step {step}")[0]
        return taken[0], copied

    def _staging(self, step: int) -> Path:
        """Return the staging folder of a step: another job's would be another one, even if both believe in their lock."""
        return self.folder / f".staging.{folder_name(step)}.{self._mark}"

    def _own(self) -> None:
        """Make sure, on rank 0, that no other job took the run over: before anything is moved or committed."""
        if self.fence is not None:
            self.fence.check()

    def _commit(self, step: int, data: DataState, records: list[FileRecord]) -> None:
        if not self.world.is_first:
            return
        staging, target = self._staging(step), self.folder / folder_name(step)
        text = json.dumps(data.to_dict(), indent=2).encode() + b"\n"
        fsops.write_bytes(staging / DATA_STATE, text)
        files = {file_name(rank): record for rank, record in enumerate(records)}
        files[DATA_STATE] = FileRecord(len(text), hashlib.sha256(text).hexdigest())
        manifest = Manifest(
            step=step,
            fingerprint=self.identity.fingerprint,
            settings=self.identity.settings,
            topology=self.topology,
            token=self.fence.token if self.fence is not None else 0,
            versions=package_versions(),
            time=time.time(),
            files=dict(sorted(files.items())),
        )
        fsops.write_text(staging / MANIFEST, manifest.text())
        fsops.fsync_dir(staging)
        self._own()  # a job that was paused for long must not commit into a run that another one took over
        fsops.hit("checkpoint.before_rename")
        fsops.replace(staging, target)
        fsops.hit("checkpoint.after_rename")
        logger.info("committed %s (%d bytes, sha256 %s)", target, manifest.size, manifest.sha256[:16])
        try:
            fsops.write_json(self._marker, {"step": step, "sha256": manifest.sha256})
            fsops.write_text(self.folder / "latest", f"{target.name}\n")
            self._retire()
        except (
            OSError,
            CogView2Error,
        ) as error:  # the step is committed; what is left over goes with the next one
            logger.warning("%s is committed, but then: %s", target, error)

    @property
    def _marker(self) -> Path:
        return self.folder.parent / COMMITTED

    def _retire(self) -> None:
        """Delete what is not kept; only ever after a commit."""
        every = self.config.keep_every
        for old in committed_steps(self.folder)[: -self.config.keep_last]:
            if every == 0 or old % every:
                fsops.remove_tree(self.folder / folder_name(old))

    # --- loading ------------------------------------------------------------------------------------------------

    def restore(self, engine: TrainingEngine) -> Restored | None:
        """Load the newest good checkpoint, or return None when there never was one; bad ones go to quarantine/.

        Raises:
            CheckpointError: only bad ones are left, or the newest good one belongs to another configuration.
        """
        begin = time.monotonic()
        self._abandon()
        on_first(self._clean, f"clean {self.folder}")
        bad: list[str] = []
        while True:
            found = on_first(lambda: self._newest(bad), f"look through {self.folder}")
            if found is None:
                return None
            problem = self._check_content(found)
            if problem is None:
                restored = self._load(engine, found)
                logger.info("restored in %.2f s", time.monotonic() - begin)
                return restored
            bad.append(problem)
            folder = self.folder / folder_name(found.step)
            on_first(partial(self._put_aside, folder, problem), f"move {folder} to {_QUARANTINE}/")

    def _abandon(self) -> None:
        """Forget a state that is still being written: training goes back behind it."""
        if self._pending is not None:
            self._pending.written.exception()  # wait for it
            self._pending = None

    def _clean(self) -> None:
        self._own()
        found = [path for what in (".staging.*", ".trash.*", ".tmp.*") for path in self.folder.glob(what)]
        found += self.folder.parent.glob(".tmp.*")  # of COMMITTED.json and of logs
        for leftover in found:
            try:
                fsops.discard(leftover)
            except (OSError, CogView2Error) as error:  # somebody reads it; it takes space, and harms nobody
                logger.warning("cannot delete %s: %s", leftover, error)

    def _newest(self, bad: list[str]) -> Manifest | None:
        """Return the newest checkpoint whose manifest is good; None when there never was one.

        Raises:
            UnreadableError: one cannot be judged now.
            CheckpointError: none may be used.
        """
        for step in reversed(committed_steps(self.folder)):
            folder = self.folder / folder_name(step)
            try:
                manifest = read_manifest(folder)
            except UnreadableError:
                raise
            except CheckpointError as error:
                bad.append(str(error))
                self._put_aside(folder, str(error))
                continue
            if manifest.fingerprint != self.identity.fingerprint:
                raise CheckpointError(f"{folder} {self.identity.difference(manifest)}")
            if manifest.topology.precision != self.topology.precision:
                raise CheckpointError(
                    f"{folder} was saved with {manifest.topology}, this job has {self.topology}: another precision is "
                    "another training; restore the DeepSpeed JSON, or start a new run from its weights (init_from)"
                )
            committed = self._newest_committed()
            if committed is not None and committed > step:
                logger.warning(
                    "step %d was committed, but %s is the newest good one: %s", committed, folder, bad or "?"
                )
            return manifest
        # Also those of earlier attempts: the same command given twice must not begin at step 0.
        bad = bad + sorted(f"{path} is damaged" for path in (self.folder / _QUARANTINE).glob("step_*"))
        committed = self._newest_committed()
        if committed is None and not bad:
            return None
        reason = f": {bad[0]}" if bad else f" in {self.folder}"
        raise CheckpointError(
            f"step {committed or '?'} was committed, but no good checkpoint is left{reason}; restore one, or delete "
            f"{self.folder} and {self._marker} to begin at step 0"
        )

    def _newest_committed(self) -> int | None:
        """Return the newest step that was ever committed, as the marker says; None when there is no marker."""
        try:
            return int(json.loads(self._marker.read_text(encoding="utf-8"))["step"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UnreadableError(
                f"{self._marker} cannot be read ({error}), so whether this stage was trained before is not known; restore "
                "it, or delete it with its stage's folder to begin at step 0"
            ) from error

    def _check_content(self, manifest: Manifest) -> str | None:
        """Return what is wrong with the files of a checkpoint; every rank reads its share of them."""
        folder = self.folder / folder_name(manifest.step)
        mine = sorted(manifest.files)[self.world.rank :: self.world.size]
        problems = together(lambda: damage(folder, manifest, mine), f"read {folder}")
        return next((problem for problem in problems if problem is not None), None)

    def _put_aside(self, folder: Path, reason: str) -> None:
        self._own()
        logger.warning("%s; moved to %s/, the one before is tried", reason, _QUARANTINE)
        fsops.make_dirs(self.folder / _QUARANTINE)
        number = 0
        while (target := self.folder / _QUARANTINE / f"{folder.name}.{number}").exists():
            number += 1
        fsops.replace(folder, target)

    def _load(self, engine: TrainingEngine, manifest: Manifest) -> Restored:
        folder = self.folder / folder_name(manifest.step)
        data, reader = open_together(folder, manifest, self.world)
        engine.load(reader)
        same = manifest.topology == self.topology
        meters = take_own_over(reader, self.world, None if same else self.identity.seed + manifest.step)
        if same:
            logger.info("resumed from %s", folder)
        else:
            logger.warning(
                "resumed from %s: saved with %s, taken over to %s; dropout draws other numbers now",
                folder,
                manifest.topology,
                self.topology,
            )
        return Restored(manifest.step, data, meters)


def _write(path: Path, state: RankState) -> FileRecord:
    digest, size = write_rank_state(path, state)
    return FileRecord(size, digest)
