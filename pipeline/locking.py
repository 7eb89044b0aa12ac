"""Locks that end with their holder; the file names the holder for people, and a token that grows with each of them.

flock where the file system has it: the kernel frees it when the holder dies. Leases (pipeline/leases.py) elsewhere.
"""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cogview2.pipeline import fsops, leases
from cogview2.pipeline.errors import LockedError
from cogview2.pipeline.fsops import FILE_MODE, explained

_PATIENCE_SECONDS = 1.0
_RETRY_SECONDS = 0.05
_RECORD_BYTES = 1024  # written at once and never truncated: a kill cannot lose the token
_NO_FLOCK = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP})
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Held:
    """A lock that this process holds, as far as it knows."""

    def __init__(self, path: Path, token: int, lost: Callable[[], str | None]) -> None:
        self.path, self.token, self._lost = path, token, lost

    def check(self) -> None:
        """Make sure that nobody took the lock over, for example while this process was paused or its host was cut off.

        To be called right before what must happen once only: committing a checkpoint, writing a record.

        Raises:
            LockedError: the lock is another's, or its file is gone.
        """
        reason = self._lost()
        if reason is not None:
            raise LockedError(
                f"{self.path} is no longer held by this process, token {self.token} ({reason}), so that nothing more is "
                "written; end this job, or run the same command again when the other is done"
            )


def holder(path: Path) -> dict[str, Any]:
    """Return what the last holder of the lock wrote: {token, host, boot, pid, job, purpose, time}; {} when unreadable."""
    lease = leases.newest(_lease_folder(path))
    if lease is not None and not lease.free:
        return lease.about | {"token": lease.token}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def is_held(path: Path) -> bool:
    """Return whether some process holds the lock file `path` now. Takes nothing and writes nothing.

    At once with flock; up to two renewals of a lease without it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        return leases.lives(_lease_folder(path), patience=2)
    finally:
        os.close(descriptor)


@contextmanager
def exclusive(path: Path, purpose: str) -> Iterator[Held]:
    """Hold the lock file `path` while the body runs.

    Args:
        path: the lock file; created when missing, never deleted (a deleted lock file can be held twice).
        purpose: what the holder does, shown to whoever finds the lock taken.

    Yields:
        The lock; `check()` it before a commit.

    Raises:
        LockedError: another process holds it; the message names host, process, job and purpose.
        RunDirectoryError: the file cannot be written.
    """
    descriptor = _open(path)
    try:
        taken = _acquire(descriptor)
        if taken is None:
            yield from _with_lease(path, purpose)
            return
        if not taken:
            raise _refusal(path)
        token = _token(descriptor) + 1
        with explained(path):
            _write(descriptor, _about(purpose) | {"token": token})
        fsops.fsync_dir(path.parent)
        yield Held(path, token, lambda: _lost(path, descriptor, token))
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    with explained(path):
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)


def _acquire(descriptor: int) -> bool | None:
    """Take the kernel's lock; None where the file system has none."""
    # A short patience: the shared probe of `is_held` in another shell must not make a start fail.
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_RETRY_SECONDS)
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            return None


def _with_lease(path: Path, purpose: str) -> Iterator[Held]:
    lease = leases.take(_lease_folder(path), _about(purpose))
    if lease is None:
        raise _refusal(path)
    try:
        yield Held(path, lease.token, lease.lost)
    finally:
        lease.release()


def _lease_folder(path: Path) -> Path:
    return path.with_name(f"{path.name}.leases")


def _about(purpose: str) -> dict[str, Any]:
    """What people need to find this process; the boot id tells a process from one of before a restart of the host."""
    try:
        boot = _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        boot = ""
    return {
        "host": socket.gethostname(),
        "boot": boot,
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "purpose": purpose[:200],
        "time": time.time(),
    }


def _token(descriptor: int) -> int:
    """Return the token of the last holder, 0 where there was none."""
    try:
        return int(json.loads(os.pread(descriptor, _RECORD_BYTES, 0))["token"])
    except (ValueError, KeyError, TypeError):
        return 0


def _write(descriptor: int, content: dict[str, Any]) -> None:
    os.pwrite(descriptor, json.dumps(content).encode().ljust(_RECORD_BYTES - 1) + b"\n", 0)
    os.ftruncate(descriptor, _RECORD_BYTES)  # what an older version wrote may be longer
    os.fsync(descriptor)


def _lost(path: Path, descriptor: int, token: int) -> str | None:
    """Return why the lock is not ours any more, or None."""
    try:
        named = os.stat(path, follow_symlinks=False)
        if not os.path.samestat(named, os.fstat(descriptor)):
            return "another file stands in the place of the lock file"
    except OSError as error:
        return f"the lock file cannot be looked at: {error.strerror}"
    found = _token(descriptor)
    if found == token:
        return None
    other = holder(path)
    return f"process {other.get('pid', '?')} on host {other.get('host', '?')} holds it with token {found}"


def _refusal(path: Path) -> LockedError:
    other = holder(path)
    job = f", job {other['job']}" if other.get("job") else ""
    return LockedError(
        f"{path.parent} is in use by process {other.get('pid', '?')} on host {other.get('host', '?')}{job} "
        f"({other.get('purpose', 'unknown')}); wait for it to end, or end it, and run the same command"
    )
