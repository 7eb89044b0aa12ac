"""An update whose gradients or loss are not finite is applied nowhere, whatever the engine, and training can go on after it."""

from functools import partial
from pathlib import Path
from typing import Any

import equivalence
import pytest
import torch
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.zero import stage_1_and_2
from equivalence import Cell
from forked_ranks import run_ranks

from cogview2.pipeline.training import engine as engines
from cogview2.pipeline.training.engine import TrainingEngine

pytestmark = pytest.mark.distributed
CELLS = [Cell(0), Cell(0, precision="autocast"), Cell(1), Cell(2), Cell(3), Cell(1, precision="bf16/fp32")]
PIPES = [Cell(0, pp=2), Cell(1, pp=2), Cell(1, pp=2, precision="bf16/fp32")]


class _Spoiler:
    """Makes the gradient NaN on its way back; the loss stays finite."""

    def __init__(self, engine: TrainingEngine) -> None:
        self.on = False
        norm = next(m for m in engine.engine.module.modules() if isinstance(m, torch.nn.LayerNorm))  # type: ignore[attr-defined]
        norm.register_forward_hook(self._spoil)

    def _spoil(self, _module: torch.nn.Module, _inputs: tuple, output: torch.Tensor) -> None:
        if self.on:
            output.register_hook(lambda gradient: gradient * torch.nan)


def _run(cell: Cell, folder: Path, rank: int, bad: bool) -> dict[str, Any]:
    engine = equivalence.build(cell, equivalence.json_path(cell, folder), rank)
    spoiler = _Spoiler(engine)
    losses, finite, norms = [], [], []
    for step in (0, 1, 2, 3):
        spoiler.on = step == 1
        if spoiler.on and not bad:
            continue
        batches = equivalence.micro_batches(step, engine.data_rank, engine.data_size, engine.accumulation)
        output = engine.train_step(step, batches, 1e-3)
        finite.append(output.finite)
        norms.append(engine.grad_norm())
        if not spoiler.on:
            losses.append(output.loss)
    state = {str(entry): value.detach().clone() for entry, value in engine.state().entries.items()}
    engine.close()
    return {"losses": losses, "finite": finite, "norms": norms, "state": state}


def _work(cells: list[Cell], folder: Path, rank: int) -> dict[str, Any]:
    return {str(cell): [_problem(cell, folder, rank)] for cell in cells}


def _problem(cell: Cell, folder: Path, rank: int) -> str:
    """Return what differs between a run with a bad step and one that never had it."""
    found, expected = (_run(cell, folder, rank, bad) for bad in (True, False))
    if found["finite"] != [True, False, True, True] or found["norms"][1] is not None:
        return f"reported as {found['finite']}, {found['norms']}"
    if found["losses"] != expected["losses"]:
        return f"losses {found['losses']} instead of {expected['losses']}"
    differing = [
        name for name, value in expected["state"].items() if not torch.equal(value, found["state"][name])
    ]
    return f"differing: {differing[:2]}" if differing else ""


def _problems(cells: list[Cell], folder: Path, ranks: int) -> list[str]:
    for cell in cells:
        equivalence.write_json(cell, folder)
    answers = run_ranks(partial(_work, cells, folder), ranks)
    return [f"{cell} {problem[0]}" for answer in answers for cell, problem in answer.items() if problem[0]]


@pytest.mark.parametrize(
    ("cells", "ranks"),
    [(CELLS, 1), pytest.param(PIPES, 2, marks=pytest.mark.slow)],
    ids=["plain", "pipe stages"],
)
def test_training_goes_on_as_if_the_step_had_never_been(
    tmp_path: Path, cells: list[Cell], ranks: int
) -> None:
    assert not _problems(cells, tmp_path, ranks)


def test_it_depends_on_the_dropped_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_drop_unless_finite", lambda norm, parameters: None)
    assert len(_problems([Cell(0)], tmp_path, 1)) == 1
    assert len(_problems([Cell(0, pp=2)], tmp_path, 2)) == 2


def test_it_depends_on_what_zero_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (stage_1_and_2, bf16_optimizer):
        monkeypatch.setattr(module, "is_invalid_grad_norm", lambda norm: False)
    assert len(_problems([Cell(1)], tmp_path, 1)) == 1
    assert len(_problems([Cell(1, pp=2)], tmp_path, 2)) == 2
