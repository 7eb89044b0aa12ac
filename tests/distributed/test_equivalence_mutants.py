"""The equivalence test sees what it is there for: each fault below, put in on purpose, leaves its limit."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import deepspeed
import equivalence
import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from equivalence import Cell
from forked_ranks import run_ranks

from cogview2.pipeline.models.coglm import pipe
from cogview2.pipeline.training import engine as engines
from cogview2.pipeline.training.train_modules import coglm

pytestmark = pytest.mark.distributed
patch = mock.patch.object


def _mean_of_this_rank(masses: Any, group: Any = None) -> torch.Tensor:
    return torch.stack(list(masses)).mean()


def _norm_alone(engine: Any) -> None:
    engine._global_grad_norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters()])


_clip_rightly = engines._clip


def _clip_each_pipe_stage_by_itself(engine: Any) -> None:
    gradients = {p: p.grad.clone() for p in engine.module.parameters()}
    _clip_rightly(engine)  # for the norm
    for parameter, gradient in gradients.items():
        parameter.grad.copy_(gradient)
    DeepSpeedEngine.clip_fp32_gradients(engine)


def _one_group(module: Any, weight_decay: float) -> list[dict[str, Any]]:
    return [{"params": list(module.parameters()), "weight_decay": weight_decay}]


_forward = coglm.CogLMTrainModule.forward


def _no_tuple(self: Any, batch: Any) -> SimpleNamespace:
    return SimpleNamespace(**_forward(self, batch)._asdict())


@contextmanager
def _as_pipe_of_one(reentrant: bool) -> Iterator[None]:
    """Train the plain cell as a pipeline of a single pipe stage, whose first segment has whole numbers as inputs."""

    def plain(config: Any, vocabulary: Any, deepspeed_config: Any, *args: Any) -> Any:
        deepspeed_config["pipeline"]["use_reentrant"] = reentrant
        bounds = (0, config.layers + 4)
        return coglm._pipe_module(config, vocabulary, bounds, deepspeed_config["pipeline"], equivalence.SEED)

    def engine(module: Any, config: Any, optimizer: Any, world: Any) -> Any:
        return engines.PipeEngine(module, config, optimizer, equivalence.CONFIG)

    with ExitStack() as stack:
        stack.enter_context(patch(coglm, "_plain_module", plain))
        stack.enter_context(patch(coglm, "PlainEngine", engine))
        if reentrant:
            stack.enter_context(patch(pipe, "non_reentrant_checkpoint", deepspeed.checkpointing.checkpoint))
        yield


FLOAT32, BF16 = 1e-5, 0.01
Mutant = tuple[Cell, Callable[[], Any], float]
MUTANTS: dict[str, Mutant] = {
    "each micro batch has a mean of its own": (
        Cell(1, accumulation=2),
        lambda: patch(coglm.CogLMTrainModule, "begin_step", lambda *args: None),
        FLOAT32,
    ),
    "each rank has a mean of its own": (
        Cell(1, dp=2),
        lambda: patch(coglm, "mean_mass", _mean_of_this_rank),
        FLOAT32,
    ),
    "gradients are not clipped": (Cell(0), lambda: patch(engines, "_clip", _norm_alone), FLOAT32),
    "every pipe stage clips by its own norm": (
        Cell(0, pp=2),
        lambda: patch(engines, "_clip", _clip_each_pipe_stage_by_itself),
        FLOAT32,
    ),
    "the tied words learn from each end alone": (
        Cell(1, pp=2),
        lambda: patch(pipe.CogLMPipe, "get_tied_weights_and_groups", lambda self: []),
        FLOAT32,
    ),
    "embeddings and vectors decay too": (
        Cell(1),
        lambda: patch(engines, "parameter_groups", _one_group),
        FLOAT32,
    ),
    "re-entrant recomputation of whole-number inputs": (
        Cell(1, recompute=True),
        lambda: _as_pipe_of_one(True),
        FLOAT32,
    ),
    "DeepSpeed finds no tensor in what the model returns": (
        Cell(1, accumulation=2, precision="bf16/fp32"),
        lambda: patch(coglm.CogLMTrainModule, "forward", _no_tuple),
        BF16,
    ),
    "the head hands out the words themselves": (
        Cell(1, pp=2, precision="bf16/fp32"),
        lambda: patch(pipe, "_expose_head", lambda words, hidden: (hidden, words.weight)),
        BF16,
    ),
}
CONTROL = "a pipeline of one pipe stage"
CONTROLS: dict[str, Mutant] = {CONTROL: (Cell(1, recompute=True), lambda: _as_pipe_of_one(False), FLOAT32)}


def _work(names: list[str], folder: Path, rank: int) -> dict[str, Any]:
    results = {}
    for name in names:
        cell, mutation, _ = (MUTANTS | CONTROLS)[name]
        with mutation():
            results[name] = equivalence.run_cell(cell, folder, rank) | {"state": None}
    return results


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    folder = tmp_path_factory.mktemp("mutants")
    found = {}
    references = {FLOAT32: equivalence.reference(), BF16: equivalence.reference(weights_dtype=torch.bfloat16)}
    everything = MUTANTS | CONTROLS
    for ranks in (1, 2):
        names = [name for name, (cell, *_) in everything.items() if cell.ranks == ranks]
        for name in names:
            equivalence.write_json(everything[name][0], folder)
        answers = run_ranks(partial(_work, names, folder), ranks, limit=600)
        for name in names:
            found[name] = equivalence.worst_error(answers[0][name], references[everything[name][2]])
    return found


@pytest.mark.parametrize("name", MUTANTS)
def test_the_fault_is_seen(errors: dict[str, float], name: str) -> None:
    assert errors[name] > 10 * MUTANTS[name][2]


def test_without_a_fault_the_same_way_is_right(errors: dict[str, float]) -> None:
    assert errors[CONTROL] < FLOAT32
