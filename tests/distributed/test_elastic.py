"""A checkpoint of one topology goes on in another: the same losses and norms as training that was never cut or moved."""

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import equivalence
import pytest
import torch.distributed as dist
from equivalence import Cell
from forked_ranks import run_ranks

from cogview2.pipeline.errors import CheckpointError
from cogview2.pipeline.training.state import live
from cogview2.pipeline.training.state.files import StateReader, file_name, write_rank_state

pytestmark = pytest.mark.distributed
CUT = 10
"""Steps before the move; the others come after it."""
CELLS = [
    *(Cell(zero, dp) for zero in (0, 1) for dp in (1, 2)),
    *(Cell(zero, dp=2) for zero in (2, 3)),
    Cell(2, dp=2, offload=("offload_optimizer",)),
    *(Cell(zero, pp=2) for zero in (0, 1)),
    Cell(1, dp=2, pp=2, accumulation=2),
    Cell(0, pp=4),
]
GATE = [
    (Cell(1, dp=2), Cell(3, dp=2)),
    (Cell(3, dp=2), Cell(1, pp=2)),
    (Cell(1, pp=2), Cell(0, 1)),
    (Cell(0, 1), Cell(2, dp=2)),
]
Pairs = list[tuple[Cell, Cell]]


def _folder(cell: Cell, folder: Path) -> Path:
    return folder / f"saved by {cell}"


def _first_part(cells: list[Cell], folder: Path, rank: int) -> None:
    for cell in cells:
        engine = equivalence.build(cell, equivalence.json_path(cell, folder), rank)
        equivalence.train(engine, CUT)
        if rank == 0:
            _folder(cell, folder).mkdir()
        dist.barrier()
        write_rank_state(_folder(cell, folder) / file_name(rank), engine.state())
        dist.barrier()
        engine.close()


def _second_part(pairs: Pairs, folder: Path, rank: int) -> dict[str, Any]:
    curves = {}
    for old, new in pairs:
        engine = equivalence.build(new, equivalence.json_path(new, folder), rank)
        engine.load(StateReader(_folder(old, folder)))
        assert engine.engine.global_steps == CUT  # type: ignore[attr-defined]
        curves[f"{old} -> {new}"] = vars(equivalence.train(engine, first=CUT))
        engine.close()
    return curves


def _by_ranks(cells: list[Cell]) -> dict[int, list[Cell]]:
    return {
        ranks: [cell for cell in cells if cell.ranks == ranks] for ranks in {cell.ranks for cell in cells}
    }


def _worst_errors(pairs: Pairs, folder: Path) -> dict[str, float]:
    """Return the largest relative error of each pair against one plain process."""
    cells = list(dict.fromkeys(itertools.chain(*pairs)))
    for cell in cells:
        equivalence.write_json(cell, folder)
    for ranks, group in _by_ranks(list(dict.fromkeys(old for old, _ in pairs))).items():
        run_ranks(partial(_first_part, group, folder), ranks, limit=300)
    expected = equivalence.reference()
    parts = len(expected.parts) // len(expected.losses)
    rest = equivalence.Curve(expected.losses[CUT:], expected.norms[CUT:], expected.parts[CUT * parts :])
    errors = {}
    for ranks in sorted({new.ranks for _, new in pairs}):
        mine = [pair for pair in pairs if pair[1].ranks == ranks]
        found = run_ranks(partial(_second_part, mine, folder), ranks, limit=600)[0]
        errors |= {name: equivalence.worst_error(curve, rest) for name, curve in found.items()}
    return errors


@pytest.mark.parametrize(
    "pairs",
    [GATE, pytest.param(list(itertools.product(CELLS, CELLS)), marks=pytest.mark.slow)],
    ids=["gate", "every pair"],
)
def test_another_topology_goes_on_as_if_nothing_had_changed(tmp_path: Path, pairs: Pairs) -> None:
    errors = _worst_errors(pairs, tmp_path)
    print(f"{len(errors)} pairs, worst relative error {max(errors.values()):.1e}")
    assert len(errors) == len(pairs)
    assert {name: error for name, error in errors.items() if not error < 1e-5} == {}


def _refused(old: Cell, new: Cell, folder: Path, rank: int) -> dict[str, str]:
    """Load with one parameter's counter, which only rank 1 needs, unlike the others."""
    engine = equivalence.build(new, equivalence.json_path(new, folder), rank)
    reader = StateReader(_folder(old, folder))
    holdings = engine._live().holdings  # type: ignore[attr-defined]
    real, mine = reader.read, holdings[-1].name
    if rank == 1:
        reader.read = lambda name, key, *run: real(name, key, *run) + (name == mine and key == "step")  # type: ignore[method-assign]
    try:
        engine.load(reader)
    except CheckpointError as error:
        return {"refused": str(error)}
    return {}


def test_what_one_rank_cannot_load_is_refused_by_all_and_nobody_waits(tmp_path: Path) -> None:
    old, new = Cell(0, 1), Cell(1, dp=2)
    for cell in (old, new):
        equivalence.write_json(cell, tmp_path)
    run_ranks(partial(_first_part, [old], tmp_path), 1)
    said = run_ranks(partial(_refused, old, new, tmp_path), 2)
    assert said[0] == said[1] and "another number of times than its neighbours" in said[0]["refused"]


def _forgets_moments(key: str) -> Any:
    real = live.StateReader.keys
    return lambda reader, name: real(reader, name) - {key}


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "step"])
def test_a_takeover_that_forgets_a_part_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setattr(live.StateReader, "keys", _forgets_moments(key))
    try:
        errors = _worst_errors([(Cell(1, 1), Cell(0, 1))], tmp_path)
    except AssertionError as error:  # torch's AdamW itself may miss it
        assert key in str(error)
    else:
        assert max(errors.values()) > 1e-4


def test_a_takeover_of_the_neighbours_numbers_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = live.StateReader.read

    def shifted(reader: StateReader, name: str, key: str, start: int, count: int) -> Any:
        return real(reader, name, key, max(0, start - 1), count)

    monkeypatch.setattr(live.StateReader, "read", shifted)
    assert max(_worst_errors([(Cell(0, 1), Cell(2, dp=2))], tmp_path).values()) > 1e-4
