"""The started commands of one job: their process groups, how a stop reaches the ranks, and no orphans."""

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import FrameType

from cogview2.launch.job import Command
from cogview2.launch.signals import taken_over
from cogview2.pipeline.attempt import Attempt
from cogview2.pipeline.errors import LaunchError

ALIVE_LINE, STOP_LINE, KILL_LINE = b"alive\n", b"stop\n", b"kill\n"
"""What is written to the standard input of a host agent."""
ALIVE_SECONDS = 10.0
"""How often an agent is told that its job still has a launcher."""
PEER_SECONDS = 15.0
"""Once a command failed, how long the others may take to notice by themselves before they are asked to stop."""
_POLL_SECONDS = 0.2
_KILL_SECONDS = 5.0
_PR_SET_PDEATHSIG = 1
"""Of linux/prctl.h."""


def _stopped_with_us(launcher: int) -> Callable[[], None]:
    """Return what a new process does first: it asks the kernel for SIGUSR1 when the launcher dies, killed or not.

    For commands that hand SIGUSR1 on to their ranks: these then save and leave, where nobody is left to ask them.
    """
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGUSR1))
        if os.getppid() != launcher:  # it died before we asked
            os._exit(1)

    return ask


def _state(process: str) -> tuple[str, int]:
    """Return state and process group of a process; ("X", 0) when there is none."""
    try:
        # The name in the second field may hold spaces and brackets; the fields after the last one do not.
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[2])
    except (OSError, IndexError, ValueError):
        return "X", 0


def is_member(process: int, group: int) -> bool:
    """Return whether a process lives (a zombie does not) in a process group: a stranger with its number does not."""
    state, found = _state(str(process))
    return found == group and state not in "ZX"


def group_members(group: int) -> list[int]:
    """Return the living processes of a process group."""
    names = [entry.name for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [int(name) for name in names if is_member(int(name), group)]


class _Member:
    """One command of a job and the process group it leads."""

    def __init__(
        self,
        command: Command,
        attempt: Attempt,
        log: Path,
        ranks: Collection[int] | None,
        grace_seconds: float,
    ) -> None:
        self.command = command
        self.attempt = attempt
        self.log = log
        self.own_ranks = ranks
        self.grace_seconds = grace_seconds
        self.process: subprocess.Popen[bytes] | None = None
        self._signalled: set[int] = set()
        self._outlived_until: float | None = None
        self._told: dict[bytes, float] = {}

    @property
    def group(self) -> int:
        """The process group, once it is started."""
        assert self.process is not None
        return self.process.pid

    @property
    def code(self) -> int | None:
        """The exit code, or None while it runs or was never started."""
        return None if self.process is None else self.process.poll()

    def start(self) -> None:
        """Start the command; its output is added to the log."""
        remote = self.command.stop == "stdin"
        with open(self.log, "ab") as log:
            try:
                self.process = subprocess.Popen(
                    self.command.argv,
                    bufsize=0,
                    env=dict(self.command.environment),
                    stdin=subprocess.PIPE if remote else subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=_stopped_with_us(os.getpid()) if self.command.stop == "SIGUSR1" else None,
                )
            except OSError as error:
                raise LaunchError(
                    f"cannot start {self.command.argv[0]} ({error.strerror}); install it, or choose another launcher"
                ) from error
        if self.process.stdin is not None:
            os.set_blocking(self.process.stdin.fileno(), False)  # a stuck connection must not hang us

    def busy(self) -> bool:
        """Return whether the command, or a rank that outlived it, still runs.

        Ranks on this machine that outlived their launcher (it was killed) are asked to save, and waited for.
        """
        if self.code is None:
            return True
        if self.command.stop != "ranks":
            return False
        if self._outlived_until is None:
            self._outlived_until = time.monotonic() + self.grace_seconds
        if not self.living_ranks() or time.monotonic() >= self._outlived_until:
            return False
        self.ask_to_stop()
        return True

    def keep_alive(self) -> None:
        """Tell an agent now and then that its launcher is there."""
        if self.command.stop == "stdin" and self.code is None:
            last = self._told.get(ALIVE_LINE)
            if last is None or time.monotonic() - last >= ALIVE_SECONDS:
                self._tell(ALIVE_LINE)

    def ask_to_stop(self) -> None:
        """Ask the ranks to save and leave, in the way of the command; asking again changes nothing."""
        if self.command.stop == "ranks":
            self._signal_ranks()
        elif self.command.stop == "stdin":
            self._once(STOP_LINE)
        elif STOP_LINE not in self._told:
            self._told[STOP_LINE] = time.monotonic()
            self._send(signal.SIGUSR1)

    def _signal_ranks(self) -> None:
        """Send SIGTERM once to every rank; to the whole group while no rank has said its process id.

        The launcher processes are left alone: on SIGTERM the outer one orphans the ranks, and the inner one
        reaches rank k only after rank k-1 is gone.
        """
        ranks = self.living_ranks()
        if not ranks and not self._signalled:
            self._signalled.add(self.group)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.group, signal.SIGTERM)
        for pid in ranks:
            if pid not in self._signalled:
                self._signalled.add(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)

    def kill(self) -> None:
        """End the ranks at once; what ends them elsewhere gets a few seconds before it is killed itself."""
        begun = self._told.setdefault(b"killed", time.monotonic())
        if self.command.stop == "ranks" or time.monotonic() - begun >= _KILL_SECONDS:
            self.kill_group()
        elif self.command.stop == "stdin":
            self._once(KILL_LINE)
        elif self.code is None:
            self._send(
                signal.SIGINT
            )  # sent at every poll: srun ends its step at the second one within a second

    def kill_group(self) -> None:
        """Kill whatever is left of the command on this machine."""
        if self.process is not None and group_members(self.group):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.group, signal.SIGKILL)

    def finish(self) -> None:
        """Leave nothing behind."""
        if self.process is None:
            return
        self.kill_group()
        self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()

    def living_ranks(self) -> list[int]:
        """Return the process ids of living ranks; one that a stranger got meanwhile is in another group."""
        pids = set(self.attempt.pids(self.own_ranks).values())
        return sorted(pid for pid in pids if is_member(pid, self.group))

    def _once(self, line: bytes) -> None:
        if line not in self._told:
            self._tell(line)

    def _tell(self, line: bytes) -> None:
        assert self.process is not None and self.process.stdin is not None
        self._told[line] = time.monotonic()
        with contextlib.suppress(OSError):  # gone, or its connection is stuck: both end it soon
            os.write(self.process.stdin.fileno(), line)

    def _send(self, number: signal.Signals) -> None:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)


class JobGroup:
    """All commands of a job, started and ended together.

    Args:
        commands: what a launcher gave, in the order of its hosts.
        attempt: where their logs go and where the ranks write their process ids.
        grace_seconds: how long ranks may take to save after their launcher died.
        limit_seconds: how long after a stop everything is killed; None leaves that to a second Ctrl-C.
        ranks: those whose process ids count; None for all.
        log: where the commands write; by default the attempt's launcher.log.
    """

    def __init__(
        self,
        commands: Sequence[Command],
        attempt: Attempt,
        grace_seconds: float = 60.0,
        *,
        limit_seconds: float | None = None,
        ranks: Collection[int] | None = None,
        log: Path | None = None,
    ) -> None:
        log = log if log is not None else attempt.launcher_log
        self.members = [_Member(command, attempt, log, ranks, grace_seconds) for command in commands]
        self.limit_seconds = limit_seconds
        self.interrupted = False
        """A person or a scheduler asked the job to stop."""
        self.killed = False
        """The ranks were not given the time to save."""
        self._stopping_since: float | None = None
        self._failed_since: float | None = None
        self._first_code = 0

    def stop(self) -> None:
        """Ask all ranks to save and leave; may be called from any thread."""
        if self._stopping_since is None:
            self._stopping_since = time.monotonic()

    def kill(self) -> None:
        """End all ranks at once; may be called from any thread."""
        self.killed = True
        self.stop()

    @property
    def stopping(self) -> bool:
        """Whether the ranks were asked to leave."""
        return self._stopping_since is not None

    def is_running(self, process: int) -> bool:
        """Return whether a process of this machine is one of the job's and lives."""
        return any(is_member(process, member.group) for member in self.members if member.process)

    def codes(self) -> dict[str, int | None]:
        """Return label -> exit code of every command; None for one that was not started."""
        return {member.command.label: member.code for member in self.members}

    def run(self, poll: Callable[[], None]) -> int:
        """Start the commands, call `poll` now and then, and return when all their processes are gone.

        Returns:
            The exit code of the command that failed first, or 0.

        Raises:
            LaunchError: a command cannot be started; those that were are ended.
        """
        ended = threading.Event()
        alive = threading.Thread(target=self._keep_alive, args=(ended,), daemon=True)
        with taken_over(self._on_signal):
            try:
                for member in self.members:
                    member.start()
                if any(member.command.stop == "stdin" for member in self.members):
                    alive.start()
                while any([member.busy() for member in self.members]):  # a list: every member is looked at
                    self._mind_failures()
                    self._act()
                    poll()
                    time.sleep(_POLL_SECONDS)
                self._mind_failures()
            finally:
                ended.set()
                if alive.is_alive():
                    alive.join()  # it writes where `finish` closes
                for member in self.members:
                    member.finish()
        return self._first_code

    def _mind_failures(self) -> None:
        """Once a command has failed, the others are asked to stop after a while: their ranks wait for nobody."""
        if not self._first_code:
            self._first_code = next((member.code for member in self.members if member.code), 0)
            if self._first_code:
                self._failed_since = time.monotonic()
        if self._failed_since is not None and len(self.members) > 1:
            if time.monotonic() - self._failed_since >= PEER_SECONDS:
                self.stop()

    def _act(self) -> None:
        if self._stopping_since is not None and self.limit_seconds is not None:
            if time.monotonic() - self._stopping_since >= self.limit_seconds:
                self.killed = True
        for member in self.members:
            if self.killed:
                member.kill()
            elif member.code is None and self.stopping:
                member.ask_to_stop()

    def _keep_alive(self, ended: threading.Event) -> None:
        """Tell the agents that their launcher is there, in a thread: `poll` may wait long for a slow file system."""
        while True:
            for member in self.members:
                member.keep_alive()
            if ended.wait(_POLL_SECONDS):
                return

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.interrupted and number == signal.SIGINT:
            self.killed = True
        self.interrupted = True
        self.stop()
