"""A host's agent: starts this host's ranks of a job, hands on what it is told, and leaves a record of every rank.

It is started over ssh or by srun with no more than the path of job.json, and reads everything else there.
"""

import argparse
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from cogview2.launch.job import Command, JobSpec
from cogview2.launch.local import VISIBLE_DEVICES, device_variables
from cogview2.launch.process import ALIVE_LINE, KILL_LINE, STOP_LINE, JobGroup
from cogview2.pipeline import fsops
from cogview2.pipeline.attempt import KILLED, STOPPED, Attempt, redacted
from cogview2.pipeline.errors import CogView2Error, ExitCode, LaunchError

SILENCE_SECONDS = 60.0
"""A launcher that said it was there, and then nothing for this long, is gone: stop."""
_ORPHAN_SECONDS = 10.0
"""How long a killed rank may take to leave its GPU."""
FROM_SLURM = "slurm"
_RANK_VARIABLES = frozenset(
    "RANK WORLD_SIZE LOCAL_RANK LOCAL_SIZE LOCAL_WORLD_SIZE NODE_RANK GROUP_RANK GROUP_WORLD_SIZE ROLE_RANK "
    "ROLE_WORLD_SIZE MASTER_ADDR MASTER_PORT CROSS_RANK CROSS_SIZE DS_ACCELERATOR DS_ENV_FILE".split()
)
_RANK_PREFIXES = ("OMPI_", "PMI_", "PMIX_", "MPI_LOCAL", "TORCHELASTIC_")


def rank_environment(base: Mapping[str, str], spec: JobSpec) -> dict[str, str]:
    """Return the environment of this host's ranks.

    Args:
        base: of the host, as sshd or srun gives it; what would tell ranks who they are is taken out.
        spec: what is set on top.
    """
    kept = {
        name: value
        for name, value in base.items()
        if name not in _RANK_VARIABLES and not name.startswith(_RANK_PREFIXES)
    }
    folder = str(Path(spec.python).parent)
    kept["PATH"] = f"{folder}:{kept['PATH']}" if kept.get("PATH") else f"{folder}:{os.defpath}"
    kept.pop(VISIBLE_DEVICES, None)
    return device_variables(kept | dict(spec.environment))


class _Orders:
    """What the launcher says on our standard input; its end means that the launcher is gone."""

    def __init__(self, job: JobGroup, descriptor: int) -> None:
        self.job = job
        self.descriptor = descriptor
        self.alive_at: float | None = None

    def listen(self) -> None:
        """Read until the end, in a thread of its own."""
        threading.Thread(target=self._read, daemon=True).start()

    def silent(self) -> bool:
        """Return whether the launcher has stopped saying that it is there."""
        return self.alive_at is not None and time.monotonic() - self.alive_at > SILENCE_SECONDS

    def _read(self) -> None:
        rest = b""
        while True:
            try:
                data = os.read(self.descriptor, 4096)
            except OSError:
                data = b""
            if not data:
                break
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._obey(line + b"\n")
        self.job.stop()

    def _obey(self, line: bytes) -> None:
        if line == ALIVE_LINE:
            self.alive_at = time.monotonic()
        elif line == STOP_LINE:
            self.job.stop()
        elif line == KILL_LINE:
            self.job.kill()


class Agent:
    """One host's part of a job.

    Args:
        spec: the job.
        node_rank: index of this host in it.
        environment: of this process.
    """

    def __init__(self, spec: JobSpec, node_rank: int, environment: Mapping[str, str]) -> None:
        self.spec = spec
        self.host = spec.hosts[node_rank].name
        self.ranks = spec.ranks_of(node_rank)
        self.attempt = Attempt(spec.folder)
        self.environment = rank_environment(environment, spec)
        self._pids: dict[int, int] = {}
        command = Command(tuple(spec.runner_argv(node_rank)), self.environment, self.host, "ranks")
        self.job = JobGroup(
            [command],
            self.attempt,
            spec.grace_seconds,
            limit_seconds=spec.grace_seconds,
            ranks=self.ranks,
            log=self.attempt.host_log(self.host),
        )
        fsops.write_json(self.attempt.path / f"env-node-{node_rank}.json", redacted(self.environment))

    def run(self, orders: int | None) -> int:
        """Start the ranks, follow orders, and return the exit code that the ranks' records stand for.

        Args:
            orders: the descriptor where the launcher writes, None where only signals come.
        """
        ended = end_earlier_ranks(self.spec)
        if ended:
            print(f"agent on {self.host}: ended processes {ended} of an earlier attempt", file=sys.stderr)
        os.chdir(self.spec.run)  # nothing there is imported: PYTHONSAFEPATH
        listener = _Orders(self.job, orders) if orders is not None else None
        if listener is not None:
            listener.listen()

        def poll() -> None:
            self._watch()
            if listener is not None and listener.silent():
                self.job.stop()

        returncode = self.job.run(poll)
        return self._close(returncode)

    def _watch(self) -> None:
        """Record a rank that ended without a word as soon as it is seen: its peers only say that it is gone."""
        if self.job.stopping:
            return
        self._pids |= self.attempt.pids([rank for rank in self.ranks if rank not in self._pids])
        for rank, pid in self._pids.items():
            if not self.job.is_running(pid) and self.attempt.outcome(rank) is None:
                self._record(rank, KILLED, "the process was killed; perhaps the host's memory was used up")

    def _close(self, returncode: int) -> int:
        """Leave a record of every rank that left none itself."""
        for rank in self.ranks:
            if self.attempt.outcome(rank) is not None:
                continue
            begun = rank in self.attempt.pids([rank])
            if not begun and self.job.stopping:
                self._record(rank, STOPPED, "it was asked to stop before it began", ExitCode.REQUEUE)
            elif not begun:
                text = f"it never began: DeepSpeed's launcher ended with exit code {returncode}"
                self._record(rank, "not started", text)
            elif self.job.killed:
                self._record(
                    rank, KILLED, f"it did not leave within {self.spec.grace_seconds:.0f} s of being asked to"
                )
            else:
                self._record(rank, KILLED, "it left no record of its end")
        found = [self.attempt.outcome(rank) for rank in self.ranks]
        failed = [outcome for outcome in found if outcome is not None and outcome.code]
        return min(failed, key=lambda outcome: outcome.time).code if failed else int(ExitCode.DONE)

    def _record(self, rank: int, reason: str, message: str, code: ExitCode = ExitCode.FAILED) -> None:
        beat = self.attempt.beat(rank)
        step, where = (None, "") if beat is None else (beat.step, f"; it was in {beat.place}")
        self.attempt.write_outcome(rank, reason, code, step, message + where)


def earlier_ranks(spec: JobSpec, processes: Path = Path("/proc")) -> list[int]:
    """Return the processes of this host that are ranks of an earlier attempt of the same stage of the same run.

    The kernel says so: by their command line and RANK, as in `stop_ranks.is_rank`; no process id is believed.
    """
    told = [f"cogview2.stages.{spec.stage}", "--run-dir", str(spec.run), "--attempt"]
    words = b"\0".join(os.fsencode(word) for word in told) + b"\0"
    found: list[int] = []
    for entry in processes.iterdir():
        with contextlib.suppress(OSError, ValueError):  # gone meanwhile, another user's, or no number
            process = int(entry.name)
            before, has_words, after = (entry / "cmdline").read_bytes().partition(words)
            if not has_words or not before.endswith(b"\0"):
                continue
            number = int(after.partition(b"\0")[0])
            variables = (entry / "environ").read_bytes().split(b"\0")
            if number < spec.attempt and any(variable.startswith(b"RANK=") for variable in variables):
                found.append(process)
    return sorted(found)


def end_earlier_ranks(spec: JobSpec) -> list[int]:
    """Kill the ranks of earlier attempts that still live here, and wait until they have given their GPUs back.

    Their launcher is gone, or there would be no new attempt: nobody else would end them.
    """
    ended: set[int] = set()
    deadline = time.monotonic() + _ORPHAN_SECONDS
    while (ranks := earlier_ranks(spec)) and time.monotonic() < deadline:
        for process in ranks:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        ended.update(ranks)
        time.sleep(0.1)
    return sorted(ended)


def node_rank_of(text: str, environment: Mapping[str, str], hosts: int) -> int:
    """Return the index of this host: `text` itself, or for `slurm` what srun says.

    Raises:
        LaunchError: no number, or none of the job's hosts.
    """
    value = environment.get("SLURM_NODEID", "") if text == FROM_SLURM else text
    if not (value.isascii() and value.isdigit()) or int(value) >= hosts:
        source = "SLURM_NODEID" if text == FROM_SLURM else "--node-rank"
        raise LaunchError(
            f"{source} is {value!r}, but the job's {hosts} hosts count from 0; start with cogview2 submit"
        )
    return int(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the agent; its exit code is that of the first of its ranks that failed."""
    parser = argparse.ArgumentParser(
        prog="cogview2.launch.agent", description="Start one host's ranks of a job."
    )
    parser.add_argument("--job", type=Path, required=True, help="job.json of an attempt")
    parser.add_argument("--node-rank", required=True, help=f"0, 1, ... or {FROM_SLURM}")
    arguments = parser.parse_args(argv)
    fsops.restrict_umask()
    try:
        spec = JobSpec.read(arguments.job)
        environment = dict(os.environ)
        node_rank = node_rank_of(arguments.node_rank, environment, len(spec.hosts))
        orders = None if arguments.node_rank == FROM_SLURM else sys.stdin.fileno()
        return Agent(spec, node_rank, environment).run(orders)
    except CogView2Error as error:
        print(f"cogview2 agent on {socket.gethostname()}: {error}", file=sys.stderr)
        return int(error.exit_code)


if __name__ == "__main__":
    sys.exit(main())
