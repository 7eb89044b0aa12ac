"""Who holds a job up is said once, and nobody is blamed for noise."""

import random

import pytest

from cogview2.pipeline.training import straggler
from cogview2.pipeline.training.straggler import StragglerWatch

NAMES = [f"rank {rank}" for rank in range(4)]


def warnings(steps: list[tuple[float, list[float]]]) -> list[tuple[int, str]]:
    watch = StragglerWatch(NAMES)
    found = [(number, watch.add(seconds, own)) for number, (seconds, own) in enumerate(steps, start=1)]
    return [(number, said) for number, said in found if said is not None]


def even(count: int) -> list[tuple[float, list[float]]]:
    return [(0.1, [0.05] * 4)] * count


def late(count: int, rank: int = 2) -> list[tuple[float, list[float]]]:
    return [(0.4, [0.35 if number == rank else 0.05 for number in range(4)])] * count


def test_a_rank_that_becomes_slow_is_named_once_within_20_steps() -> None:
    ((number, said),) = warnings([*even(30), *late(100)])
    assert 31 <= number <= 50
    assert said.startswith(
        "rank 2 holds the others up: it needs 0.35 s or more to read and compute in 13 of 16 steps"
    )


def test_it_is_named_again_after_it_was_well_and_so_is_another() -> None:
    said = warnings([*late(20), *even(20), *late(20), *late(20, rank=0)])
    assert [text[:6] for _, text in said] == ["rank 2", "rank 2", "rank 0"]


def noisy(seed: int) -> list[tuple[float, list[float]]]:
    """Steps of ranks that are alike, with the pauses of a busy host: one rank in ten is late by itself, now and then."""
    rng = random.Random(seed)
    steps = []
    for _ in range(500):
        own = [rng.uniform(0.04, 0.06) + (rng.random() < 0.1) * rng.uniform(0, 1) for _ in NAMES]
        steps.append((max(own) + 0.02, own))
    return steps


@pytest.mark.parametrize("seed", range(5))
def test_nobody_is_named_in_500_normal_steps(seed: int) -> None:
    assert not warnings(noisy(seed))


def test_steps_of_milliseconds_are_never_even() -> None:
    assert not warnings([(0.004, [0.001, 0.003, 0.001, 0.001])] * 100)


def test_mutant_without_a_window_pauses_are_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(straggler, "WINDOW", 1)
    monkeypatch.setattr(straggler, "MOST", 1)
    assert warnings(noisy(0))


def test_a_rank_alone_is_no_straggler() -> None:
    watch = StragglerWatch(["rank 0"])
    assert not any(watch.add(1.0, [1.0]) for _ in range(50))
