"""Every kind of engine goes on from its checkpoint exactly as if it had never stopped."""

from functools import partial
from pathlib import Path
from typing import Any

import equivalence
import pytest
import torch
import torch.distributed as dist
from equivalence import Cell
from forked_ranks import run_ranks

from cogview2.pipeline.training.state.files import StateReader, file_name, write_rank_state

pytestmark = pytest.mark.distributed
OFFLOAD = ("offload_optimizer",)
GATE = [
    Cell(0, pp=2, accumulation=2),
    Cell(1, pp=2, precision="bf16/fp32"),
    Cell(2, dp=2, precision="bf16/fp32"),
]
FURTHER = [
    *(Cell(zero, dp=2) for zero in range(4)),
    *(Cell(zero, dp=2, offload=OFFLOAD) for zero in (1, 2, 3)),
    *(Cell(zero, dp=2, precision="bf16/fp32") for zero in (1, 3)),
    Cell(1, pp=2, offload=OFFLOAD),
    Cell(1, pp=2, precision="bf16"),
    Cell(2, dp=2, precision="autocast"),
]
SAVED, STEPS = 2, 4


def _steps(engine: Any, first: int, last: int) -> list[float]:
    found = []
    for step in range(first, last):
        batches = equivalence.micro_batches(step, engine.data_rank, engine.data_size, engine.accumulation)
        found += [engine.train_step(step, batches, 1e-3).loss, engine.grad_norm()]
    return found


def _save(engine: Any, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    write_rank_state(folder / file_name(dist.get_rank()), engine.state())
    dist.barrier()


def _check_masters(engine: Any, folder: Path) -> None:
    """The file holds, under each name, what the engine itself gives for it."""
    state = engine.full_state()
    if state is not None:
        reader = StateReader(folder)
        assert set(reader.names()) == set(state)
        assert all(torch.equal(reader.whole(name), value.float()) for name, value in state.items())


def _work(cells: list[Cell], folder: Path, rank: int) -> dict[str, Any]:
    results = {}
    for cell in cells:
        checkpoint = folder / f"checkpoint of {cell}"
        engine = equivalence.build(cell, equivalence.json_path(cell, folder), rank)
        _steps(engine, 0, SAVED)
        _save(engine, checkpoint)
        _check_masters(engine, checkpoint)
        straight = _steps(engine, SAVED, STEPS)
        engine.close()
        engine = equivalence.build(cell, equivalence.json_path(cell, folder), rank)
        _steps(engine, 0, 1)  # whatever it held is replaced
        engine.load(StateReader(checkpoint))
        results[str(cell)] = [straight, _steps(engine, SAVED, STEPS)]
        engine.close()
    return results


@pytest.mark.parametrize(
    "cells", [GATE, pytest.param(FURTHER, marks=pytest.mark.slow)], ids=["gate", "further"]
)
def test_resume_is_exact(tmp_path: Path, cells: list[Cell]) -> None:
    for cell in cells:
        equivalence.write_json(cell, tmp_path)
    for answer in run_ranks(partial(_work, cells, tmp_path), 2, limit=300):
        for cell in cells:
            straight, resumed = answer[str(cell)]
            assert resumed == straight, cell
