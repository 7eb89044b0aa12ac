"""One weights file starts every kind of engine, and every kind of engine gives back the same file."""

from functools import partial
from pathlib import Path
from typing import Any

import equivalence
import pytest
import torch
from equivalence import CONFIG, VOCABULARY, Cell
from forked_ranks import run_ranks

from cogview2.pipeline.models.coglm.model import CogLM
from cogview2.pipeline.models.coglm.pipe import init_as_pipe
from cogview2.pipeline.training.engine import export_weights
from cogview2.pipeline.weights.files import load_weights, save_weights

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
CELLS = [
    *(Cell(zero, dp=2) for zero in range(4)),
    Cell(3, dp=2, offload=("offload_optimizer", "offload_param")),
    *(Cell(zero, pp=2) for zero in (0, 1)),
    *(Cell(zero, dp=2, precision="bf16/fp32") for zero in (1, 2, 3)),
    Cell(1, pp=2, precision="bf16/fp32"),
]


def _work(source: Path, folder: Path, rank: int) -> dict[str, Any]:
    for cell in CELLS:
        engine = equivalence.build(cell, equivalence.json_path(cell, folder), rank, source)
        export_weights(engine, folder / f"{cell}.safetensors", {"kind": "coglm"})
        engine.close()
    return {}


@pytest.mark.parametrize("stored", [torch.float32, torch.float16], ids=str)
def test_every_engine_starts_from_the_file_and_writes_it_again(tmp_path: Path, stored: torch.dtype) -> None:
    model = CogLM(CONFIG, VOCABULARY.rows)
    init_as_pipe(model, equivalence.SEED + 1)
    source = tmp_path / "source.safetensors"
    save_weights(source, {name: value.to(stored) for name, value in model.state_dict().items()})
    for cell in CELLS:
        equivalence.write_json(cell, tmp_path)
    run_ranks(partial(_work, source, tmp_path), 2, limit=200)
    given = load_weights(source)
    for cell in CELLS:
        written = load_weights(tmp_path / f"{cell}.safetensors")
        assert written.keys() == given.keys()
        for name, value in given.items():
            # The masters of a bf16 engine are those of the rounded weights.
            expected = value.bfloat16() if cell.precision.startswith("bf16") else value
            assert written[name].dtype == torch.float32
            assert torch.equal(written[name], expected.float()), f"{cell} {name}"
