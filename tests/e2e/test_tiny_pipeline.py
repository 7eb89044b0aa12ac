"""The whole cascade through the command line and the DeepSpeed launcher, on drawings and on a folder."""

import json
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from tiny_runs import Finished, command_line, evaluation, run_arguments

from cogview2.pipeline.config.stages import STAGES
from cogview2.pipeline.data.shard_index import ShardIndex
from cogview2.pipeline.run_dir import RunDirectory, units

pytestmark = pytest.mark.distributed


def _stock_keys(folder: Path, entries: list) -> list[str]:
    shards = [str(folder / entry.name) for entry in entries]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
    assert all({"json", "base.npy"} <= sample.keys() for sample in samples)
    return [sample["__key__"] for sample in samples]


def _check_shards(run: RunDirectory, splits: set[str]) -> dict[str, int]:
    output = run.stage("shard_dataset").output
    assert {path.parent.name for path in output.glob("*/manifest.json")} == splits
    counts = {}
    for split in splits:
        index = ShardIndex.load(output / split)
        index.verify()
        keys = [index.locate(number)[1].key for number in range(len(index))]
        assert _stock_keys(output / split, index.entries) == keys
        assert len(set(keys)) == len(keys)
        counts[split] = len(keys)
    return counts


def test_every_stage_is_done(finished_run: Finished) -> None:
    for stage in STAGES:
        for unit in units(stage):
            record = finished_run.run.stage(unit).done()
            assert record is not None and record.outputs, unit
        assert stage in finished_run.output
    beat = finished_run.run.stage("evaluate").heartbeat()
    assert beat is not None and beat.step == beat.steps


def test_shards_are_readable_by_stock_webdataset(finished_run: Finished) -> None:
    assert _check_shards(finished_run.run, {"train", "held_out", "unseen"}) == {
        "train": 64,
        "held_out": 8,
        "unseen": 8,
    }


def test_the_evaluation_is_complete(finished_run: Finished) -> None:
    figures = evaluation(finished_run.run)
    assert figures["caption_accuracy"].keys() == {"en", "zh"}
    for table in figures["caption_accuracy"].values():
        assert table.keys() == {"base", "direct", "final", "unseen_pairs", "shuffled"}
        assert all(0 <= value <= 1 for value in table.values())
    assert all(np.isfinite(figures["fid"][f"fid_{radius}"]) for radius in (0, 1, 2, 4, 8))
    assert figures["fid"]["too_few_pictures"] is True and figures["fid"]["comparable_to_papers"] is False
    assert figures["oracle_on_originals"] == 1.0
    assert figures["captions"] == {"held_out": 8, "unseen": 8}
    assert figures["inception_score"]["mean"] >= 1
    assert Image.open(finished_run.run.stage("evaluate").output / "samples.png").size[0] > 64


def test_metrics_and_pictures_on_the_way(finished_run: Finished) -> None:
    for unit, steps in (
        ("train_vqvae", 6),
        ("pretrain_coglm", 6),
        ("finetune_superres/direct", 2),
        ("finetune_superres/iterative", 2),
    ):
        stage = finished_run.run.stage(unit)
        lines = [json.loads(line) for line in stage.metrics.read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, steps + 1))
        assert all(np.isfinite(line["loss"]) and np.isfinite(line["grad_norm"]) for line in lines)
        assert list(stage.tensorboard.iterdir())
        assert len(list(stage.checkpoints.glob("step_*"))) in (1, 2)
    for unit in ("train_vqvae", "pretrain_coglm"):
        (picture,) = finished_run.run.stage(unit).samples.glob("*_step_000000006.png")
        Image.open(picture).verify()


def test_running_again_skips_every_stage(finished_run: Finished) -> None:
    output = command_line(*finished_run.arguments).stdout
    assert output.count("skipped: done before") == len(STAGES)


def test_generate_draws_in_both_languages(finished_run: Finished, tmp_path: Path) -> None:
    prompts = ["a red circle on the left", "左边有一个红色的圆"]
    paths = command_line(
        "generate", str(finished_run.run.path), *prompts, "--out", str(tmp_path / "out")
    ).stdout.split()
    assert len(paths) == 7
    for path in paths[:2]:
        picture = Image.open(path)
        assert picture.size == (64, 64) and picture.text["Description"] in prompts
    again = command_line(
        "generate", str(finished_run.run.path), *prompts, "--out", str(tmp_path / "again")
    ).stdout.split()
    assert [Path(path).read_bytes() for path in again] == [Path(path).read_bytes() for path in paths]


def _folder(folder: Path) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for number in range(24):
        pixels = np.kron(rng.integers(0, 256, (8, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append({"image": f"{number}.png", "caption": f"pattern number {number} of many squares"})
    whole = (folder / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "words.png").write_text("not a picture")
    Image.new("RGB", (16, 16)).save(folder / "small.png")
    lines += [
        {"image": name, "caption": f"broken {name}"}
        for name in ("cut.png", "words.png", "small.png", "gone.png")
    ]
    lines.append({"image": "1.png", "caption": "  "})
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "{not json\n")
    return folder


@pytest.mark.slow
def test_a_folder_with_broken_files_becomes_shards(tmp_path: Path) -> None:
    data = _folder(tmp_path / "data")
    arguments = run_arguments(
        tmp_path / "runs", f"data.source={data}", "data.languages=[en]", "vqvae.train.steps=3"
    )
    command_line(*arguments, "--stages", "train_tokenizer..shard_dataset")
    run = RunDirectory(tmp_path / "runs" / "tiny")
    counts = _check_shards(run, {"train", "held_out"})
    assert sum(counts.values()) == 24 and counts["held_out"] >= 1
    refused = json.loads((run.stage("shard_dataset").output / "refused.json").read_text())
    assert sum(refused["refused"].values()) == 6, refused
    named = " ".join(example for examples in refused["examples"].values() for example in examples)
    for name in ("cut", "words", "small", "gone"):
        assert name in named
    index = ShardIndex.load(run.stage("shard_dataset").output / "train")
    assert all(index.read(number).captions.keys() == {"en"} for number in range(len(index)))
    assert all(index.locate(number)[1].has_superres for number in range(len(index)))
