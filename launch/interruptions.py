"""Signals that reach the driver while none of its jobs runs: between two stages, while it looks at hosts."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from cogview2.launch.process import STOP_SIGNALS


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

        # nohup ignores SIGHUP, and means it.
        heeded = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, handle) for number in heeded}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
