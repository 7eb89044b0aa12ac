"""Checkpoints that exist whole or not at all: staging, manifest, one rename (docs/reliability.md).

checkpoints/step_000001200/{ds/..., data_state.json, rng_rank0.pt, meters_rank0.pt, ..., MANIFEST.json}
"""

import hashlib
import json
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cogview2.pipeline import fsops
from cogview2.pipeline.data.sample_plan import DataState
from cogview2.pipeline.distributed.process import World, barrier, broadcast_object, gather_objects
from cogview2.pipeline.distributed.seeding import load_random_state, save_random_state
from cogview2.pipeline.errors import CheckpointError
from cogview2.pipeline.training.engine import TrainingEngine

logger = logging.getLogger(__name__)
MANIFEST = "MANIFEST.json"
_FORMAT = 1
_STEP = re.compile(r"step_(\d{9})")


@dataclass(frozen=True)
class Restored:
    """A checkpoint that was loaded."""

    step: int
    data: DataState
    meters: torch.Tensor
    """What this rank had summed up since the last logged step."""


def _name(step: int) -> str:
    return f"step_{step:09d}"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def verify(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint after checking that every file is there, unchanged.

    Raises:
        CheckpointError: naming the first thing that is wrong.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        listed, step = dict(manifest["files"]), int(manifest["step"])
        digest = manifest.pop("sha256")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} has no readable {MANIFEST} ({error})") from error
    if digest != _digest(manifest) or folder.name != _name(step) or manifest["format"] != _FORMAT:
        raise CheckpointError(f"{folder / MANIFEST} does not agree with itself")
    found = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    if set(found) != set(listed):
        differing = sorted(set(found) ^ set(listed))
        raise CheckpointError(f"{folder} lacks or has too much: {', '.join(differing[:3])}")
    for name, path in found.items():
        if path.is_symlink() or path.stat().st_size != listed[name]["size"]:
            raise CheckpointError(f"{path} has another size than when it was committed")
        if fsops.sha256_file(path) != listed[name]["sha256"]:
            raise CheckpointError(f"{path} is damaged: its sha256 differs")
    return manifest


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


class Checkpointer:
    """Saves, finds and loads the checkpoints of one model of one stage. All methods are collective."""

    def __init__(self, folder: Path, world: World, fingerprint: str, keep_last: int) -> None:
        """Work in `folder`; a checkpoint of another `fingerprint` (config, seed, inputs) is refused."""
        self.folder, self.world, self.fingerprint, self.keep_last = folder, world, fingerprint, keep_last

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint folder, ascending, good or not."""
        matches = [_STEP.fullmatch(path.name) for path in self.folder.glob("step_*") if path.is_dir()]
        return sorted(int(match.group(1)) for match in matches if match)

    def save(self, engine: TrainingEngine, step: int, data: DataState, meters: torch.Tensor) -> None:
        """Commit the full state after `step` updates; what is on disk before stays until the rename.

        Args:
            engine: saves weights and optimizer.
            step: updates done.
            data: where training stands in its data.
            meters: this rank's sums since the last logged step, so that the next logged means are exact too.

        Raises:
            CheckpointError: on every rank, when any rank could not write its part.
        """
        target, staging = self.folder / _name(step), self.folder / f".staging.{_name(step)}"
        if broadcast_object(target.exists() if self.world.is_first else None):
            return
        if self.world.is_first:
            if staging.exists():
                shutil.rmtree(staging)
            fsops.make_dirs(staging)
        barrier()
        self._together(
            lambda: self._write_part(engine, staging, step, meters), f"write its part of {staging}"
        )
        self._together(lambda: self._commit(staging, target, step, data), f"commit {target}")

    def _together(self, action: Any, what: str) -> None:
        """Run `action` and learn whether it failed anywhere, so that no rank waits for one that gave up."""
        problem = None
        try:
            action()
        except Exception as error:  # reported below, on all ranks
            logger.exception("could not %s", what)
            problem = f"rank {self.world.rank} could not {what}: {error}"
        problems = [text for text in gather_objects(problem) if text]
        if problems:
            raise CheckpointError(f"{problems[0]}; the checkpoint before is untouched")

    def _write_part(self, engine: TrainingEngine, staging: Path, step: int, meters: torch.Tensor) -> None:
        engine.save(str(staging), step)
        torch.save(meters, staging / f"meters_rank{self.world.rank}.pt")
        save_random_state(staging / f"rng_rank{self.world.rank}.pt")

    def _commit(self, staging: Path, target: Path, step: int, data: DataState) -> None:
        if not self.world.is_first:
            return
        # DeepSpeed puts an executable script into every checkpoint; ours are data only.
        (staging / "zero_to_fp32.py").unlink(missing_ok=True)
        fsops.write_json(staging / "data_state.json", data.to_dict())
        files = {}
        for path in _files(staging):
            fsops.fsync_file(path)
            files[path.relative_to(staging).as_posix()] = {
                "size": path.stat().st_size,
                "sha256": fsops.sha256_file(path),
            }
        manifest = {
            "format": _FORMAT,
            "step": step,
            "fingerprint": self.fingerprint,
            "world_size": self.world.size,
            "files": files,
        }
        fsops.write_json(staging / MANIFEST, manifest | {"sha256": _digest(manifest)})
        for folder in sorted((path for path in staging.rglob("*") if path.is_dir()), reverse=True):
            fsops.fsync_dir(folder)
        fsops.fsync_dir(staging)
        fsops.replace(staging, target)
        fsops.write_text(self.folder / "latest", f"{target.name}\n")
        logger.info("committed %s", target)
        for old in self.steps()[: -self.keep_last]:
            fsops.remove_tree(self.folder / _name(old))

    def restore(self, engine: TrainingEngine) -> Restored | None:
        """Load the newest good checkpoint, or return None when there is none; bad ones go to quarantine/.

        Raises:
            CheckpointError: only bad ones exist, or the newest good one belongs to another configuration or
                number of ranks.
        """
        found = broadcast_object(self._find() if self.world.is_first else None)
        if isinstance(found, CheckpointError):
            raise found
        if found is None:
            return None
        step, world_size = found
        if world_size != self.world.size:
            raise CheckpointError(
                f"{self.folder / _name(step)} was saved by {world_size} ranks, this job has {self.world.size}; "
                f"start it with --set launch.ranks={world_size}"
            )
        folder = self.folder / _name(step)
        engine.load(str(folder))
        load_random_state(folder / f"rng_rank{self.world.rank}.pt")
        data = DataState.from_dict(json.loads((folder / "data_state.json").read_text(encoding="utf-8")))
        meters = torch.load(folder / f"meters_rank{self.world.rank}.pt", weights_only=True)
        logger.info("resumed from %s", folder)
        return Restored(step, data, meters)

    def _find(self) -> tuple[int, int] | CheckpointError | None:
        for pattern in (".staging.*", ".trash.*"):
            for leftover in self.folder.glob(pattern):
                shutil.rmtree(leftover)
        bad: list[str] = []
        for step in reversed(self.steps()):
            folder = self.folder / _name(step)
            try:
                manifest = verify(folder)
            except CheckpointError as error:
                logger.warning("%s; moved to quarantine, trying the one before", error)
                bad.append(str(error))
                fsops.make_dirs(self.folder / "quarantine")
                fsops.replace(folder, self._free_name(self.folder / "quarantine" / folder.name))
                continue
            if manifest["fingerprint"] != self.fingerprint:
                return CheckpointError(
                    f"{folder} was trained with another section, seed or input of the recipe; restore it, or start a new run"
                )
            return step, int(manifest["world_size"])
        # Also those of earlier attempts: the same command given twice must not begin at step 0.
        bad += sorted(f"{path} is damaged" for path in (self.folder / "quarantine").glob("step_*"))
        if bad:
            return CheckpointError(
                f"no good checkpoint is left: {bad[0]}; restore one, or delete {self.folder} to start at step 0"
            )
        return None

    @staticmethod
    def _free_name(path: Path) -> Path:
        number = 0
        while path.with_name(f"{path.name}.{number}").exists():
            number += 1
        return path.with_name(f"{path.name}.{number}")
