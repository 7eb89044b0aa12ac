"""How long which phase may last, who looks at whom, and what a step pays for it; real hangs are in tests/faults."""

import json
import time
from pathlib import Path

import pytest

from cogview2.pipeline.attempt import Attempt, Beat
from cogview2.pipeline.config.launch import WatchdogConfig
from cogview2.pipeline.config.loading import load_recipe
from cogview2.pipeline.distributed import watchdog
from cogview2.pipeline.distributed.watchdog import Watchdog
from cogview2.pipeline.errors import ConfigError
from cogview2.pipeline.stage_dir import StageDirectory

CONFIG = WatchdogConfig(step_seconds=10, save_seconds=20, start_seconds=30, work_seconds=40)


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    return StageDirectory(tmp_path / "stage", "pretrain_coglm").new_attempt()


def test_every_phase_has_its_patience(attempt: Attempt) -> None:
    dog = Watchdog(attempt, 0, 2, CONFIG)
    assert [dog.patience(phase) for phase in ("start", "restore", "sample", "save", "work", "wait")] == [
        *(30, 30, 20, 20, 40, 40)
    ]
    found = []
    for phase, step in [("restore", None), ("data", 1), ("step", 1), ("data", 2), ("step", 2), ("data", 3)]:
        dog.mark(phase, step)
        found.append(dog.patience(phase))
    assert found == [30, 30, 30, 30, 10, 10]  # in the first step kernels are compiled
    dog.mark("restore", None)  # another model, in the same process
    assert dog.patience("step") == 30
    dog.end()


def test_no_patience_is_for_ever(attempt: Attempt) -> None:
    dog = Watchdog(attempt, 0, 1, WatchdogConfig(step_seconds=5, start_seconds=0))
    assert dog.patience("start") == dog.patience("step") == 0
    dog.mark("step", 1)
    dog.mark("step", 2)
    assert dog.patience("step") == 5
    dog.end()


@pytest.mark.parametrize("key", ["step_seconds", "save_seconds", "start_seconds", "work_seconds"])
def test_the_recipe_sets_it(key: str) -> None:
    recipe = load_recipe("quickstart", [f"launch.watchdog.{key}=7200"])
    assert getattr(recipe.launch.watchdog, key) == recipe.launch.watchdog.longest == 7200
    with pytest.raises(ConfigError):
        load_recipe("quickstart", [f"launch.watchdog.{key}=-1"])


def test_what_is_no_phase_is_refused(attempt: Attempt) -> None:
    dog = Watchdog(attempt, 0, 1, CONFIG)
    with pytest.raises(ValueError, match="'sleep' is no phase; use one of start, restore"):
        dog.mark("sleep", None)
    dog.end()


def reason(dog: Watchdog, at: float) -> str:
    """Look at the heartbeats as if it were `at` seconds after the watchdog began."""
    now = dog._mark.at + at
    dog._observe(now)
    return dog._reason(now, dog._mark, 0.0)


def beat(
    attempt: Attempt, rank: int, count: int, at: float, phase: str = "step", step: int | None = 1
) -> None:
    attempt.write_beat(Beat(rank, "b", 7, phase, step, count, 1000.0 + count, 1000.0 + at))


def test_whoever_waits_goes_by_the_progress_of_the_others(attempt: Attempt) -> None:
    dog = Watchdog(attempt, 0, 2, CONFIG)
    dog.mark("wait", None)
    for at in range(0, 400, 5):
        beat(attempt, 1, count=at // 30, at=at, phase="work", step=None)
        assert not reason(dog, at)
    for at in range(400, 430, 5):  # it lives, and gets nowhere
        beat(attempt, 1, count=13, at=at, phase="work", step=None)
        assert not reason(dog, at)
    beat(attempt, 1, count=13, at=435, phase="work", step=None)
    assert reason(dog, 435).startswith("rank 1 (host b, process 7) is behind, ")
    dog.end()


def test_those_that_ended_well_are_not_silent_and_those_that_failed_are_named(attempt: Attempt) -> None:
    dog = Watchdog(attempt, 0, 3, CONFIG)
    dog.mark("work", None)
    for rank in (1, 2):
        beat(attempt, rank, count=1, at=0, phase="work", step=None)
    assert not reason(dog, 0)
    attempt.write_outcome(1, "done", 0, None, "")
    attempt.write_outcome(2, "DataError", 78, None, "shard 3 is gone")
    assert not reason(dog, 39)
    said = reason(dog, 41)
    assert "rank 2 (host" in said and "left with DataError: shard 3 is gone" in said and "rank 1" not in said
    dog.end()


def test_a_rank_that_never_began(attempt: Attempt) -> None:
    dog = Watchdog(attempt, 0, 2, CONFIG)
    assert not reason(dog, 29)
    assert reason(dog, 31).startswith("rank 1 never gave a sign of life, while nothing moved for 30 s")
    dog.end()


def test_when_all_are_equally_far_nobody_is_blamed(attempt: Attempt) -> None:
    dog = Watchdog(attempt, 0, 2, CONFIG)
    dog.mark("step", 1)
    dog.mark("step", 2)
    for at in (0.0, 5.0, 9.0, 10.5):
        beat(attempt, 1, count=1, at=at, step=2)
        said = reason(dog, at)
    assert said.startswith(
        "no rank has made progress for 10 s (launch.watchdog.step_seconds), all that live are in"
    )
    dog.end()


def test_of_thousands_of_ranks_four_look_at_all(attempt: Attempt) -> None:
    found = []
    for rank in range(17):
        dog = Watchdog(attempt, rank, 17, CONFIG)
        found += [rank] if dog._lookout else []
        dog.end()
    assert found == [0, 1, 8, 16]


def test_the_others_wait_for_those_four(attempt: Attempt) -> None:
    dog = Watchdog(attempt, 5, 17, CONFIG)
    dog.mark("step", 1)
    dog.mark("step", 2)
    late = watchdog._LATE_SECONDS
    for at, expected in ((10.5, False), (10 + late - 1, False), (10 + late + 1, True)):
        for rank in range(17):
            beat(attempt, rank, count=1, at=at, step=1 if rank == 9 else 2)
        now = dog._mark.at + at
        dog._observe(now)
        said = dog._reason(now, dog._mark, late)
        assert said.startswith("rank 9 (host b, process 7) is behind") == bool(said) == expected
    dog.end()


def test_heartbeats_go_on_without_any_progress(attempt: Attempt) -> None:
    watchdog.start(attempt, 3, 8, CONFIG.model_copy(update={"step_seconds": 0.8}))
    try:
        watchdog.enter("save", 5)
        deadline = time.monotonic() + 20
        seen = set()
        while len(seen) < 3:
            found = attempt.beat(3)
            if found is not None and found.phase == "save":
                assert (found.step, found.count) == (5, 1)
                seen.add(found.time)
            assert time.monotonic() < deadline
        watchdog.progress()
        while (found := attempt.beat(3)) is None or found.count < 2:
            assert time.monotonic() < deadline
        assert found.phase == "save"
    finally:
        watchdog.stop()
    assert json.loads((attempt.path / "beats" / "rank_3.json").read_text())["rank"] == 3


def test_it_costs_a_step_nothing(attempt: Attempt) -> None:
    def seconds() -> float:
        begin = time.perf_counter()
        for step in range(2000):
            watchdog.enter("step", step)
        return (time.perf_counter() - begin) / 2000

    watchdog.stop()
    without = min(seconds() for _ in range(5))
    watchdog.start(attempt, 0, 1, CONFIG)
    try:
        with_it = min(seconds() for _ in range(5))
    finally:
        watchdog.stop()
    print(f"{without * 1e9:.0f} ns without, {with_it * 1e9:.0f} ns with a watchdog")
    assert with_it < 20e-6
