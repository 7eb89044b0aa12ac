"""Meters as functions of seconds: rates, utilisation, time left, and who is slow."""

from pathlib import Path

import pytest
import torch
from torch import nn

from cogview2.pipeline.training import meters
from cogview2.pipeline.training.meters import ForwardClock, StepMeter, Work, slowest_rank


class Time:
    """Stands for the module `time`: a clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    moved = Time()
    monkeypatch.setattr(meters, "time", moved)
    return moved


def test_utilisation_is_a_share_of_the_peak() -> None:
    assert meters.utilisation(400e12, 1000e12) == 0.4
    assert meters.utilisation(400e12, None) is None


@pytest.mark.parametrize(
    ("waited", "step", "share"), [(0.5, 2.0, 0.25), (3.0, 2.0, 1.0), (-1e-9, 2.0, 0.0), (1.0, 0.0, 0.0)]
)
def test_wait_share_stays_a_share(waited: float, step: float, share: float) -> None:
    assert meters.wait_share(waited, step) == share


def test_the_time_left_counts_what_lies_around_the_steps() -> None:
    assert meters.remaining_seconds(10, 2.0, wall=100.0, in_steps=100.0) == 20.0
    # A quarter of the time went into saving and drawing: so it will.
    assert meters.remaining_seconds(10, 2.0, wall=100.0, in_steps=75.0) == pytest.approx(20 / 0.75)
    assert meters.remaining_seconds(0, 2.0, wall=100.0, in_steps=75.0) == 0.0
    assert meters.remaining_seconds(10, 2.0, wall=1.0, in_steps=0.0) == 20.0


@pytest.mark.parametrize(
    ("own", "step", "expected"),
    [
        ([1.0], 1.0, None),
        ([1.0, 2.0], 2.5, (1, 2.0)),
        ([3.0, 1.0, 1.0, 1.5], 4.0, (0, 3.0)),  # the median of the others is not moved by one more slow rank
        ([1.0, 1.19], 1.2, None),  # too small a ratio
        ([0.010, 0.030], 1.0, None),  # three times as long, but 2 % of the step
        ([0.0, 0.5], 1.0, (1, pytest.approx(5e5))),
    ],
)
def test_slowest_rank(own: list[float], step: float, expected: tuple[int, float] | None) -> None:
    assert slowest_rank(own, step) == expected


def test_a_rank_is_named_with_its_host_where_there_are_several() -> None:
    assert meters.rank_name(1, ["a", "a"]) == "rank 1"
    assert meters.rank_name(3, ["a", "a", "b", "b"]) == "rank 3 on b"


def test_all_figures_of_a_window(clock: Time) -> None:
    work = Work(
        flops_per_sample=4e12,
        tokens_per_sample=512,
        images_per_sample=0.75,
        peak_flops_per_rank=10e12,
        later_flops=16e12 * 60,
    )
    meter = StepMeter(work, 8, ["a", "b"])
    assert meter.values(10) == {} and meter.slowest() is None
    clock.now += 2
    meter.add(2.0, [0.0, 0.5], [1.0, 1.1], 2**30)
    clock.now += 1  # saving, between two steps
    clock.now += 2
    meter.add(2.0, [0.3, 0.5], [1.0, 1.1], 3 * 2**29)
    slow = meter.slowest()
    assert slow is not None and slow.name == "rank 1 on b" and slow.ratio == pytest.approx(3.2 / 2.3)
    assert meter.values(10) == pytest.approx(
        {
            "samples_per_second": 4.0,
            "tokens_per_second": 2048.0,
            "images_per_second": 3.0,
            "model_tflops": 16.0,
            "model_tflops_per_rank": 8.0,
            "mfu": 0.8,
            "seconds_per_step": 2.0,
            "data_wait": 0.25,  # of the slowest reader of each step: 0.5 + 0.5 of 4 s
            "peak_memory_gib": 1.5,
            "slowest_rank": 1.0,
            "slowest_ratio": 3.2 / 2.3,
            "eta_seconds": 10 * 2.0 * 5 / 4,
            "cascade_eta_seconds": 10 * 2.0 * 5 / 4 + 60,
        }
    )
    assert set(meter.values(10)) | {"slowest"} == meters.TIMED
    assert meter.rate(meter.values(0)) == (2048.0, "tokens/s")


def test_the_next_window_begins_empty_but_keeps_the_peak(clock: Time) -> None:
    meter = StepMeter(Work(images_per_sample=1.0), 4, ["a"])
    clock.now += 1
    meter.add(1.0, [0.5], [0.1], 2**31)
    meter.restart()
    assert meter.values(1) == {}
    clock.now += 2
    meter.add(2.0, [0.0], [0.1], 2**30)
    values = meter.values(3)
    assert (values["data_wait"], values["seconds_per_step"], values["peak_memory_gib"]) == (0.0, 2.0, 2.0)
    assert values["eta_seconds"] == pytest.approx(6.0)
    # Without formulas: no rate that nobody knows.
    unknown = {"tokens_per_second", "model_tflops", "mfu", "slowest_rank", "cascade_eta_seconds"}
    assert not unknown & set(values)
    assert meter.rate(values) == (2.0, "images/s")
    assert StepMeter(Work(), 4, ["a"]).rate({"samples_per_second": 2.0}) == (2.0, "samples/s")


def test_forward_passes_are_timed_and_nothing_else(clock: Time) -> None:
    class Slow(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            clock.now += 0.25
            return x * 2

    module = Slow()
    timer = ForwardClock(module, torch.device("cpu"))
    assert module(torch.ones(1)).item() == 2.0
    clock.now += 5
    module(torch.ones(1))
    assert timer.take() == 0.5
    assert timer.take() == 0.0
    timer.close()
    module(torch.ones(1))
    assert timer.take() == 0.0


def test_peak_memory_of_a_process_is_its_resident_memory_at_the_highest() -> None:
    held = torch.ones(2**24)
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    assert meters.peak_memory_bytes(torch.device("cpu")) == pytest.approx(peak, rel=0.05)
    assert peak > held.nbytes
