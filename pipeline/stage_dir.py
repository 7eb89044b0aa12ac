"""The folder of one stage: attempts, checkpoints, logs, outputs, and the record that it is done."""

import contextlib
import importlib.metadata
import json
import math
import platform
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cogview2.pipeline import fsops
from cogview2.pipeline.attempt import Attempt
from cogview2.pipeline.errors import DataError, RunDirectoryError
from cogview2.pipeline.locking import Held, exclusive, is_held

_NAME = re.compile(r"[a-z][a-z0-9_]*(/[a-z][a-z0-9_]*)?")
_RECORDED_PACKAGES = ("cogview2", "torch", "deepspeed", "numpy", "sentencepiece", "webdataset", "pydantic")


@dataclass(frozen=True)
class OutputFile:
    """One file that a stage made."""

    sha256: str
    size: int


@dataclass(frozen=True)
class DoneRecord:
    """DONE.json: the only proof that a stage is done."""

    stage: str
    fingerprint: str
    inputs: dict[str, str]
    """`stage/path` -> sha256 of what it read from the stages before it."""
    outputs: dict[str, OutputFile]
    """Path below the stage's folder -> what was written there."""
    versions: dict[str, str]
    time: float
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Heartbeat:
    """What a running stage last said about itself."""

    stage: str
    step: int
    steps: int
    loss: float | None
    throughput: float | None
    unit: str
    eta_seconds: float | None
    message: str
    time: float
    meters: dict[str, float] = field(default_factory=dict)
    """What was measured, by the names of metrics.jsonl; empty where nothing trains."""
    slowest: str | None = None
    """The rank that the others wait for (its ratio is `slowest_ratio` of the meters), or None in an even job."""


def package_versions() -> dict[str, str]:
    """Return the versions that a result depends on, without importing the packages."""
    versions = {"python": platform.python_version()}
    for name in _RECORDED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


class StageDirectory:
    """stages/<name>/, or stages/<name>/<part>/ for one model of a stage that trains two."""

    def __init__(self, path: Path, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise RunDirectoryError(f"{name!r} is not a stage name; use for example train_vqvae")
        self.path = Path(path)
        self.name = name

    @property
    def output(self) -> Path:
        """What the next stages read."""
        return self.path / "output"

    @property
    def checkpoints(self) -> Path:
        """Full resumable states."""
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        """Pictures drawn on the way."""
        return self.path / "samples"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def metrics(self) -> Path:
        """metrics.jsonl: one JSON object a logged step."""
        return self.path / "metrics.jsonl"

    @property
    def done_path(self) -> Path:
        """DONE.json."""
        return self.path / "DONE.json"

    @property
    def heartbeat_path(self) -> Path:
        """heartbeat.json."""
        return self.path / "heartbeat.json"

    @property
    def lock_path(self) -> Path:
        """stage.lock, held by rank 0 while it works."""
        return self.path / "stage.lock"

    def create(self) -> "StageDirectory":
        """Make the folders of the stage; existing ones are fine. Returns the stage."""
        for folder in (self.path, self.output, self.checkpoints, self.samples, self.tensorboard):
            fsops.make_dirs(folder)
        return self

    def attempts(self) -> list[Attempt]:
        """Return the attempts so far, oldest first."""
        folders = [path for path in (self.path / "attempts").glob("[0-9]*") if path.name.isdigit()]
        return [Attempt(path) for path in sorted(folders, key=lambda path: int(path.name))]

    def latest_attempt(self) -> Attempt | None:
        """Return the newest attempt, or None when the stage was never started."""
        attempts = self.attempts()
        return attempts[-1] if attempts else None

    def attempt(self, number: int) -> Attempt:
        """Return the attempt with this number; it must exist."""
        path = self.path / "attempts" / f"{number:04d}"
        if not path.is_dir():
            raise RunDirectoryError(f"{path} does not exist; start the stage with `cogview2 run`")
        return Attempt(path)

    def new_attempt(self) -> Attempt:
        """Create the folder of the next attempt."""
        latest = self.latest_attempt()
        path = self.path / "attempts" / f"{latest.number + 1 if latest else 1:04d}"
        fsops.make_dirs(path)
        fsops.fsync_dir(path.parent)
        return Attempt(path)

    def lock(self, purpose: str) -> contextlib.AbstractContextManager[Held]:
        """Hold the stage: rank 0 does, so that a rank that outlived its launcher is found (LockedError)."""
        fsops.make_dirs(self.path)
        return exclusive(self.lock_path, purpose)

    def is_running(self) -> bool:
        """Return whether some rank 0 holds the stage now."""
        return is_held(self.lock_path)

    def output_files(self) -> list[Path]:
        """Return every finished file below output/, sorted; names that start with a dot are not finished."""
        files = [path for path in self.output.rglob("*") if path.is_file()]
        return sorted(
            path
            for path in files
            if not any(part.startswith(".") for part in path.relative_to(self.output).parts)
        )

    def write_done(
        self,
        inputs: dict[str, str],
        outputs: Iterable[Path],
        fingerprint: str,
        extra: dict[str, Any] | None = None,
    ) -> DoneRecord:
        """Record that the stage is done; the last thing a stage does.

        Args:
            inputs: what it read, from `RunDirectory.inputs`.
            outputs: the files it made, below its folder (usually `output_files()`); synced and hashed here.
            fingerprint: from `RunDirectory.fingerprint`.
            extra: plain values worth keeping, for example the final loss.
        """
        made: dict[str, OutputFile] = {}
        folders = set()
        for path in outputs:
            fsops.fsync_file(path)
            folders.add(path.parent)
            made[path.relative_to(self.path).as_posix()] = OutputFile(
                fsops.sha256_file(path), path.stat().st_size
            )
        for folder in sorted(folders):
            fsops.fsync_dir(folder)
        record = DoneRecord(
            self.name, fingerprint, dict(inputs), made, package_versions(), time.time(), extra or {}
        )
        fsops.write_json(self.done_path, asdict(record))
        return record

    def done(self) -> DoneRecord | None:
        """Return the record that the stage is done, or None; a damaged one is refused."""
        try:
            content = json.loads(self.done_path.read_text(encoding="utf-8"))
            outputs = {name: OutputFile(**file) for name, file in content.pop("outputs").items()}
            return DoneRecord(outputs=outputs, **content)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise RunDirectoryError(
                f"{self.done_path} is damaged ({error}); delete it to run stage {self.name} again"
            ) from error

    def check_outputs(self, record: DoneRecord) -> None:
        """Refuse outputs that are gone or have another size than when the stage was done; all of them are named.

        Raises:
            DataError: what the next stages read is not whole.
        """
        problems: list[str] = []
        for name, made in record.outputs.items():
            path = self.path / name
            size = path.stat().st_size if path.is_file() else None
            if size != made.size:
                problems.append(
                    f"{name} {'is gone' if size is None else f'has {size} bytes'} ({made.size} were made)"
                )
        if problems:
            raise DataError(
                f"{self.path} does not hold what stage {self.name} made: {'; '.join(problems)}; "
                f"restore this, or delete {self.done_path} to run the stage again"
            )

    def is_stale(self, fingerprint: str) -> bool:
        """Return whether the stage is done, but from another section, seed or input than `fingerprint`."""
        record = self.done()
        return record is not None and record.fingerprint != fingerprint

    def write_heartbeat(
        self,
        step: int,
        steps: int,
        *,
        loss: float | None = None,
        throughput: float | None = None,
        unit: str = "samples/s",
        eta_seconds: float | None = None,
        message: str = "",
        meters: Mapping[str, float] | None = None,
        slowest: str | None = None,
    ) -> None:
        """Say how far the stage is; rank 0 does so every few seconds. A non-finite number becomes null."""
        beat = Heartbeat(
            self.name,
            step,
            steps,
            _finite(loss),
            _finite(throughput),
            unit,
            _finite(eta_seconds),
            message,
            time.time(),
            {name: value for name, value in (meters or {}).items() if math.isfinite(value)},
            slowest,
        )
        fsops.write_json(self.heartbeat_path, asdict(beat), durable=False)

    def heartbeat(self) -> Heartbeat | None:
        """Return the newest heartbeat of the stage or of its parts, or None."""
        found: list[Heartbeat] = []
        for path in (self.heartbeat_path, *self.path.glob("[a-z]*/heartbeat.json")):
            with contextlib.suppress(OSError, ValueError, TypeError):
                found.append(Heartbeat(**json.loads(path.read_text(encoding="utf-8"))))
        return max(found, key=lambda beat: beat.time, default=None)
