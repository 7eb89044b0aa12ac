"""A weights folder serves wherever a run does: drawing, describing, fine-tuning, evaluation."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import Finished, command_line, run_arguments

from cogview2.pipeline.run_dir import RunDirectory

pytestmark = pytest.mark.distributed
PROMPTS = ["a red circle on the left", "左边有一个红色的圆"]


@pytest.fixture(scope="module")
def bundle(finished_run: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "tiny"
    command_line("weights", "bundle", str(finished_run.run.path), str(path))
    return path


def _drawn(source: Path, out: Path) -> list[np.ndarray]:
    paths = command_line("generate", str(source), *PROMPTS, "--out", str(out)).stdout.split()
    return [np.asarray(Image.open(path)) for path in paths if path.endswith(".png") and "sheet" not in path]


def test_a_bundle_draws_the_same_pictures(finished_run: Finished, bundle: Path, tmp_path: Path) -> None:
    of_run, of_bundle = _drawn(finished_run.run.path, tmp_path / "a"), _drawn(bundle, tmp_path / "b")
    assert len(of_run) >= len(PROMPTS)
    assert all(np.array_equal(one, other) for one, other in zip(of_run, of_bundle, strict=True))


@pytest.mark.slow
def test_a_bundle_describes_the_same_way(finished_run: Finished, bundle: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    Image.fromarray(np.full((64, 64, 3), 200, dtype=np.uint8)).save(picture)
    said = [
        command_line("caption", str(source), str(picture), "--language", "both", "--json").stdout
        for source in (finished_run.run.path, bundle)
    ]
    assert said[0] == said[1] and "zh" in said[0]


@pytest.mark.slow
def test_a_new_run_starts_from_a_bundle(finished_run: Finished, bundle: Path, tmp_path: Path) -> None:
    arguments = run_arguments(
        tmp_path / "runs",
        f"tokenizer.take_from={bundle}",
        f"vqvae.take_from={bundle}",
        f"coglm.init_from={bundle}",
        f"direct_sr.init_from={bundle}",
        f"iterative_sr.init_from={bundle}",
        "coglm.train.optimizer.learning_rate=1.0e-9",
        "coglm.train.steps=2",
        "coglm.train.optimizer.warmup_steps=0",
    )
    command_line(*arguments)
    run, old = RunDirectory(tmp_path / "runs" / "tiny"), finished_run.run
    for unit, name in (("train_tokenizer", "tokenizer.model"), ("train_tokenizer", "vocabulary.json")):
        assert (run.stage(unit).output / name).read_bytes() == (old.stage(unit).output / name).read_bytes()
    for unit, tolerance in (("train_vqvae", 0.0), ("pretrain_coglm", 1e-6)):
        new, before = (load_file(each.stage(unit).output / "weights.safetensors") for each in (run, old))
        assert new.keys() == before.keys()
        assert all((new[name] - before[name]).abs().max() <= tolerance for name in new), unit
    for unit in ("pretrain_coglm", "finetune_superres/direct", "finetune_superres/iterative"):
        record = run.stage(unit).done()
        assert record is not None and any(".init_from:" in name for name in record.inputs), unit
    assert "taken from" in command_line("logs", str(run.path), "--stage", "train_vqvae").stdout
    assert "skipped" in command_line(*arguments).stdout


@pytest.mark.slow
def test_a_bundle_is_evaluated_without_training(finished_run: Finished, bundle: Path, tmp_path: Path) -> None:
    arguments = run_arguments(
        tmp_path / "runs",
        f"tokenizer.take_from={bundle}",
        f"vqvae.take_from={bundle}",
        f"evaluate.weights={bundle}",
    )
    command_line(*arguments, "--stages", "train_tokenizer,train_vqvae,shard_dataset,evaluate")
    run = RunDirectory(tmp_path / "runs" / "tiny")
    assert not run.is_done("pretrain_coglm")
    theirs, ours = (
        json.loads((each.stage("evaluate").output / "evaluation.json").read_text())
        for each in (run, finished_run.run)
    )
    assert theirs["weights"]["of"] == str(bundle)
    assert theirs["fid"]["fid_0"] == pytest.approx(ours["fid"]["fid_0"], rel=1e-4)
    assert theirs["caption_accuracy"] == ours["caption_accuracy"]


def test_missing_weights_are_said_before_anything_starts(tmp_path: Path) -> None:
    arguments = run_arguments(tmp_path / "runs", f"coglm.init_from={tmp_path / 'nowhere'}")
    done = command_line(*arguments, check=False)
    assert done.returncode == 78
    assert "coglm.init_from" in done.stderr and "neither a run nor a weights folder" in done.stderr
    assert "Traceback" not in done.stderr and not list((tmp_path / "runs").glob("tiny/stages/*/attempts"))
