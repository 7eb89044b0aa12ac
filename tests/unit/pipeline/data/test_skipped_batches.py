import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogview2.pipeline import fsops
from cogview2.pipeline.data.sample_plan import DataState, SamplePlan, rank_slice
from cogview2.pipeline.data.skipped_batches import FILE, SkippedBatch, SkippedBatches
from cogview2.pipeline.errors import DataError

PLAN = SamplePlan([5, 7, 9], seed=3)
BATCH = 12


def left_out(*numbers: int) -> SkippedBatches:
    return SkippedBatches(SkippedBatch(number, number + 1, "the loss is nan") for number in numbers)


@given(st.sets(st.integers(0, 40)), st.integers(0, 40))
def test_a_step_reads_the_number_of_its_rank_among_those_that_are_left(numbers: set[int], step: int) -> None:
    expected = [number for number in range(100) if number not in numbers][step]
    assert left_out(*numbers).number(step) == expected


@given(st.lists(st.integers(0, 12), unique=True), st.integers(0, 12))
def test_what_is_left_out_later_does_not_move_a_checkpoint(choices: list[int], steps: int) -> None:
    """Going back to `steps` updates again and again, each time leaving a batch out that lies ahead of them."""
    skipped = left_out(2, 5)
    behind = skipped.behind(steps)
    found = 0
    for choice in sorted(choices):
        number = skipped.number(steps + choice)
        skipped = skipped.add(SkippedBatch(number, 1, "nan"))
        found += 1
        assert skipped.behind(steps) == behind
        assert skipped.ahead(steps) == found + sum(old >= behind for old in (2, 5))
    state = DataState.at(PLAN, "d", behind * BATCH)
    skipped.check(state, steps, BATCH)


def test_behind() -> None:
    skipped = left_out(5, 2)
    assert [skipped.behind(steps) for steps in range(6)] == [0, 1, 2, 4, 5, 7]
    assert [left_out().behind(steps) for steps in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 12])
def test_the_order_does_not_depend_on_ranks(ranks: int) -> None:
    skipped = left_out(1, 4)
    read = []
    for step in range(6):
        for rank in range(ranks):
            mine = rank_slice(skipped.number(step), BATCH, rank, ranks)
            read += PLAN.positions(mine.start, len(mine))
    whole = PLAN.positions(0, 8 * BATCH)
    kept = [number for number in range(8) if number not in (1, 4)]
    assert read == [place for number in kept for place in whole[number * BATCH : (number + 1) * BATCH]]


def test_another_list_than_that_of_the_checkpoint_is_refused() -> None:
    state = DataState.at(PLAN, "d", left_out(1).behind(4) * BATCH)
    left_out(1).check(state, 4, BATCH)
    left_out(1, 9).check(state, 4, BATCH)
    for wrong in (left_out(), left_out(1, 2)):
        with pytest.raises(DataError, match=f"stands at sample 60.*restore {FILE}"):
            wrong.check(state, 4, BATCH)


def test_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / FILE
    assert len(SkippedBatches.read(path)) == 0
    done: list[str] = []
    monkeypatch.setattr(fsops, "recorder", lambda operation, *_: done.append(operation))
    skipped = left_out(3).add(SkippedBatch(1, 7, "spike", ("k1", "k2")))
    skipped.write(path)
    assert SkippedBatches.read(path).entries == skipped.entries
    # Durable: content and name are synced before and after the rename.
    assert done.index("fsync") < done.index("rename") < done.index("fsync_dir")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"format": 2, "batches": []}',
        '{"format": 1}',
        '{"format": 1, "batches": [{"number": 1}]}',
        '{"format": 1, "batches": [{"number": -1, "step": 1, "reason": "", "samples": []}]}',
        '{"format": 1, "batches": [{"number": true, "step": 1, "reason": "", "samples": []}]}',
        '{"format": 1, "batches": [{"number": 1, "step": 1, "reason": "", "samples": [2]}]}',
        '{"format": 1, "batches": [{"number": 1, "step": 1, "reason": "", "samples": 2}]}',
        '{"format": 1, "batches": [7]}',
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(DataError, match="is damaged.*restore it"):
        SkippedBatches.read(tmp_path / FILE)


def test_a_batch_stands_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="twice"):
        left_out(1, 2, 1)
    left_out(1).write(tmp_path / FILE)
    document = json.loads((tmp_path / FILE).read_text())
    document["batches"] *= 2
    (tmp_path / FILE).write_text(json.dumps(document))
    with pytest.raises(DataError, match="is damaged"):
        SkippedBatches.read(tmp_path / FILE)
