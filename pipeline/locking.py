"""Locks that the kernel frees when their holder dies; the file names the holder for people."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cogview2.pipeline.errors import LockedError
from cogview2.pipeline.fsops import FILE_MODE, explained

_PATIENCE_SECONDS = 1.0
_RETRY_SECONDS = 0.05


def holder(path: Path) -> dict[str, Any]:
    """Return what the last holder of the lock wrote: {host, pid, purpose, time}; empty when unreadable."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def is_held(path: Path) -> bool:
    """Return whether some process holds the lock file `path` now. Takes nothing and writes nothing."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


def _acquire(descriptor: int) -> bool:
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


@contextmanager
def exclusive(path: Path, purpose: str) -> Iterator[None]:
    """Hold the lock file `path` while the body runs.

    Args:
        path: the lock file; created when missing, never deleted (a deleted lock file can be held twice).
        purpose: what the holder does, shown to whoever finds the lock taken.

    Raises:
        LockedError: another process holds it; the message names host, process and purpose.
    """
    with explained(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
    try:
        if not _acquire(descriptor):
            other = holder(path)
            raise LockedError(
                f"{path.parent} is in use by process {other.get('pid', '?')} on host "
                f"{other.get('host', '?')} ({other.get('purpose', 'unknown')}); "
                "wait for it to end, or end it, and run the same command"
            )
        content = {"host": socket.gethostname(), "pid": os.getpid(), "purpose": purpose, "time": time.time()}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(content) + "\n").encode("utf-8"), 0)
        yield
    finally:
        os.close(descriptor)
