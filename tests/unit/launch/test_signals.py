"""Signals are taken over for a while and given back; what is ignored stays ignored."""

import os
import signal
from collections.abc import Iterator

import pytest

from cogview2.launch.signals import STOP_SIGNALS, taken_over


@pytest.fixture(autouse=True)
def handlers() -> Iterator[dict[int, object]]:
    """Put back what the tests replace."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield dict(before)
    for number, handler in before.items():
        signal.signal(number, handler)


def test_nohup_is_heeded(handlers: dict[int, object]) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with taken_over(lambda *_: None):
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is not handlers[signal.SIGTERM]
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) is handlers[signal.SIGTERM]


def test_every_stop_signal_is_answered_and_given_back_after_an_error(handlers: dict[int, object]) -> None:
    seen: list[int] = []
    with pytest.raises(ZeroDivisionError), taken_over(lambda number, _: seen.append(number)):
        for number in STOP_SIGNALS:
            os.kill(os.getpid(), number)
        raise ZeroDivisionError
    assert seen == [*STOP_SIGNALS]
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == handlers


def test_only_the_named_signals_are_taken_over(handlers: dict[int, object]) -> None:
    with taken_over(lambda *_: None, [signal.SIGUSR1]):
        changed = [number for number in STOP_SIGNALS if signal.getsignal(number) is not handlers[number]]
    assert changed == [signal.SIGUSR1]
