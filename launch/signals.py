"""The signals that ask a job to save and leave: taken over for a while, then given back."""

import contextlib
import signal
from collections.abc import Callable, Collection, Iterator
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""What asks a job to save and leave: a person, a closed terminal, a scheduler."""


@contextlib.contextmanager
def taken_over(
    handle: Callable[[int, FrameType | None], None], numbers: Collection[signal.Signals] = STOP_SIGNALS
) -> Iterator[None]:
    """Let `handle` answer signals inside the block (main thread only); those that are ignored stay ignored."""
    # nohup ignores SIGHUP, and means it.
    heeded = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
