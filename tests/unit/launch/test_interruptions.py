"""The driver: signals while no job runs, jobs that hang, attempts that gain nothing."""

import os
import signal
from pathlib import Path

import pytest
from fake_stage import FakeLauncher

from cogview2.launch import cascade as cascade_module
from cogview2.launch import failure
from cogview2.launch.cascade import Cascade, Options
from cogview2.launch.job import Command, JobSpec
from cogview2.pipeline.config.loading import load_recipe
from cogview2.pipeline.config.stages import STAGES, Recipe
from cogview2.pipeline.errors import ExitCode, LaunchError
from cogview2.pipeline.run_dir import RunDirectory

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "runs" / "quickstart").create(load_recipe("quickstart", []))


@pytest.fixture(autouse=True)
def all_stages_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cascade_module, "built_stages", lambda: list(STAGES))


class SignalledLooking(FakeLauncher):
    """Gets signals while it looks at the hosts; what it started for that may fail of them as well."""

    def __init__(self, *numbers: signal.Signals, fails: bool = False) -> None:
        super().__init__()
        self.numbers, self.fails = numbers, fails

    def check(self, run: RunDirectory, recipe: Recipe) -> None:
        for number in self.numbers:
            os.kill(os.getpid(), number)
        if self.fails:
            raise LaunchError("host a: unreachable")


class SignalledStarting(FakeLauncher):
    """Gets a signal when nobody but the job could heed it, and the job is not there yet."""

    def commands(self, spec: JobSpec) -> list[Command]:
        os.kill(os.getpid(), signal.SIGTERM)
        return super().commands(spec)


def execute(run: RunDirectory, launcher: FakeLauncher, *stages: str) -> ExitCode:
    return Cascade(
        run, run.load_recipe(), Options(stages or ("train_tokenizer",), launcher=launcher)
    ).execute()


def lives(pid: int) -> bool:
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and " Z " not in path.read_text()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_stop_before_any_job_runs(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], number: signal.Signals, fails: bool
) -> None:
    before = {each: signal.getsignal(each) for each in SIGNALS}
    assert execute(run, SignalledLooking(number, fails=fails)) == ExitCode.REQUEUE
    assert "the same command goes on from there" in capsys.readouterr().out
    assert not run.stage("train_tokenizer").attempts()
    assert {each: signal.getsignal(each) for each in SIGNALS} == before


def test_a_refusal_without_any_signal_is_a_refusal(run: RunDirectory) -> None:
    with pytest.raises(LaunchError):
        execute(run, SignalledLooking(fails=True))


def test_a_second_interrupt_does_not_wait(run: RunDirectory) -> None:
    with pytest.raises(KeyboardInterrupt):
        execute(run, SignalledLooking(signal.SIGINT, signal.SIGINT))


def test_a_stop_just_before_the_job_stops_the_job(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.path / "mode").write_text("wait")
    assert execute(run, SignalledStarting()) == ExitCode.REQUEUE
    assert "the same command" in capsys.readouterr().out


def test_a_hang_is_told_in_one_sentence_and_leaves_nobody_behind(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(failure, "_HUNG_SECONDS", 0.3)
    monkeypatch.setattr(failure, "_LOOK_SECONDS", 0.1)
    (run.path / "mode").write_text("hang")
    assert execute(run, FakeLauncher()) == ExitCode.HANG
    told = "the job hung, noticed by rank 0: rank 1 (host a, process 7) is silent, in phase step of step 5"
    assert told in capsys.readouterr().out
    pids = run.stage("train_tokenizer").attempts()[0].pids()
    assert set(pids) == {0, 1} and not any(lives(pid) for pid in pids.values())


def test_an_attempt_that_gains_nothing_is_said_at_the_next(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = run.stage("train_vqvae").create()
    said = "attempt {} saved nothing new (what is kept so far: {}); should that go on"

    def start(mode: str) -> str:
        (run.path / "mode").write_text(mode)
        execute(run, FakeLauncher(), "train_vqvae")
        return capsys.readouterr().out

    assert "saved nothing new" not in start("fail70")
    assert said.format(1, "nothing") in start("fail70")
    manifest = stage.checkpoints / "step_000000010" / "MANIFEST.json"
    manifest.parent.mkdir()
    manifest.write_text("{}")
    assert "saved nothing new" not in start("fail70")  # attempt 2 reached step 10
    assert said.format(3, "train_vqvae step 10") in start("good")
