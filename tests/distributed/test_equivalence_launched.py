"""The same numbers as plain torch, through the command line, the launcher, the shards and the trainer."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import equivalence
import pytest
from equivalence import Curve, Problem
from tiny_runs import command_line, copy, override

from cogview2.pipeline.run_dir import RunDirectory
from cogview2.stages._loading import load_vocabulary
from cogview2.stages.pretrain_coglm import _batches

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
SETTINGS = (
    "coglm.model.dropout=0",
    "coglm.model.init_std=0.2",  # see equivalence.CONFIG
    "coglm.train.steps=20",
    "coglm.train.checkpoint.every_steps=1000",
    "coglm.train.optimizer.kind=adamw",
    "coglm.train.optimizer.learning_rate=0.001",
    "coglm.train.optimizer.gradient_clipping=0.5",
)
CELLS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "zero2 dp2 acc2": (2, 1, {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 4}),
    "zero1 pp2 acc4": (2, 2, {"zero_optimization": {"stage": 1}, "train_micro_batch_size_per_gpu": 4}),
    "zero1 dp2 pp2 acc2 recompute": (
        4,
        2,
        {
            "zero_optimization": {"stage": 1},
            "train_micro_batch_size_per_gpu": 4,
            "activation_checkpointing": {},
        },
    ),
}


def _reference(run: RunDirectory) -> Curve:
    recipe, vocabulary = run.load_recipe(), load_vocabulary(run)
    alone: Any = SimpleNamespace(accumulation=1, data_rank=0, data_size=1)
    context: Any = SimpleNamespace(recipe=recipe, run=run)
    batches = _batches(context, vocabulary, alone)
    return equivalence.reference(
        Problem(
            recipe.coglm.model,
            vocabulary,
            recipe.coglm.train,
            recipe.seed,
            lambda step: batches.step(step)[0],
        )
    )


def test_three_jobs_are_equal_to_one_process(sharded_run: RunDirectory, tmp_path: Path) -> None:
    prepared = override(sharded_run, *SETTINGS)
    expected = _reference(prepared)
    assert min(expected.norms) > 0.5
    for number, (name, (ranks, pipe_stages, how)) in enumerate(CELLS.items()):
        path = tmp_path / f"cell{number}.json"
        path.write_text(json.dumps(how))
        run = override(
            copy(prepared, tmp_path / f"run{number}", until="shard_dataset"),
            f"launch.ranks={ranks}",
            f"coglm.train.pipeline_parallel={pipe_stages}",
            f"coglm.train.deepspeed={path}",
        )
        where = ["--name", run.path.name, "--runs-dir", str(run.path.parent)]
        command_line("run", str(run.recipe_path), *where, "--stages", "pretrain_coglm")
        lines = [json.loads(line) for line in run.stage("pretrain_coglm").metrics.read_text().splitlines()]
        found = {
            "losses": [line["loss"] for line in lines],
            "norms": [line["grad_norm"] for line in lines],
            "parts": [],
        }
        assert equivalence.worst_error(found, Curve(expected.losses, expected.norms, [])) < 1e-5, name
