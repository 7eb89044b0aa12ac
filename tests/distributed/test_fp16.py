"""fp16 with a loss scale that follows the gradients. CPUs can compute it, slowly; only resolve() and DeepSpeed refuse them."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import equivalence
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from equivalence import Cell
from forked_ranks import run_ranks

from cogview2.pipeline.errors import NumericError

pytestmark = pytest.mark.distributed
CELLS = [
    Cell(1, dp=2, accumulation=2, precision="fp16/fp32"),
    Cell(2, dp=2, precision="fp16"),
    Cell(3, dp=2, precision="fp16"),
    Cell(1, pp=2, accumulation=2, recompute=True, precision="fp16"),
]
TOO_LARGE = 40
"""2 to this power overflows whatever gradient."""


def _train(cells: list[Cell], folder: Path, rank: int) -> dict[str, Any]:
    return {str(cell): equivalence.run_cell(cell, folder, rank, cpu=False) for cell in cells}


def _overflow(cell: Cell, folder: Path, rank: int) -> dict[str, Any]:
    engine = equivalence.build(cell, equivalence.json_path(cell, folder), rank, cpu=False)
    before = engine.full_state()
    lines: list[Any] = []
    error = ""
    try:
        for step in range(4):
            batches = equivalence.micro_batches(step, engine.data_rank, engine.data_size, engine.accumulation)
            lines.append([engine.train_step(step, batches, 1e-3).extra, engine.grad_norm()])
    except NumericError as caught:
        error = str(caught)
    after = engine.full_state()
    same = after is None or all(torch.equal(before[name], after[name]) for name in after)  # type: ignore[index]
    return {"lines": lines, "error": [error], "same": same}


@pytest.fixture(autouse=True)
def fp16_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)


def _write(cell: Cell, folder: Path, **scale: Any) -> None:
    path = Path(equivalence.write_json(cell, folder))
    content = json.loads(path.read_text())
    content["fp16"] |= scale
    path.write_text(json.dumps(content))


def test_fp16_trains_as_plain_torch_does(tmp_path: Path) -> None:
    for cell in CELLS:
        _write(cell, tmp_path)
    expected = equivalence.reference(weights_dtype=torch.float16)
    for answer in run_ranks(partial(_train, CELLS, tmp_path), 2, limit=300):
        for cell in CELLS:
            found = answer[str(cell)] | {"parts": expected.parts}
            assert equivalence.worst_error(found, expected) < 0.005, cell


@pytest.mark.parametrize("cell", CELLS[1:], ids=str)
def test_a_step_that_overflows_is_left_out_and_counted(tmp_path: Path, cell: Cell) -> None:
    _write(cell, tmp_path, initial_scale_power=TOO_LARGE, hysteresis=2)
    for answer in run_ranks(partial(_overflow, cell, tmp_path), 2):
        assert answer["error"] == [""] and answer["same"]
        scales = [extra["loss_scale"] for extra, _ in answer["lines"]]
        # The second overflow is the first that counts.
        assert scales == [2.0**power for power in (40, 39, 38, 37)]
        assert [extra["skipped_steps"] for extra, _ in answer["lines"]] == [1, 2, 3, 4]
        assert all(norm is None for _, norm in answer["lines"])


def test_an_overflow_at_the_least_scale_ends_training(tmp_path: Path) -> None:
    cell = CELLS[1]
    _write(cell, tmp_path, initial_scale_power=TOO_LARGE, hysteresis=1, min_loss_scale=2.0 ** (TOO_LARGE - 1))
    for answer in run_ranks(partial(_overflow, cell, tmp_path), 2):
        assert len(answer["lines"]) == 1
        assert "gradients of step 2 overflow even at the least loss scale" in answer["error"][0]
