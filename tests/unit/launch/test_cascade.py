"""Stages are started in order, believed only by their DONE record, and resumed by the same command."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from fake_stage import FakeLauncher, OneCommand

from cogview2.launch import cascade as cascade_module
from cogview2.launch import cli, process
from cogview2.launch.cascade import Cascade, Options, resolve_deepspeed, select_stages, summary
from cogview2.launch.status import find_run, log_file, table
from cogview2.pipeline.config.loading import load_recipe
from cogview2.pipeline.config.stages import STAGES
from cogview2.pipeline.errors import CogView2Error, ConfigError, ExitCode, LaunchError, LockedError
from cogview2.pipeline.run_dir import RunDirectory, units


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "runs" / "quickstart")


@pytest.fixture(autouse=True)
def all_stages_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cascade_module, "built_stages", lambda: list(STAGES))


def execute(
    run: RunDirectory, *overrides: str, stages: str | None = None, restart_stale: bool = False
) -> ExitCode:
    recipe = load_recipe("quickstart", list(overrides))
    options = Options(select_stages(stages), restart_stale=restart_stale, launcher=FakeLauncher())
    return Cascade(run, recipe, options).execute()


def complete(run: RunDirectory) -> None:
    """Let every stage be done without starting it."""
    recipe = load_recipe("quickstart", [])
    run.create(recipe)
    for stage in STAGES:
        for unit in units(stage):
            folder = run.stage(unit).create()
            (folder.output / "made.txt").write_text(unit)
            folder.write_done(run.inputs(unit, recipe), folder.output_files(), run.fingerprint(recipe, unit))


def set_mode(run: RunDirectory, mode: str) -> None:
    (run.path / "mode").write_text(mode)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, list(STAGES)),
        ("train_vqvae", ["train_vqvae"]),
        ("train_vqvae..pretrain_coglm", ["train_vqvae", "shard_dataset", "pretrain_coglm"]),
        ("finetune_superres..", ["finetune_superres", "evaluate"]),
        ("..train_vqvae", ["train_tokenizer", "train_vqvae"]),
        ("evaluate,train_vqvae", ["train_vqvae", "evaluate"]),
    ],
)
def test_selection(text: str | None, expected: list[str]) -> None:
    assert list(select_stages(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train_vqae", "'train_vqae' is no stage; the stages are train_tokenizer"),
        ("evaluate..train_vqvae", "write train_vqvae..evaluate"),
        ("", "'' is no stage"),
    ],
)
def test_bad_selection(text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        select_stages(text)


def test_the_whole_cascade_then_nothing_is_done_again(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(run) == ExitCode.DONE
    out = capsys.readouterr().out
    for index, stage in enumerate(STAGES, start=1):
        assert f"[{index}/6] {stage}" in out
        assert run.is_done(stage)
        assert len(run.stage(stage).attempts()) == 1
    assert "step 10/10  loss 1.5  done in" in out
    resolved = json.loads(run.deepspeed_path("pretrain_coglm").read_text())
    train = load_recipe("quickstart", []).coglm.train
    assert resolved["train_batch_size"] == train.global_batch
    assert resolved["gradient_clipping"] == train.optimizer.gradient_clipping
    assert execute(run) == ExitCode.DONE
    out = capsys.readouterr().out
    assert out.count("skipped: done before") == 6
    assert all(len(run.stage(stage).attempts()) == 1 for stage in STAGES)


def test_stages_that_are_not_built_are_named_and_skipped(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cascade_module, "built_stages", lambda: ["train_tokenizer", "pretrain_coglm"])
    assert execute(run) == ExitCode.DONE
    out = capsys.readouterr().out
    assert "stages not built yet: train_vqvae, shard_dataset, finetune_superres, evaluate" in out
    assert "[2/2] pretrain_coglm" in out


def test_a_stage_without_its_inputs_is_not_started(run: RunDirectory) -> None:
    with pytest.raises(
        LaunchError, match=r"reads the outputs of train_tokenizer, train_vqvae.*--stages train_tok"
    ):
        execute(run, stages="shard_dataset")


def test_success_is_the_record_not_the_exit_code(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    run.create(load_recipe("quickstart", []))
    set_mode(run, "silent")
    assert execute(run, stages="train_vqvae") == ExitCode.FAILED
    assert "ended without its DONE record (launcher exit code 0)" in capsys.readouterr().out
    set_mode(run, "badcode")
    assert execute(run, stages="train_vqvae") == ExitCode.DONE


@pytest.mark.parametrize("code", [70, 73, 76, 78])
def test_a_failure_gives_its_code_its_rank_and_its_log(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    run.create(load_recipe("quickstart", []))
    set_mode(run, f"fail{code}")
    assert execute(run, stages="train_vqvae") == code
    out = capsys.readouterr().out
    assert "rank 0 failed first at step 5: numeric: loss is nan" in out
    assert "rank 0 INFO cogview2.fake: working on train_vqvae" in out
    assert f"all logs: {run.stage('train_vqvae').attempts()[0].path}" in out


def test_an_unknown_code_is_a_plain_failure(run: RunDirectory) -> None:
    run.create(load_recipe("quickstart", []))
    set_mode(run, "fail12")
    assert execute(run, stages="train_vqvae") == ExitCode.FAILED


def interrupt_when_it_works(run: RunDirectory, stage: str) -> None:
    """Send SIGINT to ourselves once the stage's first attempt has begun."""
    pid_file = run.stage(stage).path / "attempts" / "0001" / "rank-0.pid"

    def interrupt() -> None:
        while not pid_file.exists():
            time.sleep(0.02)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()


def test_an_interrupt_saves_and_the_same_command_goes_on(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    run.create(load_recipe("quickstart", []))
    set_mode(run, "wait")
    interrupt_when_it_works(run, "train_vqvae")
    assert execute(run, stages="train_vqvae") == ExitCode.REQUEUE
    out = capsys.readouterr().out
    assert "saved at step 5" in out and out.count("the same command goes on from there") == 1
    assert "interrupted" in table(run)
    set_mode(run, "good")
    assert execute(run, stages="train_vqvae") == ExitCode.DONE
    assert len(run.stage("train_vqvae").attempts()) == 2


@pytest.mark.parametrize(("stages", "expected"), [("..train_vqvae", 75), ("train_tokenizer", 0)])
def test_a_stop_that_the_stage_outran_is_not_forgotten(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], stages: str, expected: int
) -> None:
    run.create(load_recipe("quickstart", []))
    set_mode(run, "late")
    interrupt_when_it_works(run, "train_tokenizer")
    assert execute(run, stages=stages) == expected
    assert run.is_done("train_tokenizer") and not run.stage("train_vqvae").attempts()
    said = "stopped after train_tokenizer, which is done; the same command goes on from there"
    assert (said in capsys.readouterr().out) == (expected == 75)


def test_the_peers_of_a_failed_rank_are_stopped_under_one_command(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(process, "PEER_SECONDS", 0.3)
    run.create(load_recipe("quickstart", []))
    set_mode(run, "peers")
    options = Options(("train_tokenizer",), launcher=OneCommand())
    assert Cascade(run, load_recipe("quickstart", ["launch.ranks=2"]), options).execute() == 70
    attempt = run.stage("train_tokenizer").attempts()[0]
    assert [outcome.message for outcome in attempt.outcomes()] == ["loss is nan", "saved"]
    assert "rank 0 on localhost failed first at step 5" in capsys.readouterr().out


def test_a_changed_setting_of_a_started_stage_is_refused_by_name(run: RunDirectory) -> None:
    before = load_recipe("quickstart", []).vqvae.train.steps
    execute(run, stages="train_tokenizer..train_vqvae")
    with pytest.raises(ConfigError) as caught:
        execute(run, f"vqvae.train.steps={before + 7}", "vqvae.ema_decay=0.9")
    message = str(caught.value)
    values = f"vqvae.train.steps = {before}, now it is {before + 7}"
    for part in ["stage train_vqvae", values, "1 more key", "--restart-stale"]:
        assert part in message
    assert run.load_recipe() == load_recipe("quickstart", [])


def test_a_setting_of_a_later_stage_may_change(run: RunDirectory) -> None:
    execute(run, stages="train_tokenizer..train_vqvae")
    steps = load_recipe("quickstart", []).coglm.train.steps + 7
    assert execute(run, f"coglm.train.steps={steps}", "launch.ranks=1") == ExitCode.DONE
    assert run.load_recipe().coglm.train.steps == steps
    assert len(run.stage("train_vqvae").attempts()) == 1


def test_restart_sets_the_stage_and_its_readers_aside(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    execute(run)
    capsys.readouterr()
    change = f"iterative_sr.train.steps={load_recipe('quickstart', []).iterative_sr.train.steps + 1}"
    assert execute(run, change, restart_stale=True) == ExitCode.DONE
    out = capsys.readouterr().out
    assert (
        "finetune_superres/iterative: iterative_sr.train.steps changed, the old one is in stale/0001-" in out
    )
    assert "evaluate: its inputs are made anew, the old one is in stale/0002-evaluate" in out
    assert out.count("skipped") == 4
    assert (run.path / "stale" / "0002-evaluate" / "DONE.json").exists()
    assert execute(run, change) == ExitCode.DONE


@pytest.mark.parametrize("change", ["evaluate.blur_radii=[0]", "sampling.clusters=32", "evaluate.captions=7"])
def test_a_repeatable_stage_runs_again_with_other_values(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    complete(run)
    before = run.stage("evaluate").done()
    capsys.readouterr()
    for count in (1, 1):  # the same again is a no-op
        assert execute(run, change) == ExitCode.DONE
        assert [len(run.stage(stage).attempts()) for stage in STAGES] == [0, 0, 0, 0, 0, count]
    out = capsys.readouterr().out
    assert out.count("evaluate: its settings or inputs changed, it runs again") == 1
    assert out.count("skipped: done before") == 5 + 6
    after = run.stage("evaluate").done()
    assert before is not None and after is not None and after.fingerprint != before.fingerprint
    assert run.load_recipe() == load_recipe("quickstart", [change])
    assert not (run.path / "stale").exists()
    assert execute(run, stages="evaluate") == ExitCode.DONE
    assert run.load_recipe() == load_recipe("quickstart", [])
    assert len(run.stage("evaluate").attempts()) == 2


def test_a_repeated_stage_that_fails_is_not_done(run: RunDirectory) -> None:
    complete(run)
    set_mode(run, "fail70")
    assert execute(run, "evaluate.captions=7", stages="evaluate") == 70
    assert not run.is_done("evaluate")
    set_mode(run, "good")
    assert execute(run, "evaluate.captions=7", stages="evaluate") == ExitCode.DONE
    record = run.stage("evaluate").done()
    assert record is not None and record.extra["summary"] == ["weights None", "captions 7"]


def test_a_repeatable_stage_does_not_excuse_the_others(run: RunDirectory) -> None:
    complete(run)
    with pytest.raises(ConfigError, match="stage train_vqvae"):
        execute(run, "evaluate.captions=7", "vqvae.ema_decay=0.9", stages="evaluate")
    assert run.is_done("evaluate")
    with (
        run.stage("evaluate").lock("rank 0 of a killed launcher"),
        pytest.raises(LockedError, match="rank 0"),
    ):
        execute(run, "evaluate.captions=7", stages="evaluate")
    assert run.is_done("evaluate")


def test_the_summary_is_the_last_word(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "Options", lambda stages, stale, _: Options(stages, stale, FakeLauncher()))
    argv = ["run", "quickstart", "--runs-dir", str(run.path.parent), "--set", "evaluate.captions=9"]
    complete(run)
    assert cli.main(argv) == ExitCode.DONE
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4].startswith("done in ")
    assert lines[-3:] == [f"report: {run.report_path}", "weights None", "captions 9"]
    assert run.report_path.is_file()
    assert summary(run, ("train_vqvae", "finetune_superres")) == []
    assert cli.main([*argv, "--stages", "train_vqvae"]) == ExitCode.DONE
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {run.report_path}"


def test_inputs_that_changed_behind_the_back_are_refused(run: RunDirectory) -> None:
    execute(run, stages="train_tokenizer..shard_dataset")
    stage = run.stage("train_vqvae")
    (stage.output / "made.txt").write_text("other weights")
    recipe = load_recipe("quickstart", [])
    stage.write_done({}, stage.output_files(), run.fingerprint(recipe, "train_vqvae"))
    with pytest.raises(ConfigError, match="stage shard_dataset .* other inputs .*--restart-stale"):
        execute(run)
    assert execute(run, restart_stale=True) == ExitCode.DONE


def test_missing_outputs_of_a_finished_stage_are_noticed(run: RunDirectory) -> None:
    execute(run, stages="train_tokenizer")
    (run.stage("train_tokenizer").output / "made.txt").unlink()
    with pytest.raises(CogView2Error, match="is gone"):
        execute(run, stages="train_tokenizer")


def test_a_contradiction_is_refused_before_anything_is_made(run: RunDirectory) -> None:
    with pytest.raises(
        ConfigError, match="stage pretrain_coglm: train.global_batch 31 does not split over 2"
    ):
        execute(run, "coglm.train.global_batch=31", "launch.ranks=2")
    assert not run.path.exists()


def test_two_launchers_do_not_share_a_run(run: RunDirectory) -> None:
    run.create(load_recipe("quickstart", []))
    with run.lock("another launcher"), pytest.raises(LockedError, match="another launcher"):
        execute(run)
    with (
        run.stage("train_tokenizer").lock("rank 0 of a killed launcher"),
        pytest.raises(LockedError, match="rank 0"),
    ):
        execute(run)


def test_status_and_logs_read_files_only(run: RunDirectory) -> None:
    execute(run, stages="train_tokenizer")
    rows = table(run).splitlines()[2:]
    assert [row.split()[0] for row in rows] == list(STAGES)
    assert rows[0].split()[1:4] == ["done", "10/10", "1.5"]
    assert all(row.split(maxsplit=1)[1].startswith("not ") for row in rows[1:])
    assert "working on train_tokenizer" in log_file(run, None, 0).read_text()
    with pytest.raises(CogView2Error, match="no log of rank 4; there are ranks 0"):
        log_file(run, "train_tokenizer", 4)
    with pytest.raises(CogView2Error, match="stage evaluate .* was never started"):
        log_file(run, "evaluate", 0)
    assert find_run("quickstart", run.path.parent).path == run.path
    assert find_run(str(run.path), Path("elsewhere")).path == run.path
    assert find_run(None, run.path.parent).path == run.path
    with pytest.raises(CogView2Error, match="no run 'x'"):
        find_run("x", run.path.parent)


def test_running_is_seen_from_another_shell(run: RunDirectory) -> None:
    run.create(load_recipe("quickstart", []))
    run.stage("train_tokenizer").new_attempt()
    with run.lock("launcher"):
        assert "running" in table(run)
    assert "interrupted" in table(run)


def test_what_does_not_go_with_a_units_own_model_is_refused_before_any_start() -> None:
    idle = load_recipe("quickstart", ["vqvae.train.deepspeed=debug", "vqvae.train.optimizer.kind=adamw"])
    with pytest.raises(ConfigError, match=r"train_vqvae: vqvae\.other_rates_every 5 needs .*stage 0, not 1"):
        resolve_deepspeed(idle, ("train_vqvae",), [1], cpu=True)
    pipes = ["coglm.train.deepspeed=coglm_tiny_pp", "coglm.train.optimizer.kind=adamw"]
    deep = load_recipe("quickstart", [*pipes, "coglm.train.pipeline_parallel=4"])
    with pytest.raises(ConfigError, match="pipeline_parallel 4 is more than the 3 layers"):
        resolve_deepspeed(deep, ("pretrain_coglm",), [4], cpu=True)


def test_the_hardware_of_a_recipe_is_in_the_table() -> None:
    with pytest.raises(ConfigError, match="hardware h100_800 is not in the table; use one of"):
        load_recipe("quickstart", ["launch.hardware=h100_800"])
