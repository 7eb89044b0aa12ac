"""Checks the floors of the quickstart: every stage is done, losses are finite, and training lowered them."""

import json
import math
import sys
from pathlib import Path
from typing import Any

from cogview2.launch.cascade import built_stages
from cogview2.pipeline.run_dir import RunDirectory, units

# Figures of evaluation.json by dotted key, with the least value that the quickstart must reach.
FLOORS: dict[str, float] = {
    "oracle_on_originals": 0.995,
    "reconstruction.full.psnr": 22.0,
    "reconstruction.base.caption_accuracy": 0.9,
    "caption_accuracy.en.base": 0.8,
    "caption_accuracy.zh.base": 0.8,
    "caption_accuracy.en.final": 0.65,
    "caption_accuracy.zh.final": 0.65,
    "captioning.en.objects_named": 0.9,
    "captioning.zh.objects_named": 0.9,
    "editing.en.obeyed": 0.6,
    "editing.zh.obeyed": 0.6,
}
CEILINGS: dict[str, float] = {"reconstruction.full.l1": 0.04, "reconstruction.base.l1": 0.04}


def losses(path: Path) -> list[float]:
    """Return the losses of a metrics.jsonl, in order."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [float(line["loss"]) for line in lines if line.get("loss") is not None]


def fell(values: list[float]) -> bool:
    """Return whether the last quarter of the losses is lower on average than the first."""
    quarter = max(1, len(values) // 4)
    return sum(values[-quarter:]) < sum(values[:quarter])


def value_at(content: Any, dotted: str) -> Any:
    """Return the value of nested dicts at a dotted key, or None."""
    for name in dotted.split("."):
        content = content.get(name) if isinstance(content, dict) else None
    return content


def ranking_helps(figures: Any) -> bool:
    """Return whether, over both languages, the best ranked pictures obey more often than pictures on average."""
    best, average = (
        sum(value_at(figures, f"ranking.{language}.{key}") or 0.0 for language in ("en", "zh"))
        for key in ("obeyed_best_ranked", "obeyed_on_average")
    )
    return bool(best > average)


OUTSIDE_MARGIN = 0.005
"""By how much an edit may change pixels outside of what was drawn again more than the VQVAE alone does (L1, of 1)."""


def edits_stay_inside(figures: Any) -> bool:
    """Return whether edits leave the other pixels within the VQVAE's own error."""
    return all(
        (value_at(figures, f"editing.{language}.outside_l1") or math.inf)
        <= (value_at(figures, f"editing.{language}.vqvae_outside_l1") or 0.0) + OUTSIDE_MARGIN
        for language in ("en", "zh")
    )


def figure_problems(figures: Any) -> list[str]:
    """Return one sentence for each figure of evaluation.json that misses its bound."""
    found: list[str] = []
    for key, floor in FLOORS.items():
        value = value_at(figures, key)
        if not isinstance(value, int | float) or not value >= floor:
            found.append(f"{key} is {value}, the floor is {floor}")
    if not edits_stay_inside(figures):
        found.append(f"edits change what they should not: {value_at(figures, 'editing')}")
    if not ranking_helps(figures):
        found.append(f"ranking by caption score does not help: {value_at(figures, 'ranking')}")
    for key, ceiling in CEILINGS.items():
        value = value_at(figures, key)
        if not isinstance(value, int | float) or not value <= ceiling:
            found.append(f"{key} is {value}, the ceiling is {ceiling}")
    return found


def problems(run: RunDirectory) -> list[str]:
    """Return one sentence for each floor that the run misses."""
    found: list[str] = [] if built_stages() else ["no stage is built"]
    for stage in built_stages():
        for unit in units(stage):
            if run.stage(unit).done() is None:
                found.append(f"stage {unit} has no DONE record")
                continue
            metrics = run.stage(unit).metrics
            values = losses(metrics) if metrics.exists() else []
            if not all(math.isfinite(value) for value in values):
                found.append(f"stage {unit} logged a loss that is not finite")
            elif len(values) > 1 and not fell(values):
                found.append(f"the loss of stage {unit} went from {values[0]:.4g} to {values[-1]:.4g}")
    evaluation = run.path / "evaluation.json"
    if not evaluation.exists():
        evaluation = run.stage("evaluate").output / "evaluation.json"
    if evaluation.exists():
        found += figure_problems(json.loads(evaluation.read_text(encoding="utf-8")))
    elif "evaluate" in built_stages():
        found.append(f"{evaluation} is missing")
    return found


def main() -> int:
    """Print the verdict on the run given as the first argument; 1 when a floor is missed."""
    run = RunDirectory(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart"))
    found = problems(run)
    for sentence in found:
        print(f"quickstart gate: {sentence}")
    if not found:
        print(f"quickstart gate: passed ({len(built_stages())} stages)")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
