import threading

import numpy as np
import pytest

from cogview2.pipeline.data.loader import StepLoader, sample_rng
from cogview2.pipeline.data.sample_plan import SamplePlan
from cogview2.pipeline.errors import ConfigError, DataError

PLAN = SamplePlan([5, 7], seed=1)


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("dp", [1, 2, 4])
def test_ranks_share_each_batch(prefetch: bool, dp: int) -> None:
    loaders = [StepLoader(str, PLAN, 8, rank, dp, prefetch=prefetch) for rank in range(dp)]
    for step in (0, 1, 2, 7, 3, 4):
        joined = [sample for loader in loaders for sample in loader.step(step)]
        assert joined == [str(index) for _, index in PLAN.positions(step * 8, 8)]
    for loader in loaders:
        loader.close()


def test_reads_one_step_ahead() -> None:
    seen: list[int] = []
    reached = threading.Event()

    def read(index: int) -> int:
        seen.append(index)
        if len(seen) == 8:
            reached.set()
        return index

    with StepLoader(read, PLAN, 4, 0, 1) as loader:
        loader.step(0)
        assert reached.wait(10)
    assert seen == [index for _, index in PLAN.positions(0, 8)]


@pytest.mark.parametrize("prefetch", [True, False])
def test_errors_come_at_their_step(prefetch: bool) -> None:
    bad = PLAN.positions(4, 4)[2][1]

    def read(index: int) -> int:
        if index == bad:
            raise DataError(f"sample {index}")
        return index

    with StepLoader(read, PLAN, 4, 0, 1, prefetch=prefetch) as loader:
        loader.step(0)
        with pytest.raises(DataError, match=f"sample {bad}"):
            loader.step(1)
        assert loader.step(2) == [index for _, index in PLAN.positions(8, 4)]


def test_an_error_read_ahead_in_vain_is_dropped() -> None:
    bad = PLAN.positions(4, 1)[0][1]

    def read(index: int) -> int:
        if index == bad:
            raise DataError("never needed")
        return index

    with StepLoader(read, PLAN, 4, 0, 1) as loader:
        loader.step(0)
        assert loader.step(2) == [index for _, index in PLAN.positions(8, 4)]


def test_refuses_a_batch_that_cannot_be_shared() -> None:
    with pytest.raises(ConfigError, match="10"):
        StepLoader(str, PLAN, 10, 0, 4)


def test_sample_rng_depends_on_everything() -> None:
    cases = [
        (1, 0, "a", "crop"),
        (2, 0, "a", "crop"),
        (1, 1, "a", "crop"),
        (1, 0, "b", "crop"),
        (1, 0, "a", "x"),
    ]
    draws = [tuple(sample_rng(*case).integers(0, 2**62, 2)) for case in cases]
    assert len(set(draws)) == len(cases)
    assert np.array_equal(sample_rng(*cases[0]).random(5), sample_rng(*cases[0]).random(5))
