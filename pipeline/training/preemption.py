"""Signals set a flag; the training loop reads it at each step boundary, on all ranks together."""

import signal
import threading
from types import FrameType


class StopFlag:
    """Becomes set by SIGTERM, SIGINT or SIGUSR1; a handler does nothing else, whatever it interrupts."""

    def __init__(self) -> None:
        self._name: str | None = None

    def install(self) -> "StopFlag":
        """Take over the signals of this process (main thread only)."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._name = signal.Signals(number).name

    @property
    def is_set(self) -> bool:
        """Whether a stop was asked for."""
        return self._name is not None

    @property
    def reason(self) -> str:
        """Name of the signal, or `another rank`, when only that one was told."""
        return self._name or "another rank's signal"
