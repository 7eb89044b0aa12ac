"""Which host was lost, and which rank failed first."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from cogview2.launch import process
from cogview2.launch.failure import (
    Losses,
    PeerStop,
    explain,
    rank_words,
    record_silent_ends,
    was_interrupted,
)
from cogview2.launch.job import Command, Host, JobSpec
from cogview2.launch.process import JobGroup
from cogview2.pipeline.attempt import HUNG, STOPPED, Attempt, Beat
from cogview2.pipeline.stage_dir import StageDirectory


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    StageDirectory(tmp_path / "stages" / "train_vqvae", "train_vqvae").new_attempt()
    return JobSpec("train_vqvae", tmp_path, 1, (Host("a", 1), Host("b", 2)), "a", 4711)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock of the launcher, one number that a test moves on."""
    now = [100.0]
    monkeypatch.setattr("cogview2.launch.failure.time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


SRUN = ("srun", "--nodes=2", "python", "-P", "-m", "cogview2.launch.agent", "--job", "x")


def job_of(attempt: Attempt, stop: str, *codes: int | None, argv: tuple[str, ...] = ("x",)) -> JobGroup:
    job = JobGroup([Command(argv, {}, "x", stop)] * len(codes), attempt)  # type: ignore[arg-type]
    for member, code in zip(job.members, codes, strict=True):
        member.process = SimpleNamespace(poll=lambda code=code: code)  # type: ignore[assignment]
    return job


def test_a_host_cut_off_is_lost_even_if_its_ranks_record_their_end_later(spec: JobSpec) -> None:
    """Its agent ends the ranks on its side of the broken network; their records may be seen in the end."""
    attempt = Attempt(spec.folder)
    losses = Losses(spec, attempt, job_of(attempt, "stdin", None, 255))
    losses.look()
    for rank in range(3):
        attempt.write_outcome(rank, "killed", 1, None, "it did not leave")
    assert losses.hosts() == [1]
    code, lines = explain(spec, attempt, losses.job, 255, losses.hosts())
    assert code == 1
    assert lines[0] == "host b (ranks 1 to 2) was lost: its connection ended and its ranks left no record"
    assert len([line for line in lines if "rank" in line]) == 1


def test_a_connection_that_ends_after_the_records_is_no_loss(spec: JobSpec) -> None:
    attempt = Attempt(spec.folder)
    attempt.write_outcome(2, "NumericError", 70, 17, "nan")
    attempt.write_outcome(0, "RuntimeError", 1, 17, "closed by peer")
    attempt.rank_log(2).write_text("".join(f"line {k}\n" for k in range(50)))
    losses = Losses(spec, attempt, job_of(attempt, "stdin", 1, 255))
    assert losses.hosts() == []
    code, lines = explain(spec, attempt, losses.job, 255, [])
    assert code == 70
    assert lines[0] == "rank 2 on b failed first at step 17: NumericError: nan"
    assert lines[2:-1] == [f"  line {k}" for k in range(30, 50)]


@pytest.mark.parametrize(
    ("stop", "argv", "recorded", "expected"),
    [
        ("stdin", ("ssh",), {}, [0, 1]),
        ("stdin", ("ssh",), {0: 1}, [1]),
        ("SIGUSR1", SRUN, {0: 1, 1: 1}, []),
        ("SIGUSR1", SRUN, {2: 1}, [0]),
        ("SIGUSR1", SRUN, {2: 75}, [0]),
        ("SIGUSR1", SRUN, {}, []),  # nothing was ever started: srun or mpirun says why
        ("SIGUSR1", ("mpirun",), {2: 1}, []),  # mpirun killed rank 0 before it could say anything
        ("SIGUSR1", ("mpirun",), {2: 75}, []),
        ("SIGUSR1", ("mpirun",), {2: 0}, [0]),
        ("SIGUSR1", ("mpirun",), {}, []),
        ("ranks", ("x",), {}, []),
    ],
)
def test_who_is_lost_at_the_end(
    spec: JobSpec, stop: str, argv: tuple[str, ...], recorded: dict[int, int], expected: list[int]
) -> None:
    attempt = Attempt(spec.folder)
    for rank, code in recorded.items():
        attempt.write_outcome(rank, "RuntimeError", code, None, "closed by peer")
    job = job_of(attempt, stop, 1, argv=argv)
    assert Losses(spec, attempt, job).hosts() == expected
    job.interrupted = True
    assert Losses(spec, attempt, job).hosts() == []


@pytest.mark.parametrize("started", ["srun", "launcher"])
def test_srun_that_ends_with_255_is_no_connection(spec: JobSpec, started: str) -> None:
    attempt = Attempt(spec.folder)
    job = job_of(attempt, "SIGUSR1", 255, argv=SRUN if started == "srun" else ("mpirun",))
    losses = Losses(spec, attempt, job)
    losses.look()
    for rank in range(3):
        attempt.write_outcome(rank, "NumericError", 70, 17, "nan")
    assert losses.hosts() == []


@pytest.mark.parametrize(
    ("ends", "told", "expected"),
    [
        ([], True, True),
        ([], False, False),
        ([("killed", 1)], True, True),
        ([("killed", 1)], False, False),
        ([(STOPPED, 75)], False, True),  # srun's agents may be told by Slurm itself
        ([("RuntimeError", 1), (STOPPED, 75)], True, True),  # rank 0 missed rank 1, which never began
        ([("RuntimeError", 1), (STOPPED, 75)], False, False),
        ([("NumericError", 70), (STOPPED, 75)], True, False),
        ([("RuntimeError", 1), ("preempted", 75)], True, False),
    ],
)
def test_what_counts_as_interrupted(
    spec: JobSpec, ends: list[tuple[str, int]], told: bool, expected: bool
) -> None:
    attempt = Attempt(spec.folder)
    for rank, (reason, code) in enumerate(ends):
        attempt.write_outcome(rank, reason, code, None, "")
    job = job_of(attempt, "stdin", 1)
    job.interrupted = told
    assert was_interrupted(attempt, job) is expected


def test_peers_are_stopped_a_while_after_a_failure(spec: JobSpec, now: list[float]) -> None:
    attempt = Attempt(spec.folder)
    job = job_of(attempt, "SIGUSR1", None)
    peers = PeerStop(attempt, job)

    def stopped_after(seconds: float) -> bool:
        now[0] += seconds
        peers.look()
        return job.stopping

    attempt.write_outcome(1, "done", 0, None, "")
    assert not stopped_after(0) and not stopped_after(3600)
    attempt.write_outcome(2, "NumericError", 70, 3, "nan")
    assert not stopped_after(10)
    assert not stopped_after(process.PEER_SECONDS - 1)
    assert stopped_after(1.5) and not job.interrupted


def test_a_job_that_hangs_is_killed_once_its_ranks_had_time_to_say_so(
    spec: JobSpec, now: list[float]
) -> None:
    attempt = Attempt(spec.folder)
    job = job_of(attempt, "ranks", None)
    peers = PeerStop(attempt, job, asks=False)
    attempt.write_outcome(1, HUNG, 76, 3, "rank 2 is silent")
    killed = []
    for _ in range(10):
        peers.look()
        killed.append(job.killed)
        now[0] += 1.0
    assert killed == [False] * 5 + [True] * 5


def test_a_job_that_merely_failed_is_left_to_the_launcher_that_minds_it(
    spec: JobSpec, now: list[float]
) -> None:
    attempt = Attempt(spec.folder)
    job = job_of(attempt, "ranks", None)
    peers = PeerStop(attempt, job, asks=False)
    attempt.write_outcome(1, "NumericError", 70, 3, "nan")
    for _ in range(5):
        peers.look()
        now[0] += 100.0
    assert not job.killed and not job.stopping


def silent_end(attempt: Attempt, step: int) -> None:
    """Rank 1 dies without a word, and rank 0 says so."""
    attempt.prepare_beats()
    (attempt.path / "rank-0.pid").write_text("17")
    (attempt.path / "rank-1.pid").write_text("18")
    attempt.write_beat(Beat(1, "a", 18, "step", step, 40, 1000.0, 1001.0))
    attempt.write_outcome(0, "RuntimeError", 1, step, "connection closed by peer", at=1001.5)


def test_a_rank_that_ended_without_a_word_is_named_with_its_last_step(spec: JobSpec) -> None:
    attempt = Attempt(spec.folder)
    silent_end(attempt, 7)
    job = job_of(attempt, "ranks", 1)
    record_silent_ends(attempt, job, 1)
    _, lines = explain(spec, attempt, job, 1, [])
    assert lines[0].startswith("rank 1 failed first at step 7: killed: it ended without a word")
    assert "in phase step of step 7" in lines[0]


def test_a_rank_that_left_nothing_but_its_stacks_hung(spec: JobSpec) -> None:
    attempt = Attempt(spec.folder)
    silent_end(attempt, 7)
    attempt.stacks(1).write_text("Timeout (0:00:05)!")
    job = job_of(attempt, "ranks", 1)
    record_silent_ends(attempt, job, 1)
    code, lines = explain(spec, attempt, job, 1, [])
    assert code == 76 and lines[0].startswith("the job hung, noticed by rank 1: it was stuck where")
    assert str(attempt.stacks(1)) in lines[0]


@pytest.mark.parametrize("why", ["good", "killed", "interrupted", "agents"])
def test_no_end_is_invented(spec: JobSpec, why: str) -> None:
    attempt = Attempt(spec.folder)
    silent_end(attempt, 7)
    job = job_of(attempt, "stdin" if why == "agents" else "ranks", 1)
    job.killed, job.interrupted = why == "killed", why == "interrupted"
    record_silent_ends(attempt, job, 0 if why == "good" else 1)
    assert attempt.outcome(1) is None


def test_words() -> None:
    assert rank_words(range(3, 4)) == "rank 3" and rank_words(range(4, 8)) == "ranks 4 to 7"
