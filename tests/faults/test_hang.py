"""A job that hangs says so in time, names the rank that it waits for, and leaves every stack; a slow job is left alone."""

import ctypes
import errno
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_runs
import torch
import torch.distributed as dist
from watched_ranks import WatchedRanks

from cogview2.pipeline.attempt import Attempt, Beat
from cogview2.pipeline.config.launch import WatchdogConfig
from cogview2.pipeline.distributed import watchdog
from cogview2.pipeline.stage_dir import StageDirectory

pytestmark = pytest.mark.distributed
T = 2.0
CONFIG = WatchdogConfig(step_seconds=T, save_seconds=T, start_seconds=30, work_seconds=T)
STEPS = 1_000_000


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    return StageDirectory(tmp_path / "stage", "pretrain_coglm").new_attempt()


def _meet() -> None:
    dist.all_reduce(torch.ones(1))


def _train(rank: int) -> None:
    """Steps with a collective each, as training has them."""
    for step in range(1, STEPS):
        watchdog.enter("data", step)
        watchdog.enter("step", step)
        time.sleep(0.01)
        _meet()


def _shard(rank: int) -> None:
    """Work without any collective, as shard_dataset has it."""
    for step in range(1, STEPS):
        watchdog.enter("work", step)
        time.sleep(0.01)


def _read_for_ever() -> None:
    time.sleep(1000)


def _train_but_rank_1_never_gets_its_data(rank: int) -> None:
    for step in range(1, STEPS):
        watchdog.enter("data", step)
        if rank == 1 and step == 20:
            _read_for_ever()
        watchdog.enter("step", step)
        time.sleep(0.01)
        _meet()


def _keep_the_gil() -> None:
    ctypes.PyDLL(None).sleep(1000)


def _train_but_rank_1_keeps_the_gil(rank: int) -> None:
    for step in range(1, STEPS):
        watchdog.enter("step", step)
        if rank == 1 and step == 20:
            _keep_the_gil()
        time.sleep(0.01)
        _meet()


def _name(ranks: WatchedRanks, rank: int) -> str:
    return f"rank {rank} (host {socket.gethostname()}, process {ranks.ranks[rank].pid})"


def _stopped(attempt: Attempt) -> tuple[list[int | None], float, list[str]]:
    """Stop rank 1 of three; return the exit codes of the others, the seconds until then, and what they said."""
    with WatchedRanks(attempt, _train, CONFIG) as ranks:
        ranks.reach(10)
        ranks.ranks[1].send_signal(signal.SIGSTOP)
        codes, seconds = ranks.wait([0, 2], T + 5)
        name = f"{_name(ranks, 1)} is silent since "
    said = [outcome.message for outcome in attempt.outcomes()]
    return (
        codes,
        seconds,
        [text for text in said if text.startswith(name) and "in phase step of step " in text],
    )


def test_a_stopped_rank_is_named_and_the_others_leave_their_stacks(attempt: Attempt) -> None:
    codes, seconds, named = _stopped(attempt)
    print(f"named after {seconds:.1f} s, T is {T:.0f} s")
    assert codes == [76, 76] and len(named) == 2
    assert seconds <= T + 5
    assert [outcome.reason for outcome in attempt.outcomes()] == ["hang", "hang"]
    assert all(outcome.step is not None and outcome.step >= 10 for outcome in attempt.outcomes())
    for rank in (0, 2):
        assert (
            "in _meet" in attempt.stacks(rank).read_text() and "in _train" in attempt.stacks(rank).read_text()
        )
    assert not attempt.stacks(1).read_text()
    assert named[0] in attempt.rank_log(0).read_text()


def test_mutant_nobody_is_ever_silent(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_SILENT_BEATS", 10**6)
    codes, _, named = _stopped(attempt)
    assert codes == [76, 76] and not named


@pytest.mark.slow
def test_mutant_no_watchdog(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog.Watchdog, "_reason", lambda *_: "")
    assert _stopped(attempt)[0] == [None, None]


def _stuck(attempt: Attempt) -> tuple[list[int | None], list[str]]:
    with WatchedRanks(attempt, _train_but_rank_1_never_gets_its_data, CONFIG) as ranks:
        ranks.reach(10)
        codes, _ = ranks.wait([0, 1, 2], 30)
        name = f"{_name(ranks, 1)} is behind, "
    said = [outcome.message for outcome in attempt.outcomes()]
    return codes, [text for text in said if text.startswith(name) and "in phase data of step 20," in text]


def test_a_rank_that_lives_but_never_gets_its_data_is_named(attempt: Attempt) -> None:
    codes, named = _stuck(attempt)
    assert codes == [76, 76, 76] and len(named) == 3
    assert "in _read_for_ever" in attempt.stacks(1).read_text()


def test_mutant_all_phases_are_equally_far(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_ORDER", dict.fromkeys(watchdog._ORDER, 0))
    codes, named = _stuck(attempt)
    assert codes == [76, 76, 76] and not named


def _gil(attempt: Attempt) -> tuple[list[int | None], str, list[str]]:
    with WatchedRanks(attempt, _train_but_rank_1_keeps_the_gil, CONFIG) as ranks:
        codes, _ = ranks.wait([0, 1, 2], 12)
        name = f"{_name(ranks, 1)} is silent since "
    named = [end.message for end in attempt.outcomes() if end.message.startswith(name)]
    return codes, attempt.stacks(1).read_text(), named


def test_a_rank_where_not_even_the_watchdog_can_run_is_named_and_leaves_its_stacks(attempt: Attempt) -> None:
    codes, stacks, named = _gil(attempt)
    assert codes == [76, 1, 76] and len(named) == 2
    assert "in _keep_the_gil" in stacks


@pytest.mark.slow
def test_mutant_no_last_resort(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog.Watchdog, "_arm", lambda *_: None)
    codes, stacks, _ = _gil(attempt)
    assert codes == [76, None, 76] and not stacks


@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)],
    ids=["killed", "stopped"],
)
def test_a_lost_rank_is_named_where_nobody_waits_for_it(attempt: Attempt, number: signal.Signals) -> None:
    with WatchedRanks(attempt, _shard, CONFIG, coupled=False) as ranks:
        ranks.reach(10)
        ranks.ranks[2].send_signal(number)
        codes, seconds = ranks.wait([0, 1], T + 5)
        name = _name(ranks, 2)
    assert codes == [76, 76] and seconds <= T + 5
    assert all(outcome.message.startswith(f"{name} is silent") for outcome in attempt.outcomes())


def _killed(attempt: Attempt) -> list[str]:
    with WatchedRanks(attempt, _train, CONFIG) as ranks:
        ranks.reach(10)
        ranks.ranks[1].send_signal(signal.SIGKILL)
        codes, seconds = ranks.wait([0, 2], T + 5)
        assert codes == [1, 1] and seconds < T
        name = _name(ranks, 1)
    return [
        end.message for end in attempt.outcomes() if f"{name} was killed in phase step of step" in end.message
    ]


def test_a_killed_rank_is_named_by_those_that_lost_its_connection(attempt: Attempt) -> None:
    assert _killed(attempt)


def test_mutant_nobody_looks_who_is_gone(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "gone", lambda: "")
    assert not _killed(attempt)


def _with_a_full_disk(
    attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[int | None], list[str]]:
    """No heartbeat can be written for longer than the patience; then rank 1 is stopped.

    Returns:
        The exit codes of the others, and what they say of rank 1.
    """
    full, write = attempt.path / "full", Attempt.write_beat

    def write_beat(self: Attempt, beat: Beat) -> None:
        if full.exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, beat)

    monkeypatch.setattr(Attempt, "write_beat", write_beat)
    with WatchedRanks(attempt, _train, CONFIG) as ranks:
        ranks.reach(10)
        full.touch()
        codes, _ = ranks.wait([0], 1.75 * T)
        full.unlink()
        if codes != [None]:
            return ranks.wait([0, 2], 5)[0], []
        last = max(beat.step or 0 for beat in attempt.beats().values())
        ranks.reach(last + 1)
        ranks.ranks[1].send_signal(signal.SIGSTOP)
        codes, seconds = ranks.wait([0, 2], T + 5)
        print(f"named {seconds:.1f} s after the stop, T is {T:.0f} s")
        name = f"{_name(ranks, 1)} is silent since "
    return codes, [end.message for end in attempt.outcomes() if end.message.startswith(name)]


def test_on_a_full_disk_nobody_is_silent_and_later_a_stopped_rank_is_named(
    attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, named = _with_a_full_disk(attempt, monkeypatch)
    assert codes == [76, 76] and len(named) == 2
    for rank in range(3):
        said = attempt.rank_log(rank).read_text()
        assert said.count("heartbeats cannot be written below") == 1
        assert said.count("heartbeats can be written again") == 1


def test_mutant_others_are_judged_without_an_own_heartbeat(
    attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = property(lambda _: None, lambda _, value: None)
    monkeypatch.setattr(watchdog.Watchdog, "_mute_since", never, raising=False)
    codes, named = _with_a_full_disk(attempt, monkeypatch)
    assert codes == [76, 76] and not named


def _fast(rank: int) -> None:
    for step in range(1, 10_001):
        watchdog.enter("data", step)
        watchdog.enter("step", step)
        _meet()


def _slow(rank: int) -> None:
    for step in range(1, 4):
        watchdog.enter("data", step)
        watchdog.enter("step", step)
        time.sleep(T / 2 if rank == 1 else 0.0)
        _meet()


def _one_works(rank: int) -> None:
    """Rank 0 works much longer than T, in small pieces; the others wait for it."""
    if rank == 0:
        deadline = time.monotonic() + 1.75 * T
        while time.monotonic() < deadline:
            watchdog.enter("work")
            time.sleep(T / 20)
    watchdog.enter(watchdog.WAIT)
    _meet()


def _paused(rank: int) -> None:
    """Rank 1 is stopped for T / 2 in the middle of its steps; rank 0 wakes it up."""
    for step in range(1, 60):
        watchdog.enter("step", step)
        if rank == 1 and step == 20:
            if os.fork() == 0:
                time.sleep(T / 2)
                os.kill(os.getppid(), signal.SIGCONT)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.01)
        _meet()


def _runs_to_its_end(attempt: Attempt, work: object) -> bool:
    with WatchedRanks(attempt, work, CONFIG, count=2) as ranks:  # type: ignore[arg-type]
        codes, _ = ranks.wait([0, 1], 60)
    said = [outcome.message for outcome in attempt.outcomes() if outcome.code]
    assert codes in ([0, 0], [76, 76]), (codes, said)
    return codes == [0, 0] and not attempt.hang_path.exists()


@pytest.mark.parametrize("work", [_fast, _slow, _one_works, _paused])
def test_no_false_alarm(attempt: Attempt, work: object) -> None:
    assert _runs_to_its_end(attempt, work)


def test_mutant_whoever_waits_is_judged_by_its_own_progress(
    attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "_PATIENCE", watchdog._PATIENCE | {"idle": "work_seconds"})
    monkeypatch.setattr(watchdog, "_ORDER", watchdog._ORDER | {"idle": 0})
    entered = watchdog.enter
    monkeypatch.setattr(
        watchdog, "enter", lambda phase, step=None: entered("idle" if phase == "wait" else phase)
    )
    assert not _runs_to_its_end(attempt, _one_works)


@pytest.mark.slow
def test_the_real_command_ends_with_76_and_names_the_rank(
    finished_run: tiny_runs.Finished, tmp_path: Path
) -> None:
    run = tiny_runs.copy(finished_run.run, tmp_path / "tiny", until="shard_dataset")
    long = (
        "coglm.train.steps=5000",
        "coglm.train.checkpoint.every_steps=5000",
        "launch.watchdog.step_seconds=4",
    )
    argv = [sys.executable, "-m", "cogview2.launch.cli", *tiny_runs.run_arguments(tmp_path, *long)]
    with subprocess.Popen(
        [*argv, "--stages", "pretrain_coglm"], env=tiny_runs.environment(), stdout=subprocess.PIPE, text=True
    ) as launcher:
        metrics = run.stage("pretrain_coglm").metrics
        deadline = time.monotonic() + 120
        while not metrics.is_file() or metrics.read_text().count("\n") < 5:
            assert time.monotonic() < deadline and launcher.poll() is None
            time.sleep(0.02)
        attempt = run.stage("pretrain_coglm").latest_attempt()
        assert attempt is not None
        pid, begin = attempt.pids()[1], time.monotonic()
        os.kill(pid, signal.SIGSTOP)
        while attempt.outcome(0) is None:
            assert time.monotonic() < begin + 60
            time.sleep(0.02)
        named = time.monotonic() - begin
        said = launcher.communicate(timeout=60)[0]
        seconds = time.monotonic() - begin
    print(f"T is 4 s: named after {named:.1f} s, the command ended after {seconds:.1f} s")
    assert launcher.returncode == 76, said
    assert (
        f"the job hung, noticed by rank 0: rank 1 (host {socket.gethostname()}, process {pid}) is silent"
        in said
    )
    assert named <= 4 + 5 and seconds <= 4 + 15
    assert "train_step" in attempt.stacks(0).read_text()
    assert not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text()
