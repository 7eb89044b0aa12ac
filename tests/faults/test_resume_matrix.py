"""Stopped twice and started again, training of every kind ends in the same bits as training that went straight through."""

from pathlib import Path

import killed_training
import pytest
from equivalence import Cell
from killed_training import ENDLESS, Job

from cogview2.pipeline.training.state import loading
from cogview2.pipeline.training.state.manifest import DATA_STATE, folder_name, read_manifest

pytestmark = pytest.mark.distributed
STOPS = (4, 8, 12)
OFFLOAD = ("offload_optimizer",)
GATE = [Cell(1, dp=2, accumulation=2, precision="bf16/fp32"), Cell(1, pp=2, accumulation=2)]
FURTHER = [
    *(Cell(zero, dp=2) for zero in range(4)),
    *(Cell(zero, dp=2, accumulation=2) for zero in range(4)),
    *(Cell(zero, dp=2, precision="bf16/fp32") for zero in (1, 2, 3)),
    *(Cell(zero, dp=2, precision="bf16") for zero in (1, 2, 3)),
    Cell(0, dp=2, precision="autocast"),
    *(Cell(zero, dp=2, offload=OFFLOAD) for zero in (1, 2, 3)),
    Cell(2, dp=2, recompute=True),
    *(Cell(zero, pp=2) for zero in (0, 1)),
    Cell(1, pp=2, precision="bf16/fp32"),
    Cell(1, dp=2, pp=2, accumulation=2),
    Cell(0, 1),
]
"""All with dropout; samples that another thread reads ahead are in tests/distributed/test_resume_exact.py."""


def _differences(cell: Cell, folder: Path) -> list[str]:
    """Return what the two have different: steps by their numbers, files of the last checkpoint by their digests."""
    for stop in STOPS:
        killed_training.run_on(Job(cell, folder / "stopped", every=ENDLESS, slow_rank=None, until=stop))
    straight = Job(cell, folder / "straight", every=ENDLESS, slow_rank=None, until=STOPS[-1])
    killed_training.run_on(straight)
    found = killed_training.seen(Job(cell, folder / "stopped"))
    expected = killed_training.seen(straight)
    assert found.resumed == [0, *STOPS[:-1]] and expected.resumed == [0]
    assert len(found.losses) == STOPS[-1] * cell.ranks
    different = [f"rank, step {key}" for key in expected.losses if found.losses[key] != expected.losses[key]]
    one, two = (
        read_manifest(folder / name / "checkpoints" / folder_name(STOPS[-1])).files
        for name in ("stopped", "straight")
    )
    assert one.keys() == two.keys() and len(one) == cell.ranks + 1 and DATA_STATE in one
    # Weights, moments, counters, random states, sums: everything that a rank holds is in its file.
    return different + [name for name in one if one[name] != two[name]]


@pytest.mark.parametrize("cell", GATE, ids=str)
def test_bits_are_equal(cell: Cell, tmp_path: Path) -> None:
    assert _differences(cell, tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("cell", FURTHER, ids=str)
def test_bits_are_equal_in_every_cell(cell: Cell, tmp_path: Path) -> None:
    assert _differences(cell, tmp_path) == []


def test_a_random_state_that_is_not_kept_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load_random_state", lambda state: None)
    found = _differences(Cell(1, dp=2), tmp_path)
    assert any(name.startswith("rank, step") for name in found)
    assert any(name.startswith("rank_") for name in found)
