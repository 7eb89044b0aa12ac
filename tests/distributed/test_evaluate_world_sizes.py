"""An evaluation gives the same figures on any number of ranks, and when it was killed on the way."""

from pathlib import Path
from typing import Any

import pytest
from tiny_runs import Finished, Ranks, copy, evaluation, override, run_stage

from cogview2.pipeline.run_dir import RunDirectory

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture
def trained(finished_run: Finished, tmp_path: Path) -> RunDirectory:
    return copy(finished_run.run, tmp_path / "run", until="finetune_superres")


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {key: item for part in value for key, item in _flat(value[part], f"{name}.{part}").items()}
    return {name: value}


def _assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    left, right = _flat(found), _flat(expected)
    assert left.keys() == right.keys()
    for name, value in right.items():
        assert left[name] == (pytest.approx(value, abs=1e-6) if isinstance(value, float) else value), name


@pytest.mark.parametrize("ranks", [1, 4])
def test_same_figures_on_other_numbers_of_ranks(
    finished_run: Finished, trained: RunDirectory, ranks: int
) -> None:
    run_stage(trained, "evaluate", ranks)
    found, expected = evaluation(trained), evaluation(finished_run.run)
    found["weights"]["of"] = expected["weights"]["of"]  # the copy's folder has another name
    _assert_same(found, expected)


def test_killed_and_continued(finished_run: Finished, trained: RunDirectory) -> None:
    work = trained.stage("evaluate").path / "work"
    Ranks(trained, "evaluate", 2).when(lambda: len(list(work.glob("*/pictures/*.npz"))) >= 3).kill()
    assert trained.stage("evaluate").done() is None
    drawn = {path: path.stat().st_mtime_ns for path in work.glob("*/pictures/[!.]*.npz")}
    run_stage(trained, "evaluate", 2)
    assert all(path.stat().st_mtime_ns == moment for path, moment in drawn.items())
    found, expected = evaluation(trained), evaluation(finished_run.run)
    found["weights"]["of"] = expected["weights"]["of"]
    assert found == expected


def test_weights_of_a_checkpoint_of_another_run(finished_run: Finished, trained: RunDirectory) -> None:
    other = copy(finished_run.run, trained.path.parent / "other", until="finetune_superres")
    override(trained, f"evaluate.weights={other.path}@4")
    run_stage(trained, "evaluate")
    found, final = evaluation(trained), evaluation(finished_run.run)
    assert found["weights"]["of"] == f"{other.path}@4"
    key = "pretrain_coglm/weights.safetensors"
    assert found["weights"]["digests"].pop(key) != final["weights"]["digests"].pop(key)
    assert found["weights"]["digests"] == final["weights"]["digests"]
    assert found["caption_loss"] != final["caption_loss"]
    assert found["reconstruction"] == final["reconstruction"]
    assert (other.path / "stages/pretrain_coglm/checkpoints/step_000000004").is_dir()


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("@5", "has no checkpoint of step 5; it has step_000000004, step_000000006"),
        ("@x", "@x is no run directory"),
    ],
)
def test_weights_that_are_not_there(trained: RunDirectory, weights: str, words: str) -> None:
    job = Ranks(override(trained, f"evaluate.weights={trained.path}{weights}"), "evaluate")
    assert job.wait() != [0]
    (outcome,) = job.attempt.outcomes()
    assert words in outcome.message
