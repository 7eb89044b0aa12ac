"""The only writer, renamer and deleter of durable files: what has its final name is whole."""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
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
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.EPERM: "operation not permitted; choose another folder (--runs-dir) or change its owner or mode",
}


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the errors that people can repair into one sentence naming `path` and the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        raise RunDirectoryError(f"cannot write {path}: {_REMEDIES[error.errno]}") from error


def fsync_file(path: Path) -> None:
    """Force the content of the file `path` to the disk."""
    with explained(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def fsync_dir(path: Path) -> None:
    """Force the entries (names) of the directory `path` to the disk."""
    with explained(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_dirs(path: Path) -> Path:
    """Create the directory `path` and its parents; an existing directory is fine. Returns `path`."""
    path = Path(path)
    with explained(path):
        try:
            path.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
        except FileNotFoundError as error:
            raise RunDirectoryError(
                f"cannot write {path}: no folder can be made there; choose another folder"
            ) from error
    return path


def replace(source: Path, target: Path) -> None:
    """Rename `source` to `target` atomically and make the new name durable; both on one file system."""
    source, target = Path(source), Path(target)
    with explained(target):
        os.replace(source, target)
    fsync_dir(target.parent)
    if source.parent != target.parent:
        fsync_dir(source.parent)


def _temporary(path: Path) -> Path:
    return path.with_name(f".tmp.{path.name}.{secrets.token_hex(4)}")


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; on success it is synced and renamed to `path`, on error removed.

    The caller creates the file under the yielded name with whatever library writes it.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        with explained(path):
            yield temporary
            os.chmod(temporary, FILE_MODE)
        fsync_file(temporary)
        replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # on a file system that turned read-only it would hide the reason
            temporary.unlink(missing_ok=True)


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
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(temporary, flags, mode), "wb") as file:
                file.write(data)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        if durable:
            fsync_dir(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


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
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, FILE_MODE)
        try:
            size = os.fstat(descriptor).st_size
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            os.write(descriptor, (("\n" if torn else "") + line + "\n").encode("utf-8"))
        finally:
            os.close(descriptor)


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
        os.rename(path, trash)
        fsync_dir(path.parent)
        if trash.is_dir() and not trash.is_symlink():
            shutil.rmtree(trash)
        else:
            trash.unlink()
