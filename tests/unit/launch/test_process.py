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

from cogview2.launch import process
from cogview2.launch.job import Command
from cogview2.launch.process import JobGroup, group_members
from cogview2.pipeline.attempt import Attempt
from cogview2.pipeline.errors import LaunchError
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


def job_of(argv: list[str], attempt: Attempt, grace_seconds: float = 5) -> JobGroup:
    return JobGroup([Command(tuple(argv), os.environ, "local", "ranks")], attempt, grace_seconds)


def start(
    attempt: Attempt, rank_code: str, during: Callable[[JobGroup], None]
) -> tuple[JobGroup, int, float]:
    """Run a job of two ranks; `during` is called in a thread once both ranks have said their process ids."""
    argv = [sys.executable, "-c", LAUNCHER, rank_code, str(attempt.path)]
    job = job_of(argv, attempt)

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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
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
    def twice(job: JobGroup) -> None:
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
    def kill_launcher(_: JobGroup) -> None:
        launcher = int(Path(f"/proc/{attempt.pids()[0]}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(launcher, signal.SIGKILL)

    job, code, _ = start(attempt, POLITE, kill_launcher)
    assert code == -signal.SIGKILL
    assert not job.interrupted
    assert sorted(outcome.rank for outcome in attempt.outcomes()) == [0, 1]
    assert_no_orphans(attempt)


def test_a_stop_before_any_rank_has_started_ends_the_launcher(attempt: Attempt) -> None:
    job = job_of([sys.executable, "-c", "import time; time.sleep(60)"], attempt)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    begin = time.monotonic()
    assert job.run(lambda: None) == -signal.SIGTERM
    assert time.monotonic() - begin < 5


def test_a_stranger_with_a_recycled_process_id_is_not_signalled(attempt: Attempt) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
    try:
        (attempt.path / "rank-0.pid").write_text(f"{stranger.pid}\n")
        job = job_of([sys.executable, "-c", "import time; time.sleep(60)"], attempt)
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        job.run(lambda: None)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_handlers_are_put_back_and_output_is_logged(attempt: Attempt) -> None:
    before = signal.getsignal(signal.SIGTERM)
    code = job_of([sys.executable, "-c", "print('hello'); raise SystemExit(3)"], attempt).run(lambda: None)
    assert code == 3
    assert attempt.launcher_log.read_text() == "hello\n"
    assert signal.getsignal(signal.SIGTERM) is before


HANDS_ON = """
import signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
signal.signal(signal.SIGINT, {interrupt})
print("ready", flush=True)
time.sleep(60)
"""


def wait_for_words(attempt: Attempt, words: str) -> None:
    while not attempt.launcher_log.exists() or words not in attempt.launcher_log.read_text():
        time.sleep(0.02)


def signals_when_ready(attempt: Attempt, *numbers: int) -> None:
    def work() -> None:
        wait_for_words(attempt, "ready")
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.5)

    threading.Thread(target=work, daemon=True).start()


def test_a_launcher_that_hands_signals_on_gets_sigusr1(attempt: Attempt) -> None:
    argv = (sys.executable, "-c", HANDS_ON.format(interrupt="signal.SIG_IGN"))
    signals_when_ready(attempt, signal.SIGTERM)
    job = JobGroup([Command(argv, os.environ, "srun", "SIGUSR1")], attempt)
    assert job.run(lambda: None) == 75
    assert job.interrupted and not job.killed


def test_a_launcher_that_hands_signals_on_ends_by_a_second_sigint(attempt: Attempt) -> None:
    """srun and mpirun end their ranks elsewhere on SIGINT; SIGKILL would leave them running."""
    code = HANDS_ON.format(interrupt="lambda *_: sys.exit(3)").replace(
        "lambda *_: sys.exit(75)", "signal.SIG_IGN"
    )
    signals_when_ready(attempt, signal.SIGINT, signal.SIGINT)
    job = JobGroup([Command((sys.executable, "-c", code), os.environ, "srun", "SIGUSR1")], attempt)
    assert job.run(lambda: None) == 3
    assert job.killed


def test_a_launcher_that_hands_signals_on_gets_sigusr1_when_we_are_killed(attempt: Attempt) -> None:
    said = attempt.path / "said"
    code = HANDS_ON.format(interrupt="signal.SIG_IGN").replace("sys.exit(75)", f"open({str(said)!r}, 'w')")
    pid = os.fork()
    if pid == 0:
        try:
            JobGroup([Command((sys.executable, "-c", code), os.environ, "srun", "SIGUSR1")], attempt).run(
                lambda: None
            )
        finally:
            os._exit(0)
    wait_for_words(attempt, "ready")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    deadline = time.monotonic() + 10
    while not said.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_does_not_end_is_killed_after_the_limit(
    attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_KILL_SECONDS", 0.5)
    code = HANDS_ON.format(interrupt="signal.SIG_IGN").replace("lambda *_: sys.exit(75)", "signal.SIG_IGN")
    signals_when_ready(attempt, signal.SIGTERM)
    command = Command((sys.executable, "-c", code), os.environ, "srun", "SIGUSR1")
    begin = time.monotonic()
    job = JobGroup([command], attempt, limit_seconds=1.0)
    assert job.run(lambda: None) == -signal.SIGKILL
    assert time.monotonic() - begin < 10


def test_a_failure_stops_the_other_commands_and_a_success_does_not(
    attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "PEER_SECONDS", 0.3)
    slow = "import time; time.sleep(1.5)"

    def run(first: str, second: str) -> JobGroup:
        code = "import sys\nfor line in sys.stdin:\n    if line == 'stop\\n': sys.exit(75)\n"
        second = code if second == "waits" else second
        argvs = [(sys.executable, "-c", first), (sys.executable, "-c", second)]
        commands = [Command(argv, os.environ, f"h{k}", "stdin") for k, argv in enumerate(argvs)]
        job = JobGroup(commands, attempt)
        job.run(lambda: None)
        return job

    failed = run("raise SystemExit(9)", "waits")
    assert failed.codes() == {"h0": 9, "h1": 75} and failed.stopping and not failed.interrupted
    good = run("pass", slow)
    assert good.codes() == {"h0": 0, "h1": 0} and not good.stopping


def test_a_command_that_cannot_be_started_ends_those_that_were(attempt: Attempt) -> None:
    sleeps = Command((sys.executable, "-c", "import time; time.sleep(60)"), os.environ, "a", "stdin")
    nowhere = Command(("no-such-launcher",), os.environ, "b", "stdin")
    job = JobGroup([sleeps, nowhere], attempt)
    with pytest.raises(LaunchError, match="cannot start no-such-launcher .No such file"):
        job.run(lambda: None)
    assert job.codes() == {"a": -signal.SIGKILL, "b": None}


def test_agents_hear_that_their_launcher_lives_while_its_file_system_hangs(
    attempt: Attempt, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(process, "ALIVE_SECONDS", 0.2)
    heard = tmp_path / "heard"
    code = (
        "import pathlib, sys, time\n"
        f"heard = pathlib.Path({str(heard)!r})\n"
        "for count in range(5):\n"
        "    assert sys.stdin.readline() == 'alive\\n'\n"
        "    heard.write_text(str(count + 1))\n"
    )
    seen: list[str] = []

    def poll() -> None:
        deadline = time.monotonic() + 8
        while not seen and time.monotonic() < deadline:  # stuck until the agent has heard enough
            if heard.exists() and heard.read_text() == "5":
                seen.append("5")
            time.sleep(0.02)
        if not seen:
            job.kill()

    job = JobGroup([Command((sys.executable, "-c", code), os.environ, "a", "stdin")], attempt)
    assert job.run(poll) == 0
    assert seen == ["5"]
    assert not [thread for thread in threading.enumerate() if "_keep_alive" in thread.name]
