"""Signals the ranks of one attempt on this host, and nobody else: what a launcher runs where it has no agent."""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from cogview2.pipeline.attempt import Attempt
from cogview2.pipeline.run_dir import RunDirectory


def words(python: str, run: Path, stage: str, attempt: int, *, kill: bool = False) -> list[str]:
    """Return the command that does it on a host."""
    argv = [python, "-P", "-m", "cogview2.launch.stop_ranks", "--run-dir", str(run), "--stage", stage]
    return [*argv, "--attempt", str(attempt), *(["--kill"] if kill else [])]


def is_rank(pid: int, rank: int, run: Path, stage: str, attempt: int) -> bool:
    """Return whether a process here is that rank: by its own command line and RANK, as the kernel keeps them.

    The number alone proves nothing: it may be of another host, or a stranger's by now.
    """
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    wanted = [f"cogview2.stages.{stage}", "--run-dir", str(run), "--attempt", str(attempt)]
    told = [os.fsencode(word) for word in wanted]
    at = [index for index in range(len(command)) if command[index : index + len(told)] == told]
    ours = {f"{name}={rank}".encode() for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")}
    return bool(at) and not ours.isdisjoint(environment)


def stop_ranks(run: Path, stage: str, attempt: int, number: signal.Signals) -> list[int]:
    """Send `number` to the ranks of an attempt that run on this host, and return their process ids."""
    found = Attempt(RunDirectory(run).stage(stage).path / "attempts" / f"{attempt:04d}").pids()
    stopped = [pid for rank, pid in found.items() if is_rank(pid, rank, run, stage, attempt)]
    for pid in stopped:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)
    return stopped


def main(argv: Sequence[str] | None = None) -> int:
    """Do it; 0 whether or not there was a rank."""
    parser = argparse.ArgumentParser(
        prog="cogview2.launch.stop_ranks", description="Stop an attempt's ranks here."
    )
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--stage", required=True)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument(
        "--kill", action="store_true", help="SIGKILL instead of SIGTERM, which lets them save"
    )
    arguments = parser.parse_args(argv)
    number = signal.SIGKILL if arguments.kill else signal.SIGTERM
    stop_ranks(arguments.run_dir, arguments.stage, arguments.attempt, number)
    return 0


if __name__ == "__main__":
    sys.exit(main())
