"""Jobs of several processes that a benchmark starts, watches from outside, and kills."""

import contextlib
import json
import os
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

_LIMIT_SECONDS = 240.0
_POLL_SECONDS = 0.005
_TAIL_BYTES = 16384


class LostError(Exception):
    """A job that does not go on."""


@dataclass
class Kill:
    """One recovery."""

    seconds: float
    """From the first SIGKILL to the first new step."""
    parts: dict[str, float]


@dataclass
class Side(ABC):
    """A job that is started, killed, and started again by the same command."""

    folder: Path
    name: str
    process: "subprocess.Popen[bytes] | None" = None
    kills: list[Kill] = field(default_factory=list)
    lost: int = 0

    @property
    @abstractmethod
    def command(self) -> list[str]:
        """What is typed."""

    @property
    @abstractmethod
    def steps(self) -> Path:
        """A JSON object with its `step` for each one that was trained."""

    @abstractmethod
    def renew(self) -> None:
        """Forget what attempts before this one said."""

    @abstractmethod
    def began(self) -> bool:
        """Return whether rank 0 runs."""

    @abstractmethod
    def restored(self) -> float | None:
        """Return the seconds that restoring took, once it is done."""

    @abstractmethod
    def begin_anew(self) -> None:
        """Give up what is there."""

    def start(self) -> None:
        """Give the command."""
        self.renew()
        environment = dict(os.environ) | {
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "PYTHONUNBUFFERED": "1",
        }
        with open(self.folder / f"{self.name.split()[0]}.log", "ab") as log:
            self.process = subprocess.Popen(self.command, env=environment, stdout=log, stderr=log)

    def kill(self) -> None:
        """Kill everything at once, launchers first, and wait until it is gone."""
        if self.process is None:
            return
        pids = family(self.process.pid)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # it ended by itself
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.process = None
        wait_for(lambda: not any(runs(pid) for pid in pids), "its processes to end")

    def step(self) -> int:
        """Return the newest step that was trained."""
        return last_step(self.steps)

    def until(self, condition: Callable[[], bool], what: str) -> float:
        """Wait while the job runs; returns the time at which `condition` held.

        Raises:
            LostError: it ended, or nothing came.
        """

        def checked() -> bool:
            if self.process is None or self.process.poll() is not None:
                raise LostError(f"{self.name}: it ended before {what}; see the logs in {self.folder}")
            return condition()

        wait_for(checked, f"{self.name}: {what}")
        return time.monotonic()


def family(pid: int) -> list[int]:
    """Return a process and all below it, from the top."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        parents[int(path.parent.name)] = int(words[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def runs(pid: int) -> bool:
    """Return whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Look again and again until `condition` holds.

    Raises:
        LostError: it does not.
    """
    deadline = time.monotonic() + _LIMIT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise LostError(f"waited {_LIMIT_SECONDS:.0f} s for {what}")
        time.sleep(_POLL_SECONDS)


def last_step(path: Path) -> int:
    """Return the step of the last whole line of a file of JSON lines; 0 without one."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            whole = file.read().rpartition(b"\n")[0].rpartition(b"\n")[2]
    except FileNotFoundError:
        return 0
    return int(json.loads(whole)["step"]) if whole else 0
