"""Signals set a flag; the loops of all stages read it where nothing is lost, and leave together."""

import contextlib
import os
import select
import signal
import threading
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_SHARE_SECONDS = 0.5
_early: list[int] = []


def hold_signals() -> None:
    """Keep the signals that come before a StopFlag is installed; importing torch takes seconds (main thread only)."""
    for number in SIGNALS:
        signal.signal(number, lambda which, _frame: _early.append(which))


class StopFlag:
    """Becomes set by SIGTERM, SIGINT or SIGUSR1; a handler does nothing else, whatever it interrupts."""

    def __init__(self) -> None:
        self._name: str | None = None
        self._reader = -1
        self._told = False

    def install(self) -> "StopFlag":
        """Take over the signals of this process, those that were held included (main thread only)."""
        if threading.current_thread() is threading.main_thread():
            # Python's own handlers run between two of its instructions, so not while a collective waits. The kernel
            # writes the number of the signal here at once, and the thread of `share` reads it.
            self._reader, writer = os.pipe()
            for descriptor in (self._reader, writer):
                os.set_blocking(descriptor, False)
            signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
            for number in SIGNALS:
                signal.signal(number, self._handle)
                signal.siginterrupt(number, False)  # what a library writes meanwhile is not cut short
            for early in _early:
                self._set(early)
        return self

    def share(self, marker: Path, rank: int) -> "StopFlag":
        """Let all ranks of an attempt know when one is asked to stop, in a thread, by the file `marker`.

        Ranks whose work has no collectives could not know otherwise. Training still decides by its own: after the
        same step everywhere.
        """
        thread = threading.Thread(target=self._listen, args=(marker, rank), name="stop", daemon=True)
        thread.start()
        return self

    def _listen(self, marker: Path, rank: int) -> None:
        while not self._told:
            readable = select.select([self._reader] if self._reader >= 0 else [], [], [], _SHARE_SECONDS)[0]
            with contextlib.suppress(BlockingIOError):
                for number in os.read(self._reader, 64) if readable else b"":
                    self._set(number)
            with contextlib.suppress(
                OSError
            ):  # a full disk: the signals of the launcher reach every rank anyway
                self._exchange(marker, rank)

    def _exchange(self, marker: Path, rank: int) -> None:
        if self._name is None:
            with contextlib.suppress(FileNotFoundError):
                self._name = marker.read_text(encoding="utf-8") or None
                self._told = self._name is not None
        else:
            # No fsync and no fault point: it is for those that live now.
            temporary = marker.with_name(f".tmp.{marker.name}.{rank}")
            temporary.write_text(f"{self._name} to rank {rank}", encoding="utf-8")
            os.replace(temporary, marker)
            self._told = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._set(number)

    def _set(self, number: int) -> None:
        if number in SIGNALS and self._name is None:
            self._name = signal.Signals(number).name

    @property
    def is_set(self) -> bool:
        """Whether a stop was asked for."""
        return self._name is not None

    @property
    def reason(self) -> str:
        """Name of the signal, or `SIGTERM to rank 3`, or `another rank's signal` where its rank is not known."""
        return self._name or "another rank's signal"
