"""The only writer, renamer and deleter of durable files: what has its final name is whole.

Tests break the operations here: `hit` fails or kills the process at a named point, `recorder` sees each operation.
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogview2.pipeline.errors import RunDirectoryError

FILE_MODE = 0o640
DIRECTORY_MODE = 0o750
_CHUNK_BYTES = 4 * 1024 * 1024
_REMEDIES = {
    errno.ENOSPC: "the disk is full; free space (old checkpoints, old runs) and run the same command again",
    errno.EDQUOT: "the disk quota is used up; free space or ask for more, and run the same command again",
    errno.EFBIG: "the file is larger than this process may write; raise the limit (ulimit -f)",
    errno.EROFS: "the file system is read-only; choose another folder (--runs-dir) or remount it writable",
    errno.EACCES: "permission denied; choose another folder (--runs-dir) or change its owner or mode",
    errno.ENOTDIR: "a part of the path is a file, not a folder; choose another folder",
    errno.EISDIR: "there is a folder of that name; choose another name",
    errno.EEXIST: "a file of that name is in the way; choose another name",
    errno.ELOOP: "it is a symbolic link, and results are never written through one; remove the link",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.EPERM: "operation not permitted; choose another folder (--runs-dir) or change its owner or mode",
    errno.EIO: "the disk reports an input or output error; look at the system's log, and use another disk",
    errno.ESTALE: "the network file system lost the file; mount it again, and run the same command again",
}

recorder: Callable[[str, Path, Path | None], None] | None = None
"""Called after each operation that succeeded, by tests that replay power losses: mkdir, create (complete, not synced),
append, fsync, rename (source, target), fsync_dir, unlink."""

_ERRORS = {"exc": errno.EIO, "enospc": errno.ENOSPC, "erofs": errno.EROFS}
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


@dataclass(frozen=True)
class _Fault:
    action: str
    seconds: float
    rank: str | None
    number: int | None  # of the hit that fails, from 1; None: every one

    @classmethod
    def parse(cls, text: str) -> tuple[str, "_Fault"]:
        """Read `name:action[:rank=R][:n=K]`."""
        name, action, *rest = text.split(":")
        action, _, seconds = action.partition("=")
        options = dict(option.split("=", 1) for option in rest)
        if not name or action not in {*_ERRORS, *_SIGNALS, "delay"} or options.keys() - {"rank", "n"}:
            raise ValueError(f"COGVIEW2_FAULT: {text!r} is not name:action[:rank=R][:n=K]")
        number = options.get("n", "1")
        return name, cls(
            action, float(seconds or 0), options.get("rank"), None if number == "*" else int(number)
        )

    def strike(self, name: str) -> None:
        """Do the action to this process."""
        if self.action in _ERRORS:
            number = _ERRORS[self.action]
            raise OSError(number, f"{os.strerror(number)} (fault point {name})")
        if self.action == "delay":
            time.sleep(self.seconds)
        else:
            os.kill(os.getpid(), _SIGNALS[self.action])


_faults: dict[str, list[_Fault]] | None = None  # None: the environment was not read yet
_hits: dict[str, int] = {}


def _read_faults() -> dict[str, list[_Fault]]:
    global _faults
    _faults, told = {}, os.environ.get("COGVIEW2_FAULT", "")
    if os.environ.get("COGVIEW2_TEST_FAULTS") == "1":
        for text in filter(None, told.split(";")):
            name, fault = _Fault.parse(text)
            _faults.setdefault(name, []).append(fault)
    return _faults


def _forget_faults() -> None:
    global _faults
    _faults = None
    _hits.clear()


os.register_at_fork(after_in_child=_forget_faults)  # a forked rank has a rank, and counts, of its own


def hit(name: str) -> None:
    """Mark a fault point: nothing happens, except in a test whose environment asks for a fault here.

    COGVIEW2_TEST_FAULTS=1 and COGVIEW2_FAULT=`name:action[:rank=R][:n=K]`, several with `;` between. Actions: kill, stop
    (signals to this process), exc, enospc, erofs (OSError), delay=SECONDS. `rank` is compared with RANK, `n` is the
    number of the hit in this process (1 where not said, `*` for all). Read once in each process.
    """
    faults = _read_faults() if _faults is None else _faults
    if name not in faults:
        return
    _hits[name] = _hits.get(name, 0) + 1
    for fault in faults[name]:
        if fault.rank in (None, os.environ.get("RANK", "0")) and fault.number in (None, _hits[name]):
            fault.strike(name)


def _record(operation: str, path: Path, target: Path | None = None) -> None:
    if recorder is not None:
        recorder(operation, path, target)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the errors that people can repair into one sentence naming `path` and the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        raise RunDirectoryError(f"cannot write {path}: {_REMEDIES[error.errno]}") from error


def _fsync(path: Path, kind: str, flags: int) -> None:
    with explained(path):
        hit(f"fsops.{kind}")
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    _record(kind, path)


def fsync_file(path: Path) -> None:
    """Force the content of the file `path` to the disk."""
    _fsync(path, "fsync", 0)


def fsync_dir(path: Path) -> None:
    """Force the entries (names) of the directory `path` to the disk."""
    _fsync(path, "fsync_dir", os.O_DIRECTORY)


def make_dirs(path: Path) -> Path:
    """Create the directory `path` and its parents, durably; an existing directory is fine. Returns `path`.

    Behind a link a directory is fine too (an operator's larger disk), but not for a hidden one: those are ours alone.
    """
    path = Path(path)
    with explained(path):
        if path.name.startswith(".") and path.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        try:
            missing = [folder for folder in (path, *path.parents) if not folder.exists()]
            for folder in reversed(missing):  # one by one: `parents=True` would give the parents another mode
                hit("fsops.write")
                folder.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
                _record("mkdir", folder)
                fsync_dir(folder.parent)
            path.mkdir(mode=DIRECTORY_MODE, exist_ok=True)  # a file of that name is an error
        except FileNotFoundError as error:
            raise RunDirectoryError(
                f"cannot write {path}: no folder can be made there; choose another folder"
            ) from error
    return path


def _rename(source: Path, target: Path) -> None:
    hit("fsops.rename")
    os.replace(source, target)
    _record("rename", source, target)


def replace(source: Path, target: Path) -> None:
    """Rename `source` to `target` atomically and make the new name durable; both on one file system."""
    source, target = Path(source), Path(target)
    with explained(target):
        _rename(source, target)
    fsync_dir(target.parent)
    if source.parent != target.parent:
        fsync_dir(source.parent)


def _temporary(path: Path) -> Path:
    return path.with_name(f".tmp.{path.name}.{secrets.token_hex(4)}")


def _drop(temporary: Path) -> None:
    with contextlib.suppress(OSError):  # on a file system that turned read-only it would hide the reason
        temporary.unlink()
        _record("unlink", temporary)


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; on success it is synced and renamed to `path`, on error removed.

    The caller creates the file under the yielded name with whatever library writes it.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        with explained(path):
            hit("fsops.write")
            yield temporary
            os.chmod(temporary, FILE_MODE)
        _record("create", temporary)
        fsync_file(temporary)
        replace(temporary, path)
    finally:
        _drop(temporary)


def write_bytes(path: Path, data: bytes, *, durable: bool = True, mode: int = FILE_MODE) -> None:
    """Write `data` to `path` so that a reader sees the old content or the new, never a part.

    Args:
        path: the final name; its directory must exist.
        data: the whole content.
        durable: also survive a power loss. Only files that are rewritten every few seconds do without.
        mode: permissions of the file from its first byte on; 0600 for what may hold secrets.

    Raises:
        RunDirectoryError: full or read-only disk, or no permission.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        with explained(path):
            hit("fsops.write")
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(temporary, flags, mode), "wb") as file:
                file.write(data)
                file.flush()
                _record("create", temporary)
                if durable:
                    hit("fsops.fsync")
                    os.fsync(file.fileno())
                    _record("fsync", temporary)
            _rename(temporary, path)
        if durable:
            fsync_dir(path.parent)
    finally:
        _drop(temporary)


def write_text(path: Path, text: str, *, durable: bool = True, mode: int = FILE_MODE) -> None:
    """Write `text` as UTF-8; see `write_bytes`."""
    write_bytes(path, text.encode("utf-8"), durable=durable, mode=mode)


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Write `value` as indented JSON; a non-finite number is a ValueError. See `write_bytes`."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n", durable=durable)


def append_line(path: Path, line: str) -> None:
    """Append one line to a log such as metrics.jsonl; the torn line of a killed writer stays on its own."""
    if "\n" in line:
        raise ValueError(f"append_line takes one line, got {line.count(chr(10)) + 1}: {line[:80]!r}")
    path = Path(path)
    with explained(path):
        hit("fsops.write")
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags, FILE_MODE)
        try:
            size = os.fstat(descriptor).st_size
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            data = (("\n" if torn else "") + line + "\n").encode("utf-8")
            while data:  # a disk that gets full takes a part first
                data = data[os.write(descriptor, data) :]
        finally:
            os.close(descriptor)
    _record("append", path)


def restrict_umask() -> int:
    """Close what libraries create (logs, TensorBoard's files) as our own files are; a stricter umask stays.

    Returns:
        The umask before.
    """
    before = os.umask(0o777)
    os.umask(before | (0o777 & ~DIRECTORY_MODE))
    return before


def sha256_file(path: Path) -> str:
    """Return the sha256 of the content of the file `path`, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def remove_tree(path: Path) -> None:
    """Delete the file or directory `path`, renamed to .trash.* first: a kill never leaves half of it."""
    path = Path(path)
    trash = path.with_name(f".trash.{path.name}.{secrets.token_hex(4)}")
    with explained(path):
        hit("fsops.remove")
        os.rename(path, trash)
        _record("rename", path, trash)
        fsync_dir(path.parent)
    discard(trash)


def discard(path: Path) -> None:
    """Delete at once a file or folder that is never read as a result: .staging.*, .trash.*, .tmp.*."""
    path = Path(path)
    if not path.name.startswith("."):
        raise ValueError(f"{path} may be read as a result; use remove_tree")
    with explained(path):
        hit("fsops.remove")
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    _record("unlink", path)


def byte_words(count: int) -> str:
    """Return a number of bytes for people: `512 B`, `3.4 MB`, `586.0 MB`, `92.1 GB`."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} B"


def require_space(folder: Path, size: int) -> None:
    """Refuse to begin writing `size` bytes below `folder` where they have no room.

    Raises:
        RunDirectoryError: the file system has less left for this user.
    """
    with explained(folder):
        found = os.statvfs(folder)
    left = found.f_bavail * found.f_frsize
    if left < size:
        raise RunDirectoryError(
            f"{folder} needs {byte_words(size)}, its disk has {byte_words(left)} left; free space (old checkpoints, old "
            "runs), or lower checkpoint.keep_last, and run the same command again"
        )
