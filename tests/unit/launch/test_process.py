"""Signals reach ranks, and nothing outlives a job."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cogview2.launch.process import Job, group_members
from cogview2.pipeline.attempt import Attempt
from cogview2.pipeline.stage_dir import StageDirectory

# A launcher that, like DeepSpeed's, dies of SIGTERM at once and leaves its ranks behind.
LAUNCHER = """
import subprocess, sys
rank = [sys.executable, "-c", sys.argv[1]]
children = [subprocess.Popen([*rank, str(number), sys.argv[2]]) for number in range(2)]
codes = [child.wait() for child in children]
sys.exit(max(codes))
"""
RANK = """
import pathlib, signal, sys, time
from cogview2.pipeline.attempt import Attempt
rank, attempt = int(sys.argv[1]), Attempt(pathlib.Path(sys.argv[2]))
stop = []
signal.signal(signal.SIGTERM, {handler})
attempt.write_pid(rank)
while not stop:
    time.sleep(0.02)
attempt.write_outcome(rank, "preempted", 75, 7, "saved at step 7")
sys.exit(75)
"""
POLITE = RANK.format(handler="lambda *_: stop.append(1)")
STUBBORN = RANK.format(handler="signal.SIG_IGN")


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    return StageDirectory(tmp_path / "stage", "train_vqvae").new_attempt()


def start(attempt: Attempt, rank_code: str, during: Callable[[Job], None]) -> tuple[Job, int, float]:
    """Run a job of two ranks; `during` is called in a thread once both ranks have said their process ids."""
    argv = [sys.executable, "-c", LAUNCHER, rank_code, str(attempt.path)]
    job = Job(argv, os.environ, attempt, grace_seconds=5)

    def when_ready() -> None:
        while len(attempt.pids()) < 2:
            time.sleep(0.02)
        during(job)

    thread = threading.Thread(target=when_ready, daemon=True)
    thread.start()
    begin = time.monotonic()
    code = job.run(lambda: None)
    thread.join(timeout=5)
    return job, code, time.monotonic() - begin


def assert_no_orphans(attempt: Attempt) -> None:
    for pid in attempt.pids().values():
        assert not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_one_signal_lets_every_rank_save(attempt: Attempt, number: signal.Signals) -> None:
    job, code, _ = start(attempt, POLITE, lambda _: os.kill(os.getpid(), number))
    assert job.interrupted
    assert code == 75
    assert [(outcome.rank, outcome.step) for outcome in sorted(attempt.outcomes(), key=lambda o: o.rank)] == [
        (0, 7),
        (1, 7),
    ]
    assert_no_orphans(attempt)


def test_second_interrupt_kills_ranks_that_do_not_stop(attempt: Attempt) -> None:
    def twice(job: Job) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.6)
        assert len(attempt.pids()) == 2 and group_members(os.getpgid(attempt.pids()[0]))
        os.kill(os.getpid(), signal.SIGINT)

    job, code, seconds = start(attempt, STUBBORN, twice)
    assert code == -signal.SIGKILL
    assert attempt.outcomes() == []
    assert seconds < 5
    assert_no_orphans(attempt)


def test_ranks_that_outlive_the_launcher_save_and_are_not_left_behind(attempt: Attempt) -> None:
    def kill_launcher(_: Job) -> None:
        launcher = int(Path(f"/proc/{attempt.pids()[0]}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(launcher, signal.SIGKILL)

    job, code, _ = start(attempt, POLITE, kill_launcher)
    assert code == -signal.SIGKILL
    assert not job.interrupted
    assert sorted(outcome.rank for outcome in attempt.outcomes()) == [0, 1]
    assert_no_orphans(attempt)


def test_a_stop_before_any_rank_has_started_ends_the_launcher(attempt: Attempt) -> None:
    job = Job([sys.executable, "-c", "import time; time.sleep(60)"], os.environ, attempt)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    begin = time.monotonic()
    assert job.run(lambda: None) == -signal.SIGTERM
    assert time.monotonic() - begin < 5


def test_a_stranger_with_a_recycled_process_id_is_not_signalled(attempt: Attempt) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
    try:
        (attempt.path / "rank-0.pid").write_text(f"{stranger.pid}\n")
        job = Job([sys.executable, "-c", "import time; time.sleep(60)"], os.environ, attempt)
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        job.run(lambda: None)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_handlers_are_put_back_and_output_is_logged(attempt: Attempt) -> None:
    before = signal.getsignal(signal.SIGTERM)
    code = Job([sys.executable, "-c", "print('hello'); raise SystemExit(3)"], os.environ, attempt).run(
        lambda: None
    )
    assert code == 3
    assert attempt.launcher_log.read_text() == "hello\n"
    assert signal.getsignal(signal.SIGTERM) is before
