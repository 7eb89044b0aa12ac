"""A run directory knows what is done, from what, and who works in it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cogview2.pipeline.attempt import note_step, noted_step, redacted
from cogview2.pipeline.config.loading import load_recipe
from cogview2.pipeline.config.stages import STAGES, Recipe
from cogview2.pipeline.errors import CheckpointError, DataError, LockedError, RunDirectoryError
from cogview2.pipeline.run_dir import (
    DEPENDENCIES,
    MODEL_FILES,
    RunDirectory,
    StageDirectory,
    needed_stages,
    recipe_parts,
    section,
    split_step,
    units,
)
from cogview2.pipeline.weights_manifest import KINDS


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("quickstart", [])


@pytest.fixture
def run(tmp_path: Path, recipe: Recipe) -> RunDirectory:
    return RunDirectory(tmp_path / "runs" / "r").create(recipe)


def finish(run: RunDirectory, recipe: Recipe, unit: str, content: str = "x") -> None:
    stage = run.stage(unit).create()
    (stage.output / "result.bin").write_text(content)
    stage.write_done(run.inputs(unit, recipe), stage.output_files(), run.fingerprint(recipe, unit))


def test_create_and_load(run: RunDirectory, recipe: Recipe) -> None:
    assert run.exists() and run.started_path.exists()
    assert run.load_recipe() == recipe
    assert RunDirectory(run.path).load_recipe() == recipe


def test_a_foreign_folder_is_refused(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RunDirectoryError, match="not empty .*thesis.tex.*--name or --runs-dir"):
        RunDirectory(tmp_path).create(recipe)
    with pytest.raises(RunDirectoryError, match="no recipe.yaml"):
        RunDirectory(tmp_path).load_recipe()


def test_done_is_the_record_and_its_files(run: RunDirectory, recipe: Recipe) -> None:
    stage = run.stage("train_tokenizer")
    assert stage.done() is None and not run.is_done("train_tokenizer")
    finish(run, recipe, "train_tokenizer")
    record = stage.done()
    assert record is not None and run.is_done("train_tokenizer")
    assert list(record.outputs) == ["output/result.bin"]
    assert record.versions["cogview2"]
    stage.check_outputs(record)
    (stage.output / "result.bin").write_text("longer")
    with pytest.raises(DataError, match=r"has 6 bytes \(1 were made\); restore this, or delete"):
        stage.check_outputs(record)
    (stage.output / "result.bin").unlink()
    with pytest.raises(DataError, match=r"output/result\.bin is gone"):
        stage.check_outputs(record)


def test_everything_that_is_missing_is_named_at_once(run: RunDirectory) -> None:
    stage = run.stage("shard_dataset").create()
    names = [f"train-{number:06d}.tar" for number in range(30)]
    for name in names:
        (stage.output / name).write_text(name)
    record = stage.write_done({}, stage.output_files(), "f")
    for name in names[::2]:
        (stage.output / name).unlink()
    with pytest.raises(DataError) as caught:
        stage.check_outputs(record)
    assert caught.value.exit_code == 78
    assert [name for name in names if f"{name} is gone" in str(caught.value)] == names[::2]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"stage": "x", "outputs": {}}', "null"])
def test_a_damaged_record_is_refused_not_believed(run: RunDirectory, text: str) -> None:
    stage = run.stage("train_tokenizer").create()
    stage.done_path.write_text(text)
    with pytest.raises(RunDirectoryError, match="damaged .*delete it"):
        stage.done()


def test_unfinished_files_are_no_output(run: RunDirectory) -> None:
    stage = run.stage("shard_dataset").create()
    for name in ("a.tar", ".tmp.b.tar.00", ".hidden/c"):
        (stage.output / name).parent.mkdir(exist_ok=True)
        (stage.output / name).write_text("")
    assert [path.name for path in stage.output_files()] == ["a.tar"]


def test_fingerprints_follow_settings_seed_and_inputs(run: RunDirectory, recipe: Recipe) -> None:
    finish(run, recipe, "train_tokenizer")
    finish(run, recipe, "train_vqvae")
    before = run.fingerprint(recipe, "shard_dataset")
    assert run.fingerprint(recipe, "shard_dataset") == before
    assert run.fingerprint(load_recipe("quickstart", ["evaluate.captions=777"]), "shard_dataset") == before
    assert run.fingerprint(load_recipe("quickstart", ["seed=777"]), "shard_dataset") != before
    assert run.fingerprint(load_recipe("quickstart", ["data.held_out=777"]), "shard_dataset") != before
    finish(run, recipe, "train_vqvae", content="other weights")
    assert run.fingerprint(recipe, "shard_dataset") != before


def test_stale(run: RunDirectory, recipe: Recipe) -> None:
    stage = run.stage("train_tokenizer")
    assert not stage.is_stale("anything")
    finish(run, recipe, "train_tokenizer")
    assert not stage.is_stale(run.fingerprint(recipe, "train_tokenizer"))
    assert stage.is_stale("anything")


def test_the_two_models_of_superres_are_done_one_by_one(run: RunDirectory, recipe: Recipe) -> None:
    assert units("finetune_superres") == ["finetune_superres/direct", "finetune_superres/iterative"]
    direct = run.fingerprint(recipe, "finetune_superres/direct")
    other = load_recipe("quickstart", [f"iterative_sr.train.steps={recipe.iterative_sr.train.steps + 1}"])
    assert run.fingerprint(other, "finetune_superres/direct") == direct
    finish(run, recipe, "finetune_superres/direct")
    assert not run.is_done("finetune_superres")
    finish(run, recipe, "finetune_superres/iterative")
    assert run.is_done("finetune_superres")
    assert "finetune_superres/direct/output/result.bin" in run.inputs("evaluate", recipe)


def test_iterative_superres_reads_direct_superres_where_it_starts_from_it(run: RunDirectory) -> None:
    unit, output = "finetune_superres/iterative", "finetune_superres/direct/output/result.bin"
    from_coglm, from_direct = (
        load_recipe("quickstart", [f"iterative_sr.model.init={init}"]) for init in ("coglm", "direct")
    )
    before = run.fingerprint(from_direct, unit)
    finish(run, from_direct, "finetune_superres/direct")
    assert output in run.inputs(unit, from_direct) and output not in run.inputs(unit, from_coglm)
    assert run.fingerprint(from_direct, unit) != before


def weights_folder(path: Path, content: str, kinds: tuple[str, ...] = KINDS) -> Path:
    path.mkdir(exist_ok=True)
    models = {}
    for kind in kinds:
        (path / kind).write_text(content)
        models[kind] = {"file": kind, "bytes": len(content), "sha256": f"sha of {kind} {content}"}
    (path / "weights.json").write_text(json.dumps({"format": 1, "models": models}))
    return path


OUTSIDE = {
    "tokenizer.take_from": "train_tokenizer",
    "vqvae.take_from": "train_vqvae",
    "vqvae.init_from": "train_vqvae",
    "coglm.init_from": "pretrain_coglm",
    "direct_sr.init_from": "finetune_superres/direct",
    "iterative_sr.init_from": "finetune_superres/iterative",
    "evaluate.weights": "evaluate",
}


@pytest.mark.parametrize(("key", "unit"), OUTSIDE.items())
def test_weights_from_elsewhere_are_inputs(
    run: RunDirectory, recipe: Recipe, tmp_path: Path, key: str, unit: str
) -> None:
    folder = weights_folder(tmp_path / "folder", "one")
    changed = load_recipe("quickstart", [f"{key}={folder}"])
    inputs = run.inputs(unit, changed)
    kinds = (
        KINDS if unit == "evaluate" else [kind for kind, (maker, _) in MODEL_FILES.items() if maker == unit]
    )
    assert inputs == {f"{key}:{kind}": f"sha of {kind} one" for kind in kinds}
    first = run.fingerprint(changed, unit)
    assert first != run.fingerprint(recipe, unit)
    weights_folder(folder, "two")
    assert run.fingerprint(changed, unit) != first
    for other in set(OUTSIDE.values()) - {unit}:
        assert run.inputs(other, changed) == {}


def test_a_run_serves_as_weights(run: RunDirectory, tmp_path: Path) -> None:
    other = RunDirectory(tmp_path / "other").create(load_recipe("quickstart", ["name=other"]))
    changed = load_recipe("quickstart", [f"coglm.init_from={other.path}"])
    with pytest.raises(CheckpointError, match="coglm.init_from .*other: stage pretrain_coglm .* not done"):
        run.inputs("pretrain_coglm", changed)
    stage = other.stage("pretrain_coglm").create()
    (stage.output / "weights.safetensors").write_text("w")
    stage.write_done({}, stage.output_files(), "f")
    (key, digest) = next(iter(run.inputs("pretrain_coglm", changed).items()))
    assert key == "coglm.init_from:coglm/weights.safetensors" and len(digest) == 64


def test_missing_weights_are_refused_unless_the_unit_is_done(run: RunDirectory, tmp_path: Path) -> None:
    folder = weights_folder(tmp_path / "folder", "one")
    changed = load_recipe("quickstart", [f"coglm.init_from={folder}"])
    before = run.inputs("pretrain_coglm", changed)
    for name in ("coglm", "weights.json"):
        (folder / name).unlink()
        with pytest.raises(CheckpointError, match=str(folder)):
            run.inputs("pretrain_coglm", changed)
    weights_folder(folder, "one")
    finish(run, changed, "pretrain_coglm")
    (folder / "weights.json").unlink()
    assert run.inputs("pretrain_coglm", changed) == before
    lacking = weights_folder(tmp_path / "lacking", "x", ("coglm",))
    with pytest.raises(CheckpointError, match="holds no icetk-image .*weights import --kind icetk-image"):
        run.inputs("train_vqvae", load_recipe("quickstart", [f"vqvae.take_from={lacking}"]))


def test_an_evaluation_of_other_weights_needs_no_training_here(recipe: Recipe, tmp_path: Path) -> None:
    other = load_recipe("quickstart", [f"evaluate.weights={tmp_path}@7"])
    assert needed_stages("evaluate", recipe) == DEPENDENCIES["evaluate"]
    assert needed_stages("evaluate", other) == ("train_tokenizer", "train_vqvae", "shard_dataset")
    assert split_step("a/b@12") == ("a/b", 12) and split_step("a@b") == ("a@b", None)


def test_tables_agree_with_the_recipe(recipe: Recipe) -> None:
    assert list(DEPENDENCIES) == list(STAGES)
    order = list(STAGES)
    for stage, needed in DEPENDENCIES.items():
        assert all(order.index(name) < order.index(stage) for name in needed)
        for unit in units(stage):
            for key in recipe_parts(unit):
                section(recipe, key)


def test_attempts_are_numbered(run: RunDirectory) -> None:
    stage = run.stage("train_vqvae")
    assert stage.latest_attempt() is None
    first, second = stage.new_attempt(), stage.new_attempt()
    assert (first.path.name, second.path.name, second.number) == ("0001", "0002", 2)
    assert stage.latest_attempt() is not None and stage.latest_attempt().path == second.path  # type: ignore[union-attr]
    assert stage.attempt(1).path == first.path
    with pytest.raises(RunDirectoryError):
        stage.attempt(9)


def test_outcomes_first_failure_by_time(run: RunDirectory) -> None:
    attempt = run.stage("train_vqvae").new_attempt()
    attempt.write_outcome(0, "error", 1, 3, "peer closed the connection")
    attempt.write_outcome(1, "numeric", 70, 3, "loss is nan")
    attempt.write_outcome(2, "done", 0, 3, "")
    path = attempt.path / "outcome-rank-1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"time": 1.0}))
    (attempt.path / "outcome-rank-9.json").write_text("{half")
    failure = attempt.first_failure()
    assert failure is not None and (failure.rank, failure.code, failure.message) == (1, 70, "loss is nan")
    assert len(attempt.outcomes()) == 3


def test_a_killed_rank_comes_before_the_peers_that_noticed_first(run: RunDirectory) -> None:
    attempt = run.stage("train_vqvae").new_attempt()
    for rank, reason, when in ((0, "RuntimeError", 10.0), (1, "killed", 10.4), (2, "killed", 130.0)):
        attempt.write_outcome(rank, reason, 1, None, "")
        path = attempt.path / f"outcome-rank-{rank}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"time": when}))
    failure = attempt.first_failure()
    assert failure is not None and failure.rank == 1
    assert failure.host == socket.gethostname()


def test_whoever_points_to_another_rank_is_never_the_first(run: RunDirectory) -> None:
    """The clock of its host may be behind."""
    attempt = run.stage("train_vqvae").new_attempt()
    attempt.write_outcome(1, "lost_peer", 1, 3, "rank 0 failed before", at=10.0)
    first = attempt.first_failure()
    assert first is not None and first.rank == 1
    attempt.write_outcome(0, "DataError", 78, 3, "no pictures", at=13.0)
    first = attempt.first_failure()
    assert first is not None and first.rank == 0


def test_process_ids_of_some_ranks(run: RunDirectory) -> None:
    attempt = run.stage("train_vqvae").new_attempt()
    attempt.write_pid(0)
    attempt.write_pid(3)
    (attempt.path / "rank-2.pid").write_text("")
    assert attempt.pids() == {0: os.getpid(), 3: os.getpid()}
    assert attempt.pids(range(1, 4)) == {3: os.getpid()}


def test_the_step_of_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cogview2.pipeline.attempt._noted", [])
    assert noted_step() is None
    note_step(16)
    note_step(17)
    assert noted_step() == 17


def test_secrets_are_not_recorded(run: RunDirectory) -> None:
    environment = {
        "HOME": "/h",
        "HF_TOKEN": "t",
        "AWS_SECRET_ACCESS": "s",
        "api_key": "k",
        "DB_PASSWORD": "p",
    }
    assert redacted(environment)["HOME"] == "/h"
    assert [name for name, value in redacted(environment).items() if value == "(redacted)"] == [
        "AWS_SECRET_ACCESS",
        "DB_PASSWORD",
        "HF_TOKEN",
        "api_key",
    ]
    attempt = run.stage("train_vqvae").new_attempt()
    attempt.write_commands([["python", "a b"]], environment)
    assert (attempt.path / "command.txt").read_text() == "python 'a b'\n"
    assert "hf" not in (attempt.path / "env.json").read_text().replace("HF_TOKEN", "")


def test_heartbeat_survives_nan_and_parts(run: RunDirectory) -> None:
    stage = run.stage("finetune_superres")
    assert stage.heartbeat() is None
    run.stage("finetune_superres/direct").create().write_heartbeat(3, 10, loss=float("nan"))
    beat = stage.heartbeat()
    assert beat is not None and (beat.stage, beat.step, beat.loss) == ("finetune_superres/direct", 3, None)
    time.sleep(0.01)
    run.stage("finetune_superres/iterative").create().write_heartbeat(1, 10, loss=0.5)
    assert stage.heartbeat().stage == "finetune_superres/iterative"  # type: ignore[union-attr]
    stage.heartbeat_path.write_text("{half")
    assert stage.heartbeat().stage == "finetune_superres/iterative"  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["../x", "Train", "a/b/c", "", "/etc"])
def test_stage_names_are_checked(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunDirectoryError, match="not a stage name"):
        StageDirectory(tmp_path, name)


HOLDER = """
import sys, time
from pathlib import Path
from cogview2.pipeline.run_dir import RunDirectory
with RunDirectory(Path(sys.argv[1])).lock("a test"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_holder_named_to_the_other_and_freed_by_its_death(run: RunDirectory) -> None:
    assert not run.is_locked()
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run.path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        assert run.is_locked()
        begin = time.monotonic()
        with (
            pytest.raises(LockedError, match=rf"process {process.pid} on host .*\(a test\)") as caught,
            run.lock("x"),
        ):
            pass
        assert time.monotonic() - begin < 2
        assert caught.value.exit_code == 75
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with run.lock("second"):
        assert run.is_locked()
    assert not run.is_locked()


def test_a_recipe_with_a_secret_is_its_owners_alone(tmp_path: Path) -> None:
    open_to_all = RunDirectory(tmp_path / "a").create(load_recipe("quickstart", []))
    secret = load_recipe("quickstart", ["launch.environment.HF_TOKEN=hush"])
    closed = RunDirectory(tmp_path / "b").create(secret)
    assert closed.recipe_path.stat().st_mode & 0o077 == 0 and open_to_all.recipe_path.stat().st_mode & 0o040
    assert redacted({"HTTPS_PROXY": "http://me:pw@proxy:1", "MY_AUTH": "x", "PWD": "/w"}) == {
        "HTTPS_PROXY": "http://(redacted)@proxy:1",
        "MY_AUTH": "(redacted)",
        "PWD": "/w",
    }


def test_a_token_of_a_killed_look_is_nobodys(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".probe-ab12").touch()
    assert RunDirectory(tmp_path / "run").create(load_recipe("quickstart", [])).exists()
