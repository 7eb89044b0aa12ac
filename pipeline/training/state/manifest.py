"""What a committed checkpoint consists of: MANIFEST.json, read and checked without torch."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cogview2.pipeline import fsops
from cogview2.pipeline.distributed import watchdog
from cogview2.pipeline.errors import CheckpointError, ExitCode

MANIFEST, DATA_STATE = "MANIFEST.json", "data_state.json"
FORMAT = 2
_STEP = re.compile(r"step_(\d{9,})")
_MAX_BYTES = 64 * 1024 * 1024
_REMEDY = "look at the disk or mount on this host, and give the same command again"


class UnreadableError(CheckpointError):
    """A checkpoint that cannot be judged: the disk or network does not give it, or another version wrote it. Nothing is wrong
    with it, as far as is known, so it must stay where it is."""

    exit_code = ExitCode.CANNOT_WRITE


def unreadable(path: Path, error: Exception) -> UnreadableError:
    """Return the error that says that the disk does not give `path` now."""
    return UnreadableError(
        f"{path} cannot be read now ({getattr(error, 'strerror', None) or error}); {_REMEDY}"
    )


@dataclass(frozen=True)
class Topology:
    """How the job was cut that wrote a checkpoint."""

    ranks: int
    pipe_stages: int
    zero: int
    precision: str
    """In words, see config.deepspeed.precision; masters are always float32."""

    def __str__(self) -> str:
        pipes = f", {self.pipe_stages} pipe stages" if self.pipe_stages > 1 else ""
        return f"{self.ranks} rank{'s' if self.ranks > 1 else ''}, ZeRO {self.zero}{pipes}, {self.precision}"


@dataclass(frozen=True)
class FileRecord:
    """One file of a checkpoint."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What was committed."""

    step: int
    fingerprint: str
    """Of everything that the result depends on (RunDirectory.fingerprint)."""
    settings: dict[str, Any]
    """The values behind the fingerprint, by dotted key, to say what differs."""
    topology: Topology
    token: int
    """Fencing token of the lock under which it was committed; 0 without a lock."""
    versions: dict[str, str]
    time: float
    files: dict[str, FileRecord]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())

    def text(self) -> str:
        """Return it as the text of MANIFEST.json, which ends with its own sha256."""
        plain = {"format": FORMAT, **asdict(self)}
        return json.dumps(plain | {"sha256": _digest(plain)}, indent=1, ensure_ascii=False) + "\n"

    @property
    def sha256(self) -> str:
        """The digest of everything in it, that of every file included."""
        return _digest({"format": FORMAT, **asdict(self)})


def _digest(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def folder_name(step: int) -> str:
    """Return the name of a checkpoint's folder."""
    return f"step_{step:09d}"


def step_of(folder: Path) -> int | None:
    """Return the step in the name of a checkpoint's folder; None for other names."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else None


def committed_steps(checkpoints: Path) -> list[int]:
    """Return the steps that have a checkpoint folder, ascending, good or not; times and `latest` do not count."""
    found = [step_of(path) for path in checkpoints.glob("step_*") if path.is_dir() and not path.is_symlink()]
    return sorted(step for step in found if step is not None)


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint, checked against itself and against the names and sizes of the files.

    No content of another file is read: `damage` does that.

    Raises:
        CheckpointError: naming the first thing that is wrong.
        UnreadableError: it could not be read, or has another format.
    """
    path = folder / MANIFEST
    try:
        # A pipe of that name would let the reader wait for ever.
        if folder.is_symlink() or path.is_symlink() or (path.exists() and not path.is_file()):
            raise CheckpointError(f"{path} is a link or no plain file; a checkpoint is real files only")
        if path.stat().st_size > _MAX_BYTES:
            raise CheckpointError(f"{path} is larger than {_MAX_BYTES} bytes, which no manifest is")
        text = path.read_bytes().decode("utf-8")
        plain = json.loads(text)
        written = plain.pop("sha256")
        if plain.get("format") != FORMAT:
            raise UnreadableError(
                f"{path} has format {plain.get('format')!r}, this version reads {FORMAT}; use the version that wrote it"
            )
        if _digest(plain) != written:
            raise CheckpointError(f"{path} does not agree with itself: its own sha256 differs")
        files = {name: FileRecord(**record) for name, record in plain.pop("files").items()}
        topology = Topology(**plain.pop("topology"))
        del plain["format"]
        manifest = Manifest(topology=topology, files=files, **plain)
        if manifest.text() != text:
            raise CheckpointError(f"{path} is not as it was written")
        _check_files(folder, manifest)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} has no {MANIFEST}, or lost a file while it was looked at") from error
    except OSError as error:
        raise unreadable(folder, error) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is no manifest ({error})") from error
    return manifest


def _check_files(folder: Path, manifest: Manifest) -> None:
    if folder_name(manifest.step) != folder.name:
        raise CheckpointError(
            f"{folder} holds the checkpoint of step {manifest.step}: it was renamed or copied"
        )
    found: dict[str, Path] = {}
    for path in folder.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise CheckpointError(f"{path} is a link or no plain file; a checkpoint is real files only")
        if path.is_file() and path.name != MANIFEST:
            found[path.relative_to(folder).as_posix()] = path
    for name in sorted(set(found) ^ set(manifest.files)):
        state = "is not of this checkpoint" if name in found else "is gone"
        raise CheckpointError(f"{folder / name} {state}")
    for name, path in sorted(found.items()):
        size, expected = path.stat().st_size, manifest.files[name].size
        if size != expected:
            raise CheckpointError(f"{path} has {size} bytes, {expected} were committed")


def damage(folder: Path, manifest: Manifest, names: Iterable[str] | None = None) -> str | None:
    """Return what is wrong with the content of files of a checkpoint, or None.

    Args:
        folder: of the checkpoint.
        manifest: of `read_manifest`.
        names: the files to read; all of them by default.

    Raises:
        UnreadableError: a file could not be read.
    """
    for name in sorted(manifest.files if names is None else names):
        watchdog.progress()
        try:
            if fsops.sha256_file(folder / name) != manifest.files[name].sha256:
                return f"{folder / name} is damaged: its sha256 is not the one that was committed"
        except OSError as error:
            raise unreadable(folder / name, error) from error
    return None


def verify(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint after reading every file of it.

    Raises:
        CheckpointError: naming the first thing that is wrong.
    """
    manifest = read_manifest(folder)
    problem = damage(folder, manifest)
    if problem is not None:
        raise CheckpointError(problem)
    return manifest
