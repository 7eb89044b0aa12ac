"""Leases: locks for file systems without flock, made of files that only one process can create.

A lease is the file FOLDER/<token>. The one with the highest token counts; its holder renews a counter in it. Who wants
the lease watches that counter by its own monotonic clock, so that no clock of another host matters, and takes the next
token: creating a file of that name succeeds for one process only.
"""

import contextlib
import errno
import json
import logging
import os
import secrets
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogview2.pipeline import fsops
from cogview2.pipeline.errors import CogView2Error

RENEW_SECONDS = 5.0
"""Time between two renewals of the counter."""
_PATIENCE = 3
"""A holder that missed this many renewals is gone, or paused; then its token is no longer the highest."""
_LOOKS = 10
"""Looks at the counter in the time of one renewal."""
_NO_LINKS = frozenset({errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK})
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """What a lease file says; `about` is the holder's description of itself."""

    token: int
    counter: int | None
    free: bool
    about: dict[str, Any]


def newest(folder: Path) -> Record | None:
    """Return the lease with the highest token, or None where there never was one."""
    with contextlib.suppress(FileNotFoundError):
        tokens = [int(name) for name in os.listdir(folder) if name.isdigit()]
        return _read(folder, max(tokens)) if tokens else None
    return None


def _name(token: int) -> str:
    return f"{token:012d}"


def _read(folder: Path, token: int) -> Record:
    try:
        content = json.loads((folder / _name(token)).read_bytes())
        return Record(token, int(content["counter"]), content["free"] is True, dict(content["about"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Record(token, None, False, {})  # being created, or damaged: its name alone counts


def lives(folder: Path, patience: float) -> bool:
    """Watch the newest lease for `patience` renewals; True as soon as its holder gives a sign."""
    return _watched(folder, newest(folder), patience) is None


def _watched(folder: Path, found: Record | None, patience: float) -> Record | None:
    """Return the lease that may be succeeded (token 0 where there is none), or None when its holder lives."""
    if found is None:
        return Record(0, None, True, {})
    for _ in range(
        round(patience * _LOOKS)
    ):  # looks are counted: a pause of the watcher is no silence of the holder
        if found.free:
            return found
        time.sleep(RENEW_SECONDS / _LOOKS)
        now = newest(folder)
        if now is None or now.token != found.token or (now.counter != found.counter and not now.free):
            return None
        found = now
    return found


def _create(folder: Path, token: int, content: bytes) -> bool:
    """Create the lease file, whole; False when another process was first."""
    target, temporary = folder / _name(token), folder / f".tmp.{token}.{secrets.token_hex(8)}"
    fsops.write_bytes(temporary, content, durable=False)
    try:
        os.link(temporary, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _create_without_links(target, content)
    finally:
        temporary.unlink()
    return True


def _create_without_links(target: Path, content: bytes) -> bool:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(target, flags, fsops.FILE_MODE)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    return True


class Lease:
    """A lease that this process took; a thread renews it until `release`."""

    def __init__(self, folder: Path, token: int, about: dict[str, Any]) -> None:
        self.folder, self.token, self._about = folder, token, about
        self._counter = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def lost(self) -> str | None:
        """Return who took the lease over, or None while it is ours."""
        found = newest(self.folder)
        if found is None:
            return "its lease files were deleted"
        # What cannot be read just now is not another's: only a higher token, or another name, is.
        if found.token == self.token and found.about in ({}, self._about):
            return None
        host, pid = found.about.get("host", "?"), found.about.get("pid", "?")
        return f"process {pid} on host {host} took it over with token {found.token}"

    def release(self) -> None:
        """Stop renewing, and let the next one begin at once."""
        self._ended.set()
        self._thread.join()
        if self.lost() is None:
            with contextlib.suppress(CogView2Error, OSError):  # then the next one waits, and takes it over
                self._write(free=True)

    def _write(self, *, free: bool) -> None:
        self._counter += 1
        fsops.write_bytes(
            self.folder / _name(self.token), _content(self._counter, free, self._about), durable=False
        )

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            if self.lost() is not None:
                return
            try:
                self._write(free=False)
            except (CogView2Error, OSError) as error:
                logger.warning("cannot renew the lease in %s: %s", self.folder, error)


def _content(counter: int, free: bool, about: dict[str, Any]) -> bytes:
    return (json.dumps({"counter": counter, "free": free, "about": about}) + "\n").encode()


def take(folder: Path, about: dict[str, Any]) -> Lease | None:
    """Take the lease of `folder`; None when another process holds it.

    Returns at once when the lease is free or its holder gives a sign of life; a lease whose holder is silent for
    three renewals is taken over.

    Args:
        folder: for the lease files; created when missing.
        about: plain JSON by which people know the holder: host, pid, ...
    """
    fsops.make_dirs(folder)
    before = _watched(folder, newest(folder), _PATIENCE)
    if before is None:
        return None
    token = before.token + 1
    if not _create(folder, token, _content(0, False, about)):
        return None
    fsops.fsync_dir(folder)
    found = newest(folder)
    if found is None or found.token != token:  # it waited so long that others came and went
        (folder / _name(token)).unlink(missing_ok=True)
        return None
    for name in os.listdir(folder):
        if name.isdigit() and int(name) < token:
            (folder / name).unlink(missing_ok=True)
    return Lease(folder, token, about)
