import pytest

from cogview2.pipeline.config.training import OptimizerConfig
from cogview2.pipeline.training.schedules import learning_rate


def config(**values: object) -> OptimizerConfig:
    return OptimizerConfig(**{"learning_rate": 1e-3, "warmup_steps": 4, "final_ratio": 0.1} | values)


def test_warm_up_rises_to_the_peak_and_never_starts_at_zero() -> None:
    rates = [learning_rate(step, 20, config()) for step in range(5)]
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3])


@pytest.mark.parametrize(
    ("schedule", "middle"), [("constant", 1e-3), ("linear", 0.55e-3), ("cosine", 0.55e-3)]
)
def test_the_middle_of_the_schedule(schedule: str, middle: float) -> None:
    assert learning_rate(12, 20, config(schedule=schedule)) == pytest.approx(middle)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_decay_never_rises_and_ends_at_the_final_ratio(schedule: str) -> None:
    rates = [learning_rate(step, 20, config(schedule=schedule)) for step in range(4, 21)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(1e-4)


def test_no_warm_up_starts_at_the_peak() -> None:
    assert learning_rate(0, 10, config(warmup_steps=0)) == pytest.approx(1e-3)


def test_warm_up_of_all_steps_does_not_divide_by_zero() -> None:
    assert learning_rate(3, 4, config()) == pytest.approx(1e-3)
    assert learning_rate(4, 4, config()) == pytest.approx(1e-3)
