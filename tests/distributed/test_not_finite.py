"""Gradients that are not finite end training before anything is saved, whatever the engine."""

from functools import partial
from pathlib import Path

import equivalence
import pytest
import torch
from equivalence import Cell
from forked_ranks import run_ranks

from cogview2.pipeline.errors import NumericError

pytestmark = pytest.mark.distributed
CELLS = [Cell(0), Cell(0, precision="autocast"), Cell(1), Cell(3), Cell(1, precision="bf16/fp32")]
PIPES = [Cell(0, pp=2), Cell(1, pp=2)]


def _spoil(_module: torch.nn.Module, _inputs: tuple, output: torch.Tensor) -> None:
    """Make the gradient NaN on its way back; the loss stays finite."""
    output.register_hook(lambda gradient: gradient * torch.nan)


def _work(cells: list[Cell], folder: Path, rank: int) -> dict[str, str]:
    said = {}
    for cell in cells:
        engine = equivalence.build(cell, equivalence.json_path(cell, folder), rank)
        batches = equivalence.micro_batches(0, engine.data_rank, engine.data_size, engine.accumulation)
        engine.train_step(0, batches, 1e-3)
        finite = engine.grad_norm() is not None
        norm = next(m for m in engine.engine.module.modules() if isinstance(m, torch.nn.LayerNorm))
        norm.register_forward_hook(_spoil)
        try:
            engine.train_step(1, batches, 1e-3)
            said[str(cell)] = "went on"
        except NumericError as error:
            said[str(cell)] = f"{finite} {error}"
        engine.close()
    return said


@pytest.mark.parametrize(("cells", "ranks"), [(CELLS, 1), (PIPES, 2)], ids=["plain", "pipe stages"])
def test_it_is_a_numeric_error(tmp_path: Path, cells: list[Cell], ranks: int) -> None:
    for cell in cells:
        equivalence.write_json(cell, tmp_path)
    for answer in run_ranks(partial(_work, cells, tmp_path), ranks):
        assert set(answer) == {str(cell) for cell in cells}
        for cell, said in answer.items():
            assert said.startswith("True the gradients of step 2 are not finite"), (cell, said)
