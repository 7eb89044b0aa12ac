from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogview2.pipeline.data.sample_plan import DataState, SamplePlan, random_words, rank_slice
from cogview2.pipeline.errors import ConfigError, DataError

PINNED = [7, 6, 3, 2, 5, 0, 4, 1, 8, 10, 9, 11]
PINNED_WORDS = [5640509254060201203, 17522379000846269407]
SIZES = [5, 0, 7, 12, 1, 3, 20]


def indices(plan: SamplePlan, start: int, count: int) -> list[int]:
    return [index for _, index in plan.positions(start, count)]


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(sum),
    st.integers(0, 2**31 - 1),
    st.integers(1, 14),
    st.integers(0, 5),
)
def test_every_sample_once_an_epoch(sizes: list[int], seed: int, window: int, epoch: int) -> None:
    plan = SamplePlan(sizes, seed, window)
    assert sorted(indices(plan, epoch * len(plan), len(plan))) == list(range(sum(sizes)))


@pytest.mark.parametrize("dp", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("seen", [0, 1, 3, 4, 9])
def test_order_does_not_depend_on_ranks(dp: int, seen: int) -> None:
    """From any step on, the ranks together read the same samples in the same order."""
    plan = SamplePlan(SIZES, seed=3, window=2)
    for step in range(seen, seen + 6):
        joined: list[tuple[int, int]] = []
        for rank in range(dp):
            numbers = rank_slice(step, 12, rank, dp)
            joined += SamplePlan(SIZES, seed=3, window=2).positions(numbers.start, len(numbers))
        assert joined == plan.positions(step * 12, 12)


@given(st.integers(0, 200), st.integers(0, 120))
def test_resume_from_anywhere(start: int, count: int) -> None:
    straight = SamplePlan(SIZES, seed=5).positions(0, start + count)
    assert SamplePlan(SIZES, seed=5).positions(start, count) == straight[start:]


def test_epochs_and_seeds_differ() -> None:
    plan = SamplePlan([50, 50], seed=1)
    orders = [tuple(indices(plan, 100 * epoch, 100)) for epoch in range(3)]
    orders.append(tuple(indices(SamplePlan([50, 50], seed=2), 0, 100)))
    assert len(set(orders)) == 4
    assert [epoch for epoch, _ in plan.positions(95, 10)] == [0] * 5 + [1] * 5


def test_windows_keep_few_shards_open() -> None:
    """Ten shards of ten: with a window of 2, each twenty samples come from exactly two, mixed."""
    plan = SamplePlan([10] * 10, seed=0, window=2)
    order = indices(plan, 0, 100)
    for first in range(0, 100, 20):
        shards = [index // 10 for index in order[first : first + 20]]
        assert Counter(shards).most_common() == [
            (shards[0], 10),
            (next(s for s in shards if s != shards[0]), 10),
        ]
        assert shards != sorted(shards) and shards != sorted(shards, reverse=True)


def test_order_is_pinned() -> None:
    """A change of this order breaks the resume of every run: it needs another order_version."""
    assert SamplePlan([4, 4, 4], seed=7, window=2).order_version == "philox-1-window2"
    assert indices(SamplePlan([4, 4, 4], seed=7, window=2), 0, 12) == PINNED
    assert random_words(2, "a", 1).tolist() == PINNED_WORDS


def test_shuffle_is_fair() -> None:
    """Every sample comes first about equally often (chi-square of 600 draws over 6 samples, p = 1e-6)."""
    first = Counter(indices(SamplePlan([3, 3], seed, 2), 0, 1)[0] for seed in range(600))
    assert sum((first[k] - 100) ** 2 / 100 for k in range(6)) < 36


@pytest.mark.parametrize("sizes", [[], [0, 0], [3, -1, 4]])
def test_no_samples(sizes: list[int]) -> None:
    with pytest.raises(DataError, match="no samples"):
        SamplePlan(sizes, 0)


@pytest.mark.parametrize(("batch", "rank", "size"), [(10, 0, 3), (8, 2, 2), (8, -1, 2), (0, 0, 1)])
def test_bad_slices(batch: int, rank: int, size: int) -> None:
    with pytest.raises(ConfigError):
        rank_slice(0, batch, rank, size)


class TestDataState:
    plan = SamplePlan(SIZES, seed=3)

    def test_round_trip(self) -> None:
        state = DataState.at(self.plan, "abc", 100)
        assert state.epoch == 2 and set(state.to_dict()) == {
            "order_version",
            "dataset_sha256",
            "seed",
            "epoch",
            "samples_consumed",
        }
        again = DataState.from_dict(state.to_dict())
        assert again == state
        again.check(self.plan, "abc")

    @pytest.mark.parametrize(
        ("plan", "dataset", "word"),
        [
            (plan, "xyz", "dataset"),
            (SamplePlan(SIZES, seed=4), "abc", "seed"),
            (SamplePlan(SIZES, seed=3, window=3), "abc", "order"),
            (SamplePlan([1], seed=3), "abc", "epoch"),
        ],
    )
    def test_refuses_another_order(self, plan: SamplePlan, dataset: str, word: str) -> None:
        with pytest.raises(DataError, match=word):
            DataState.at(self.plan, "abc", 100).check(plan, dataset)

    @pytest.mark.parametrize(
        "change", [{"seed": "3"}, {"samples_consumed": -1}, {"extra": 1}, {"epoch": True}, {"seed": None}]
    )
    def test_refuses_damage(self, change: dict[str, object]) -> None:
        with pytest.raises(DataError, match="damaged"):
            DataState.from_dict({**DataState.at(self.plan, "abc", 5).to_dict(), **change})


def test_ten_thousand_shards_are_quick() -> None:
    plan = SamplePlan([100] * 10_000, seed=0)
    assert len(np.unique(plan.order(0))) == 1_000_000
