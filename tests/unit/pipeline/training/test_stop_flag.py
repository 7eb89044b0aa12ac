"""A signal is noticed whatever the process does, and by all ranks of an attempt."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cogview2.pipeline.training import preemption
from cogview2.pipeline.training.preemption import SIGNALS, StopFlag, hold_signals


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    signal.set_wakeup_fd(-1)
    preemption._early.clear()
    for number, handler in before.items():
        signal.signal(number, handler)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_each_signal_sets_the_flag(number: signal.Signals) -> None:
    stop = StopFlag().install()
    assert not stop.is_set
    os.kill(os.getpid(), number)
    assert stop.is_set and stop.reason == number.name
    os.kill(os.getpid(), signal.SIGTERM)  # the first counts
    assert stop.reason == number.name


def test_what_came_before_the_flag_is_not_lost() -> None:
    hold_signals()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert StopFlag().install().reason == "SIGUSR1"


def test_all_ranks_hear_of_it(tmp_path: Path) -> None:
    marker = tmp_path / "stop-requested"
    told = StopFlag().install().share(marker, 3)
    other = StopFlag().share(marker, 0)
    os.kill(os.getpid(), signal.SIGTERM)
    until(lambda: other.is_set)
    assert other.reason == "SIGTERM to rank 3" and told.reason == "SIGTERM"


def test_it_is_noticed_while_the_main_thread_is_in_a_library(tmp_path: Path) -> None:
    """Python runs a handler only when the main thread is back from the collective that it waits in."""
    marker = tmp_path / "stop-requested"
    stop = StopFlag().install().share(marker, 1)
    stop._handle = lambda *_: None  # type: ignore[method-assign]
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)  # as if it never came back
    os.kill(os.getpid(), signal.SIGUSR1)
    until(marker.is_file)
    assert stop.reason == "SIGUSR1" and marker.read_text() == "SIGUSR1 to rank 1"


def test_another_signal_is_none_of_ours(tmp_path: Path) -> None:
    seen = threading.Event()
    before = signal.signal(signal.SIGUSR2, lambda *_: seen.set())
    try:
        stop = StopFlag().install().share(tmp_path / "stop-requested", 0)
        os.kill(os.getpid(), signal.SIGUSR2)
        until(seen.is_set)
        assert not stop.is_set
    finally:
        signal.signal(signal.SIGUSR2, before)
