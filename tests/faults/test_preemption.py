"""Whoever of a job is asked to stop, in whatever loop of whatever stage: all ranks leave in time, and nothing is lost."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_runs
from forked_stages import ForkedRanks

from cogview2.pipeline.errors import Preempted
from cogview2.pipeline.run_dir import RunDirectory
from cogview2.pipeline.training.preemption import StopFlag
from cogview2.pipeline.training.state.manifest import committed_steps, folder_name, verify
from cogview2.stages import _stopping

pytestmark = pytest.mark.distributed
DEADLINE_SECONDS = 10.0
LONG = {
    "train_tokenizer": ["data.drawings.count=6000", "tokenizer.input_sentences=20000"],
    "train_vqvae": ["vqvae.train.steps=500", "vqvae.train.checkpoint.every_steps=500"],
    "shard_dataset": ["data.drawings.count=4000", "shards.samples_per_shard=16"],
    "pretrain_coglm": ["coglm.train.steps=2000", "coglm.train.checkpoint.every_steps=2000"],
    "finetune_superres": ["direct_sr.train.steps=500", "direct_sr.train.checkpoint.every_steps=500"],
    "evaluate": ["evaluate.chunk=1"],
}
"""Stage -> what makes it last."""
TRAINED = {
    "train_vqvae": "train_vqvae",
    "pretrain_coglm": "pretrain_coglm",
    "finetune_superres": "finetune_superres/direct",
}
BEFORE = {
    "train_tokenizer": None,
    "train_vqvae": "train_tokenizer",
    "shard_dataset": "train_vqvae",
    "pretrain_coglm": "shard_dataset",
    "finetune_superres": "pretrain_coglm",
    "evaluate": "finetune_superres",
}


@dataclass(frozen=True)
class Case:
    """One preemption: of this stage, by this signal, to these of the two ranks, after so many pieces of work."""

    stage: str
    number: signal.Signals
    receivers: tuple[int, ...]
    pieces: int

    def __str__(self) -> str:
        return f"{self.stage}-{self.number.name}-to-{'-'.join(map(str, self.receivers))}-after-{self.pieces}"


def all_cases(seed: int) -> list[Case]:
    """Return 54 cases; the moments are drawn from `seed`."""
    rng = random.Random(seed)
    signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    return [
        Case(stage, number, receivers, rng.randint(1, 6))
        for stage, number, receivers in itertools.product(LONG, signals, ((0,), (1,), (0, 1)))
    ]


SEED = 6
GATE = [
    Case("pretrain_coglm", signal.SIGUSR1, (1,), 3),
    Case("shard_dataset", signal.SIGTERM, (1,), 2),
    Case("evaluate", signal.SIGINT, (0,), 1),
]


def pieces(run: RunDirectory, stage: str) -> list[Path]:
    """Return the files of finished pieces of work of a stage without checkpoints."""
    folder = run.stage(stage).path
    if stage == "shard_dataset":
        return sorted(folder.glob("progress/*/*.json"))
    return sorted(path for path in folder.glob("work/*/*/*.npz"))


def done_so_far(run: RunDirectory, job: ForkedRanks, stage: str) -> int:
    """Return how many pieces of work are finished; steps of training, or beats of the tokenizer's."""
    if stage in TRAINED:
        path = run.stage(TRAINED[stage]).metrics
        return path.read_text().count("\n") if path.is_file() else 0
    if stage == "train_tokenizer":
        beat = job.attempt.beat(0)
        return 100 if beat is not None and beat.phase == "work" else 0
    return len(pieces(run, stage))


def prepare(finished: tiny_runs.Finished, path: Path, stage: str) -> RunDirectory:
    """Return a run whose next stage is `stage`, and long."""
    before = BEFORE[stage]
    if before is None:
        return tiny_runs.new_run(path, *LONG[stage])
    run = tiny_runs.copy(finished.run, path, until=before)
    return tiny_runs.override(run, *LONG[stage])


def preempt(run: RunDirectory, case: Case) -> tuple[list[int], float, ForkedRanks]:
    """Stop the job as the case says; return exit codes, seconds from the signal to the end, and the job."""
    job = ForkedRanks(run, case.stage, 2)
    job.when(lambda: done_so_far(run, job, case.stage) >= case.pieces)
    begin = time.monotonic()
    for rank in case.receivers:
        job.processes[rank].send_signal(case.number)
    return job.wait(), time.monotonic() - begin, job


def check(run: RunDirectory, case: Case, job: ForkedRanks, codes: list[int], seconds: float) -> None:
    """Every rank left with 75, in time, and what the stage keeps is whole."""
    assert codes == [75, 75], f"{codes}\n{job.logs()}"
    ends = job.attempt.outcomes()
    assert [end.reason for end in ends] == ["preempted"] * 2
    assert run.stage(case.stage).done() is None
    assert any(case.number.name in end.message for end in ends), ends
    if case.stage in TRAINED:
        unit = run.stage(TRAINED[case.stage])
        (step,) = {end.step for end in ends}  # all ranks stopped after the same
        assert step is not None and committed_steps(unit.checkpoints) == [step]
        assert verify(unit.checkpoints / folder_name(step)).step == step
        assert not list(unit.checkpoints.glob(".*"))
    assert seconds <= DEADLINE_SECONDS, f"{seconds:.1f} s\n{job.logs()}"


@pytest.mark.parametrize("case", GATE, ids=str)
def test_all_ranks_save_and_leave(finished_run: tiny_runs.Finished, tmp_path: Path, case: Case) -> None:
    run = prepare(finished_run, tmp_path / "run", case.stage)
    codes, seconds, job = preempt(run, case)
    print(f"{case}: {seconds:.2f} s")
    check(run, case, job, codes, seconds)
    kept = {path: path.stat().st_mtime_ns for path in pieces(run, case.stage)}
    if case.stage in TRAINED:
        return  # that the next attempt goes on exactly is shown by test_resume_exact.py
    assert len(kept) >= case.pieces
    again = ForkedRanks(run, case.stage, 2).when(lambda: len(pieces(run, case.stage)) > len(kept))
    again.kill()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # nothing is done twice


@pytest.mark.slow
def test_54_preemptions(finished_run: tiny_runs.Finished, tmp_path: Path) -> None:
    print(f"seed {SEED}")
    prepared = {stage: prepare(finished_run, tmp_path / f"{stage}-0", stage) for stage in LONG}
    times: dict[str, list[float]] = {}
    for number, case in enumerate(all_cases(SEED)):
        before = BEFORE[case.stage]
        run = prepared[case.stage]
        if number:
            path = tmp_path / f"case-{number}"
            recipe = LONG[case.stage]
            run = (
                tiny_runs.new_run(path, *recipe)
                if before is None
                else tiny_runs.copy(run, path, until=before)
            )
        codes, seconds, job = preempt(run, case)
        print(f"{case}: {codes} {seconds:.2f} s", flush=True)
        check(run, case, job, codes, seconds)
        times.setdefault(case.stage, []).append(seconds)
    for stage, found in times.items():
        print(f"{stage}: {len(found)} of {len(found)}, at most {max(found):.2f} s")


def _alone(stop: StopFlag, words: str) -> None:
    """As `meet`, without asking the others."""
    if stop.is_set:
        raise Preempted(words)


def test_mutant_a_rank_that_leaves_alone(
    finished_run: tiny_runs.Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StopFlag, "share", lambda self, *_: self)
    monkeypatch.setattr(_stopping, "meet", _alone)
    case = Case("shard_dataset", signal.SIGTERM, (1,), 2)
    run = prepare(finished_run, tmp_path / "run", case.stage)
    job = ForkedRanks(run, case.stage, 2)
    job.when(lambda: done_so_far(run, job, case.stage) >= case.pieces)
    job.processes[1].send_signal(case.number)
    assert job.processes[1].wait(DEADLINE_SECONDS) == 75
    assert job.processes[0].poll() is None  # it goes on as if nothing had happened, and would fail in the end
    job.kill()


def test_further_signals_while_it_saves_change_nothing(
    finished_run: tiny_runs.Finished, tmp_path: Path
) -> None:
    run = prepare(finished_run, tmp_path / "run", "pretrain_coglm")
    slow = {"COGVIEW2_TEST_FAULTS": "1", "COGVIEW2_FAULT": "fsops.fsync:delay=0.3:n=*"}
    job = ForkedRanks(run, "pretrain_coglm", 2, **slow)
    job.when(lambda: done_so_far(run, job, "pretrain_coglm") >= 3)
    checkpoints = run.stage("pretrain_coglm").checkpoints
    job.processes[0].send_signal(signal.SIGTERM)
    job.when(lambda: bool(list(checkpoints.glob(".staging*"))))
    sent = 0
    while any(process.poll() is None for process in job.processes):
        for process, number in zip(job.processes, (signal.SIGUSR1, signal.SIGINT), strict=True):
            process.send_signal(number)
        sent += 1
        time.sleep(0.02)
    assert sent >= 5
    check(run, Case("pretrain_coglm", signal.SIGTERM, (0,), 3), job, job.wait(), 0.0)


def _signal_while_it_imports(run: RunDirectory, how: list[str]) -> tuple[int, str]:
    """Start a rank of its own process, send SIGTERM while torch is imported, and return its end."""
    attempt = run.stage("train_tokenizer").new_attempt()
    argv = [sys.executable, *how, "--run-dir", str(run.path), "--attempt", str(attempt.number)]
    with subprocess.Popen(argv, env=tiny_runs.environment() | {"RANK": "0", "WORLD_SIZE": "1"}) as rank:
        deadline = time.monotonic() + 60
        while "libtorch" not in Path(f"/proc/{rank.pid}/maps").read_text():
            assert time.monotonic() < deadline and rank.poll() is None
            time.sleep(0.005)
        assert not attempt.pids()  # nothing of ours runs yet
        rank.send_signal(signal.SIGTERM)
        code = rank.wait(60)
    end = attempt.outcome(0)
    return code, end.message if end is not None else ""


def test_a_signal_before_anything_is_imported_is_heeded(tmp_path: Path) -> None:
    run = tiny_runs.new_run(tmp_path / "run", *LONG["train_tokenizer"])
    code, said = _signal_while_it_imports(run, ["-m", "cogview2.stages.train_tokenizer"])
    assert code == 75 and said.startswith("stopped by SIGTERM")


def test_mutant_signals_are_not_held(tmp_path: Path) -> None:
    run = tiny_runs.new_run(tmp_path / "run", *LONG["train_tokenizer"])
    code = "import runpy; runpy.run_module('cogview2.stages.train_tokenizer', run_name='__main__')"
    assert _signal_while_it_imports(run, ["-c", code]) == (-signal.SIGTERM, "")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda n: n.name)
@pytest.mark.parametrize("receiver", ["the launcher", "rank 1"])
def test_the_launcher_asks_to_be_started_again(
    finished_run: tiny_runs.Finished, tmp_path: Path, number: signal.Signals, receiver: str
) -> None:
    """The real command, its ranks under DeepSpeed's launcher."""
    tiny_runs.copy(finished_run.run, tmp_path / "tiny", until="shard_dataset")
    words = [*tiny_runs.run_arguments(tmp_path, *LONG["pretrain_coglm"]), "--stages", "pretrain_coglm"]
    run = RunDirectory(tmp_path / "tiny")
    argv = [sys.executable, "-m", "cogview2.launch.cli", *words]
    with subprocess.Popen(argv, env=tiny_runs.environment(), stdout=subprocess.PIPE, text=True) as launcher:
        deadline = time.monotonic() + 120
        metrics = run.stage("pretrain_coglm").metrics
        while not metrics.is_file() or metrics.read_text().count("\n") < 3:
            assert time.monotonic() < deadline and launcher.poll() is None
            time.sleep(0.02)
        attempt = run.stage("pretrain_coglm").latest_attempt()
        assert attempt is not None
        begin = time.monotonic()
        os.kill(launcher.pid if receiver == "the launcher" else attempt.pids()[1], number)
        said = launcher.communicate(timeout=60)[0]
        seconds = time.monotonic() - begin
    print(f"{number.name} to {receiver}: {seconds:.1f} s")
    assert launcher.returncode == 75, said
    assert "which is saved; the same command goes on from there" in said
    (step,) = {end.step for end in attempt.outcomes()}
    assert committed_steps(run.stage("pretrain_coglm").checkpoints) == [step]
    assert seconds <= DEADLINE_SECONDS
    assert json.loads((attempt.path / "result.json").read_text())["returncode"] != 0
