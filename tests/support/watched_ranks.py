"""Ranks as forks of the test, each under its watchdog and with the runner's way to end: to stop, kill and hang."""

import contextlib
import datetime
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from cogview2.pipeline.attempt import Attempt
from cogview2.pipeline.config.launch import WatchdogConfig
from cogview2.pipeline.distributed import watchdog
from cogview2.pipeline.distributed.process import World
from cogview2.stages import _runner

LIMIT_SECONDS = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Fork:
    """A child process that calls `work` and ends with the code that it returns."""

    def __init__(self, work: Callable[[], int], output: Path) -> None:
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        try:
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # what pytest captures is not ours
            logging.getLogger().handlers.clear()
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, signal.SIG_DFL)
            torch.set_num_threads(1)
            os._exit(work())
        except BaseException:
            logging.getLogger("fork").exception("in a fork of the test")
        finally:
            os._exit(99)

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal, or None while it runs."""
        if self.code is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def wait(self, timeout: float = LIMIT_SECONDS) -> int:
        """Return the exit code; TimeoutError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"process {self.pid} still runs")
            time.sleep(0.005)
        assert self.code is not None
        return self.code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def end(self) -> None:
        """Kill it, if it lives."""
        with contextlib.suppress(ProcessLookupError):
            self.send_signal(signal.SIGKILL)
        self.wait(10)


class WatchedRanks:
    """`count` ranks that call `work(rank)`, with a gloo group where `coupled`; a context manager that leaves none behind."""

    def __init__(
        self,
        attempt: Attempt,
        work: Callable[[int], None],
        config: WatchdogConfig,
        *,
        count: int = 3,
        coupled: bool = True,
    ) -> None:
        self.attempt, port = attempt, free_port()

        def rank_work(rank: int) -> int:
            world = World(rank, count, rank, torch.device("cpu"))

            def inside() -> None:
                watchdog.start(attempt, rank, count, config)
                if coupled:
                    init, limit = f"tcp://127.0.0.1:{port}", datetime.timedelta(seconds=LIMIT_SECONDS)
                    dist.init_process_group(
                        "gloo", init_method=init, rank=rank, world_size=count, timeout=limit
                    )
                work(rank)

            return int(_runner._guarded(attempt, world, inside))

        self.ranks = [
            Fork(lambda rank=rank: rank_work(rank), attempt.path / f"output-{rank}.txt")  # type: ignore[misc]
            for rank in range(count)
        ]

    def __enter__(self) -> "WatchedRanks":
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self.ranks:
            rank.end()

    def reach(self, step: int) -> None:
        """Wait until the heartbeats of all ranks are at `step` or later."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while True:
            beats = self.attempt.beats()
            if len(beats) == len(self.ranks) and all((beat.step or 0) >= step for beat in beats.values()):
                return
            assert time.monotonic() < deadline, f"never reached step {step}: {beats}\n{self.output()}"
            assert all(rank.poll() is None for rank in self.ranks), self.output()
            time.sleep(0.02)

    def wait(self, ranks: list[int], limit: float) -> tuple[list[int | None], float]:
        """Return the exit codes of `ranks`, None for those that still run after `limit` seconds, and how long it took."""
        begin = time.monotonic()
        while time.monotonic() - begin < limit and any(self.ranks[rank].poll() is None for rank in ranks):
            time.sleep(0.02)
        return [self.ranks[rank].poll() for rank in ranks], time.monotonic() - begin

    def output(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.attempt.path.glob("output-*.txt")))
