"""One started job: its process group, the signals that reach its ranks, and the promise of no orphans."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType

from cogview2.pipeline.attempt import Attempt

_POLL_SECONDS = 0.2
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def group_members(group: int) -> list[int]:
    """Return the living processes (zombies are not) of a process group."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError, IndexError, ValueError):
            # The name in the second field may hold spaces and brackets; the fields after the last one do not.
            state, _, process_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(process_group) == group and state not in "ZX":
                found.append(int(entry.name))
    return found


class Job:
    """A launcher process and all ranks below it, in one process group of their own.

    Args:
        argv: the command.
        environment: the whole environment of the command.
        attempt: where its log goes and where its ranks write their process ids.
        grace_seconds: how long ranks may take to save after the launcher itself died.
    """

    def __init__(
        self,
        argv: list[str],
        environment: Mapping[str, str],
        attempt: Attempt,
        grace_seconds: float = 60.0,
    ) -> None:
        self.argv = argv
        self.environment = dict(environment)
        self.attempt = attempt
        self.grace_seconds = grace_seconds
        self.interrupted = False
        """A person or a scheduler asked the job to stop."""
        self._stop = False
        self._kill_requested = False
        self._signalled: set[int] = set()

    def run(self, poll: Callable[[], None]) -> int:
        """Start the command, call `poll` now and then, return its exit code when all processes are gone."""
        with open(self.attempt.launcher_log, "ab") as log, self._signals():
            process = subprocess.Popen(
                self.argv,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                while process.poll() is None:
                    self._act(process.pid)
                    poll()
                    time.sleep(_POLL_SECONDS)
                self._outlive(process.pid, poll)
            finally:
                self._kill(process.pid)
                process.wait()
        return process.returncode

    def _outlive(self, group: int, poll: Callable[[], None]) -> None:
        """Ranks that outlived the launcher (it was killed) are asked to save and stop, and waited for."""
        self._stop = True
        deadline = time.monotonic() + self.grace_seconds
        while self._ranks(group) and time.monotonic() < deadline and not self._kill_requested:
            self._act(group)
            poll()
            time.sleep(_POLL_SECONDS)

    def _act(self, group: int) -> None:
        if self._kill_requested:
            self._kill(group)
        elif self._stop:
            self._ask_to_stop(group)

    def _ask_to_stop(self, group: int) -> None:
        """Send SIGTERM once to every rank; to the whole group while no rank has said its process id.

        The launcher processes are left alone: on SIGTERM the outer one orphans the ranks, and the inner one
        reaches rank k only after rank k-1 is gone.
        """
        ranks = self._ranks(group)
        if not ranks and not self._signalled:
            self._signalled.add(group)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGTERM)
        for pid in ranks:
            if pid not in self._signalled:
                self._signalled.add(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)

    def _ranks(self, group: int) -> list[int]:
        """Return the living ranks; a process id that a stranger got meanwhile is in another group."""
        return sorted(set(self.attempt.pids().values()) & set(group_members(group)))

    @staticmethod
    def _kill(group: int) -> None:
        if group_members(group):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def handle(number: int, _frame: FrameType | None) -> None:
            if self.interrupted and number == signal.SIGINT:
                self._kill_requested = True
            self.interrupted = self._stop = True

        before = {number: signal.signal(number, handle) for number in _FORWARDED}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
