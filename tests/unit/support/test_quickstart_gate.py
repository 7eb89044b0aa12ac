"""The gate of the quickstart notices what is missing, what is not finite, and what did not learn."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from cogview2.pipeline.config.loading import load_recipe
from cogview2.pipeline.run_dir import RunDirectory

GATE = Path(__file__).resolve().parents[2] / "support" / "quickstart_gate.py"


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart_gate", GATE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "built_stages", lambda: ["train_vqvae", "evaluate"])
    monkeypatch.setattr(module, "FLOORS", {"caption.accuracy": 0.5})
    monkeypatch.setattr(module, "CEILINGS", {"error": 0.1})
    return module


def make_run(tmp_path: Path, losses: list[float], figures: dict[str, object]) -> RunDirectory:
    recipe = load_recipe("quickstart", [])
    run = RunDirectory(tmp_path / "r").create(recipe)
    for name in ("train_vqvae", "evaluate"):
        stage = run.stage(name).create()
        stage.write_done({}, [], "f")
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(losses)]
    run.stage("train_vqvae").metrics.write_text("\n".join(lines))
    (run.stage("evaluate").output / "evaluation.json").write_text(json.dumps(figures))
    return run


HELPS = {
    "en": {"obeyed_on_average": 0.8, "obeyed_best_ranked": 0.9},
    "zh": {"obeyed_on_average": 0.8, "obeyed_best_ranked": 0.8},
}
INSIDE = {language: {"outside_l1": 0.006, "vqvae_outside_l1": 0.004} for language in ("en", "zh")}
SPILLED = INSIDE | {"zh": {"outside_l1": 0.01, "vqvae_outside_l1": 0.004}}
EQUAL = {"en": {"obeyed_on_average": 0.8, "obeyed_best_ranked": 0.8}}
GOOD = {"caption": {"accuracy": 0.6}, "error": 0.05, "ranking": HELPS, "editing": INSIDE}


@pytest.mark.parametrize(
    ("losses", "figures", "expected"),
    [
        ([4.0, 3.0, 3.1, 2.0], GOOD, []),
        ([2.0, 3.0, 3.1, 4.0], GOOD, ["the loss of stage train_vqvae went from 2 to 4"]),
        ([4.0, float("nan"), 2.0], GOOD, ["stage train_vqvae logged a loss that is not finite"]),
        ([4.0, 2.0], GOOD | {"caption": {"accuracy": 0.4}}, ["caption.accuracy is 0.4, the floor is 0.5"]),
        ([4.0, 2.0], GOOD | {"error": 0.2}, ["error is 0.2, the ceiling is 0.1"]),
        (
            [4.0, 2.0],
            {"error": 0.05, "ranking": HELPS, "editing": INSIDE},
            ["caption.accuracy is None, the floor is 0.5"],
        ),
        (
            [4.0, 2.0],
            GOOD | {"editing": SPILLED},
            [f"edits change what they should not: {SPILLED}"],
        ),
        ([4.0, 2.0], GOOD | {"editing": {}}, ["edits change what they should not: {}"]),
        (
            [4.0, 2.0],
            GOOD | {"ranking": EQUAL},
            [f"ranking by caption score does not help: {EQUAL}"],
        ),
    ],
)
def test_floors(
    gate: ModuleType, tmp_path: Path, losses: list[float], figures: dict[str, object], expected: list[str]
) -> None:
    assert gate.problems(make_run(tmp_path, losses, figures)) == expected


def test_a_missing_record_or_evaluation_is_a_problem(gate: ModuleType, tmp_path: Path) -> None:
    run = make_run(tmp_path, [2.0, 1.0], GOOD)
    run.stage("train_vqvae").done_path.unlink()
    (run.stage("evaluate").output / "evaluation.json").unlink()
    found = gate.problems(run)
    assert found[0] == "stage train_vqvae has no DONE record"
    assert found[1].endswith("evaluation.json is missing")
