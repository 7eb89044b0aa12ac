"""Why a job ended without its DONE record, from the records that its ranks left."""

import time
from pathlib import Path

from cogview2.launch import process
from cogview2.launch.job import Command, JobSpec
from cogview2.launch.process import JobGroup
from cogview2.pipeline.attempt import HUNG, KILLED, STOPPED, Attempt, Outcome
from cogview2.pipeline.errors import ExitCode

AGENT_MODULE = "cogview2.launch.agent"
_TAIL_LINES = 20
_CONNECTION_ENDED = 255
"""Exit code of ssh for everything that is not the remote command's own end."""
_LOOK_SECONDS = 3.0
"""How often the records are read while a job runs."""
_HUNG_SECONDS = 5.0
"""Once a rank says that the job hangs, how long the others may take to say so too; what is stuck hears no signal."""


class Losses:
    """Finds the hosts of a job that went away while it ran."""

    def __init__(self, spec: JobSpec, attempt: Attempt, job: JobGroup) -> None:
        self.spec = spec
        self.attempt = attempt
        self.job = job
        self._cut: dict[int, bool] = {}

    def look(self) -> None:
        """Notice connections that have just ended; what their ranks record later, out of our sight, changes nothing."""
        for index, member in enumerate(self.job.members):
            if _is_connection(member.command) and member.code == _CONNECTION_ENDED and index not in self._cut:
                self._cut[index] = not self._recorded(index)

    def hosts(self) -> list[int]:
        """Return the indices of the hosts that were lost, once the job has ended; none when a person ended it.

        Those whose connection ended before any of their ranks left a record, and those without any record at all:
        an agent leaves one of every rank before it ends. Where one srun or mpirun starts everything and no rank said
        anything, nothing was ever started, and no host is to blame. Without agents a missing record says little:
        mpirun kills the peers of a rank that failed, so that the failure that was recorded explains them all.
        """
        if self.job.interrupted or _is_local(self.job):
            return []
        self.look()
        commands = [member.command for member in self.job.members]
        if not any(_is_connection(command) for command in commands):
            outcomes = self.attempt.outcomes()
            agents = any(_has_agent(command) for command in commands)
            if not outcomes or (not agents and any(outcome.code for outcome in outcomes)):
                return []
        count = range(len(self.spec.hosts))
        return [index for index in count if self._cut.get(index) or not self._recorded(index)]

    def _recorded(self, index: int) -> bool:
        return any(self.attempt.outcome(rank) is not None for rank in self.spec.ranks_of(index))


class PeerStop:
    """Ends a running job once one of its ranks has failed: its peers would wait for it as long as they may.

    They are asked to stop, because one srun, mpirun or pdsh for all ranks minds nobody's peers on the other hosts.
    A job that hangs is killed: its ranks have said what they know, and a rank that is stuck heeds nothing.

    Args:
        attempt: whose records are read.
        job: what runs.
        asks: ask the peers of a failed rank to stop; False where DeepSpeed's launcher ends them itself.
    """

    def __init__(self, attempt: Attempt, job: JobGroup, *, asks: bool = True) -> None:
        self.attempt = attempt
        self.job = job
        self.asks = asks
        self._next_look = 0.0
        self._failed_since: float | None = None
        self._hung = False

    def look(self) -> None:
        """Read the records now and then; stop the job PEER_SECONDS after the first failure was seen."""
        now = time.monotonic()
        if self._failed_since is None:
            if now >= self._next_look:
                self._next_look = now + _LOOK_SECONDS
                failure = self.attempt.first_failure()
                self._failed_since = now if failure is not None else None
                self._hung = failure is not None and failure.reason == HUNG
        elif self._hung:
            if now - self._failed_since >= _HUNG_SECONDS and not self.job.killed:
                self.job.kill()
        elif self.asks and not self.job.stopping and now - self._failed_since >= process.PEER_SECONDS:
            self.job.stop()


def record_silent_ends(attempt: Attempt, job: JobGroup, returncode: int) -> None:
    """Write the outcomes of ranks that began here and left none: their heartbeats say where they were.

    Once the job has ended; agents do so on their own hosts. Ranks that we killed ourselves need no explanation.
    """
    if not returncode or job.killed or job.interrupted or not _is_local(job):
        return
    for rank in attempt.pids():
        if attempt.outcome(rank) is not None:
            continue
        beat = attempt.beat(rank)
        stacks = attempt.stacks(rank)
        if stacks.is_file() and stacks.stat().st_size:
            text = f"it was stuck where not even its watchdog could run; what it was doing is in {stacks}"
            reason, code = HUNG, ExitCode.HANG
        else:
            text = "it ended without a word, as a killed process does; perhaps the memory was used up: see the kernel's log"
            reason, code = KILLED, ExitCode.FAILED
        where, step = ("", None) if beat is None else (f", in {beat.place}", beat.step)
        # Its last heartbeat is older than what its peers say about the connection that it left behind.
        at = None if beat is None else beat.time
        attempt.write_outcome(rank, reason, code, step, text + where, at)


def was_interrupted(attempt: Attempt, job: JobGroup) -> bool:
    """Return whether a job ended because it was told to, before its ranks could say so themselves."""
    failure = attempt.first_failure()
    if failure is not None and failure.reason == STOPPED:
        return True
    if not job.interrupted:
        return False
    if failure is None or failure.reason == KILLED:
        return True
    # Ranks that did begin may have missed those that were stopped before.
    return failure.code == ExitCode.FAILED and any(end.reason == STOPPED for end in attempt.outcomes())


def _is_connection(command: Command) -> bool:
    """Return whether a command is the connection to the agent of one host."""
    return command.stop == "stdin"


def _has_agent(command: Command) -> bool:
    """Return whether a command starts host agents: over a connection each, or one srun all of them."""
    return _is_connection(command) or AGENT_MODULE in command.argv


def _is_local(job: JobGroup) -> bool:
    return all(member.command.stop == "ranks" for member in job.members)


def rank_words(ranks: range) -> str:
    """Return `rank 2` or `ranks 2 to 3`."""
    first, last = ranks[0], ranks[-1]
    return f"rank {first}" if first == last else f"ranks {first} to {last}"


def explain(
    spec: JobSpec, attempt: Attempt, job: JobGroup, returncode: int, lost: list[int]
) -> tuple[ExitCode, list[str]]:
    """Return the exit code of a failed job and the lines that say what happened, the logs last.

    Lost hosts come first: that their peers failed follows from it.
    """
    failure = attempt.first_failure()
    if lost:
        lines = [
            f"host {spec.hosts[index].name} ({rank_words(spec.ranks_of(index))}) was lost: "
            "its connection ended and its ranks left no record"
            for index in lost
        ]
        log = attempt.launcher_log  # where ssh, srun or mpirun say what happened
    elif failure is None:
        lines = [f"stage {spec.stage} ended without its DONE record (launcher exit code {returncode})"]
        log = attempt.launcher_log
    else:
        lines = [_first(failure, spec, local=_is_local(job))]
        log = _log_of(failure, spec, attempt)
    log = log if log.is_file() else attempt.launcher_log
    if log.is_file():
        lines.append(f"last lines of {log}:")
        lines += [f"  {text}" for text in tail(log, _TAIL_LINES)]
    lines.append(f"all logs: {attempt.path}")
    known = not lost and failure is not None and failure.code in ExitCode.__members__.values()
    return ExitCode(failure.code) if known and failure is not None else ExitCode.FAILED, lines


def _first(failure: Outcome, spec: JobSpec, *, local: bool) -> str:
    if failure.reason == HUNG:
        return f"the job hung, noticed by rank {failure.rank}: {failure.message}"
    where = "" if local else f" on {spec.host_of(failure.rank)}"
    step = "" if failure.step is None else f" at step {failure.step}"
    return f"rank {failure.rank}{where} failed first{step}: {failure.reason}: {failure.message}"


def _log_of(failure: Outcome, spec: JobSpec, attempt: Attempt) -> Path:
    own = attempt.rank_log(failure.rank)
    return own if own.is_file() else attempt.host_log(spec.host_of(failure.rank))


def tail(path: Path, count: int) -> list[str]:
    """Return the last `count` lines of a text file; nothing when it does not exist."""
    if not path.is_file():
        return []
    return path.read_text(encoding="utf-8", errors="replace").splitlines()[-count:]
