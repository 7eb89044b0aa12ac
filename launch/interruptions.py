"""Signals that reach the driver while none of its jobs runs: between two stages, while it looks at hosts."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from cogview2.launch.signals import taken_over


class Interruptions:
    """Remembers that a stop was asked for; a running JobGroup takes the signals over for its time."""

    def __init__(self) -> None:
        self.asked = False

    @contextlib.contextmanager
    def heeded(self) -> Iterator[None]:
        """Take over the signals that stop a job (main thread only); a second Ctrl-C ends what goes on at once."""

        def handle(number: int, _frame: FrameType | None) -> None:
            if self.asked and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.asked = True

        with taken_over(handle):
            yield
