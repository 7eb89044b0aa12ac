"""Checkpoints that exist whole or not at all: staging, manifest, one rename (docs/reliability.md).

checkpoints/step_000001200/{rank_00000.safetensors, ..., data_state.json, MANIFEST.json}
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from cogview2.pipeline import fsops
from cogview2.pipeline.config.training import CheckpointConfig
from cogview2.pipeline.data.sample_plan import DataState
from cogview2.pipeline.distributed.process import World, barrier, broadcast_object, gather_objects
from cogview2.pipeline.distributed.seeding import (
    load_random_state,
    random_state,
    seed_everything,
)
from cogview2.pipeline.errors import CheckpointError, CogView2Error, RunDirectoryError
from cogview2.pipeline.stage_dir import package_versions
from cogview2.pipeline.training.engine import TrainingEngine
from cogview2.pipeline.training.state.files import RankState, StateReader, file_name, write_rank_state
from cogview2.pipeline.training.state.manifest import (
    DATA_STATE,
    MANIFEST,
    FileRecord,
    Manifest,
    Topology,
    committed_steps,
    damage,
    folder_name,
    read_manifest,
    verify,
)

T = TypeVar("T")
logger = logging.getLogger(__name__)
COMMITTED = "COMMITTED.json"
"""Beside checkpoints/: the newest step that was ever committed, so that a stage that lost all of them never begins at 0."""
_QUARANTINE = "quarantine"
_SPARE = 1.2
"""Free space must be this much more than what is to be written."""


class Fence(Protocol):
    """The lock under which this job works."""

    token: int

    def check(self) -> None:
        """Raise LockedError when another job has taken the lock over."""


@dataclass(frozen=True)
class Identity:
    """What a checkpoint must agree with to be resumed."""

    fingerprint: str
    settings: dict[str, Any] = field(default_factory=dict)
    """The values behind the fingerprint, by dotted key."""
    seed: int = 0


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
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if config.asynchronous else None

    # --- saving -------------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether a state is being written in the background, and this rank's part of it is there."""
        return self._pending is not None and self._pending.written.done()

    def save(self, engine: TrainingEngine, step: int, data: DataState, meters: torch.Tensor) -> None:
        """Save the full state after `step` updates; what is on disk before stays until the commit.

        With `asynchronous` the state is copied, and committed by a later `finish`: training may go on.

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
        state = self._stage(step, engine, meters)
        path = self._staging(step) / file_name(self.world.rank)
        if self._writer is not None:
            self._pending = _Pending(step, data, self._writer.submit(_write, path, state.copy()))
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
        fsops.hit("checkpoint.staged")
        records = self._together(write, f"write its part of step {step}")
        fsops.hit("checkpoint.written")
        self._together(lambda: self._commit(step, data, records), f"commit step {step}")

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

        return any(self._together(look if self.world.is_first else lambda: False, f"look at step {step}"))

    def _stage(self, step: int, engine: TrainingEngine, meters: torch.Tensor) -> RankState:
        """Return what this rank writes, and make room for what all of them do: an empty staging folder."""
        taken: list[RankState] = []

        def take() -> int:
            state = engine.state()
            state.own |= random_state() | {"meters": meters}
            taken.append(state)
            tensors = [*state.entries.values(), *state.own.values()]
            return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

        total = sum(self._together(take, f"take the state of step {step}"))

        def make() -> None:
            if self.world.is_first:
                staging = self._staging(step)
                fsops.require_space(self.folder, int(total * _SPARE))
                if staging.exists():
                    fsops.discard(staging)
                fsops.make_dirs(staging)

        self._together(make, f"make room for step {step}")
        return taken[0]

    def _staging(self, step: int) -> Path:
        return self.folder / f".staging.{folder_name(step)}"

    def _together(self, action: Callable[[], T], what: str) -> list[T]:
        """Run `action` on all ranks and return what it gave; learn whether it failed anywhere, so that no rank waits."""
        problem: tuple[bool, str] | None = None
        value: Any = None
        try:
            value = action()
        except Exception as error:  # reported below, on all ranks
            logger.log(logging.ERROR, "could not %s", what, exc_info=not isinstance(error, CogView2Error))
            cannot_write = isinstance(error, OSError | RunDirectoryError)
            problem = cannot_write, f"rank {self.world.rank} could not {what}: {error}"
        answers = gather_objects((value, problem))
        problems = [problem for _, problem in answers if problem is not None]
        if problems:
            cannot_write, words = problems[0]
            kind = RunDirectoryError if cannot_write else CheckpointError
            raise kind(f"{words}; the checkpoint before is untouched")
        return [value for value, _ in answers]

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
        if self.fence is not None:
            self.fence.check()  # a job that was paused for long must not commit into a run that another one took over
        fsops.hit("checkpoint.before_rename")
        fsops.replace(staging, target)
        fsops.hit("checkpoint.after_rename")
        fsops.write_json(self._marker, {"step": step, "sha256": manifest.sha256})
        fsops.write_text(self.folder / "latest", f"{target.name}\n")
        logger.info("committed %s (%d bytes, sha256 %s)", target, manifest.size, manifest.sha256[:16])
        self._retire()

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
        self._abandon()
        self._together(self._clean if self.world.is_first else lambda: None, f"clean {self.folder}")
        bad: list[str] = []
        while True:
            found = broadcast_object(self._newest(bad) if self.world.is_first else None)
            if isinstance(found, CheckpointError):
                raise found
            if found is None:
                return None
            problem = self._check_content(found)
            if problem is None:
                break
            bad.append(problem)
            if self.world.is_first:
                self._put_aside(self.folder / folder_name(found.step), problem)
            barrier()
        return self._load(engine, found)

    def _abandon(self) -> None:
        """Forget a state that is still being written: training goes back behind it."""
        if self._pending is not None:
            self._pending.written.exception()  # wait for it
            self._pending = None

    def _clean(self) -> None:
        for pattern in (".staging.*", ".trash.*", ".tmp.*"):
            for leftover in self.folder.glob(pattern):
                fsops.discard(leftover)

    def _newest(self, bad: list[str]) -> Manifest | CheckpointError | None:
        """Return the newest checkpoint whose manifest is good, or why there is none to be used."""
        for step in reversed(committed_steps(self.folder)):
            folder = self.folder / folder_name(step)
            try:
                manifest = read_manifest(folder)
            except CheckpointError as error:
                bad.append(str(error))
                self._put_aside(folder, str(error))
                continue
            if manifest.fingerprint != self.identity.fingerprint:
                return CheckpointError(f"{folder} {self._difference(manifest)}")
            if manifest.topology.precision != self.topology.precision:
                return CheckpointError(
                    f"{folder} was saved with {manifest.topology}, this job has {self.topology}: another precision is "
                    "another training; restore the DeepSpeed JSON, or start a new run from its weights (init_from)"
                )
            return manifest
        return self._nothing_left(bad)

    def _nothing_left(self, bad: list[str]) -> CheckpointError | None:
        # Also those of earlier attempts: the same command given twice must not begin at step 0.
        bad = bad + sorted(f"{path} is damaged" for path in (self.folder / _QUARANTINE).glob("step_*"))
        try:
            step = json.loads(self._marker.read_text(encoding="utf-8"))["step"]
        except FileNotFoundError:
            if not bad:
                return None
            step = "?"
        except (OSError, ValueError, KeyError, TypeError) as error:
            return CheckpointError(
                f"{self._marker} cannot be read ({error}), so whether this stage was trained before is not known; restore "
                "it, or delete it with its stage's folder to begin at step 0"
            )
        reason = f": {bad[0]}" if bad else f" in {self.folder}"
        return CheckpointError(
            f"step {step} was committed, but no good checkpoint is left{reason}; restore one, or delete {self.folder} and "
            f"{self._marker} to begin at step 0"
        )

    def _difference(self, manifest: Manifest) -> str:
        """Return in words what differs between the settings of a checkpoint and those of now."""
        old, new = manifest.settings, self.identity.settings
        keys = [key for key in (*new, *(k for k in old if k not in new)) if old.get(key) != new.get(key)]
        if not keys:
            return "was trained from other inputs or by another version; restore them, or start a new run"
        more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
        was, now = old.get(keys[0], "nothing"), new.get(keys[0], "nothing")
        return (
            f"was trained with {keys[0]} = {was}, this job has {now}{more}; restore the old value, or set the stage aside "
            "and train it anew with --restart-stale"
        )

    def _check_content(self, manifest: Manifest) -> str | None:
        """Return what is wrong with the files of a checkpoint; every rank reads its share of them."""
        folder = self.folder / folder_name(manifest.step)
        mine = sorted(manifest.files)[self.world.rank :: self.world.size]
        problems = gather_objects(damage(folder, manifest, mine))
        return next((problem for problem in problems if problem is not None), None)

    def _put_aside(self, folder: Path, reason: str) -> None:
        logger.warning("%s; moved to %s/, the one before is tried", reason, _QUARANTINE)
        fsops.make_dirs(self.folder / _QUARANTINE)
        number = 0
        while (target := self.folder / _QUARANTINE / f"{folder.name}.{number}").exists():
            number += 1
        fsops.replace(folder, target)

    def _load(self, engine: TrainingEngine, manifest: Manifest) -> Restored:
        folder = self.folder / folder_name(manifest.step)
        data = DataState.from_dict(json.loads((folder / DATA_STATE).read_text(encoding="utf-8")))
        reader = StateReader(folder)
        self._together(lambda: engine.load(reader), f"load {folder}")
        if manifest.topology == self.topology:
            own = reader.own(self.world.rank)
            load_random_state(own)
            meters = own["meters"]
            logger.info("resumed from %s", folder)
        else:
            # No rank of now is one of then: new random streams, made of the step, and one rank holds all sums.
            seed_everything(self.identity.seed + manifest.step, self.world.rank + 1)
            sums = [reader.own(rank)["meters"] for rank in range(reader.ranks)]
            meters = torch.stack(sums).sum(0) if self.world.is_first else torch.zeros_like(sums[0])
            logger.warning(
                "resumed from %s: saved with %s, taken over to %s; dropout draws other numbers than it would have",
                folder,
                manifest.topology,
                self.topology,
            )
        return Restored(manifest.step, data, meters)


def _write(path: Path, state: RankState) -> FileRecord:
    digest, size = write_rank_state(path, state)
    return FileRecord(size, digest)
