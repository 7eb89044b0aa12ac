"""What a person sees while a stage runs: one line that says where it is."""

import shutil
import sys
import time
from typing import TextIO

from cogview2.pipeline.stage_dir import Heartbeat

_PLAIN_SECONDS = 15.0
_LABEL_WIDTH = 18


def duration(seconds: float) -> str:
    """Return seconds as people say them: `42 s`, `3 min 20 s`, `5 h 12 min`, `2 d 3 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def rate(value: float) -> str:
    """Return a rate with three digits: `12.3`, `456`, `2.1k`."""
    if value >= 10_000:
        return f"{value / 1000:.0f}k"
    if value >= 1000:
        return f"{value / 1000:.1f}k"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def describe(beat: Heartbeat | None) -> str:
    """Return the words of one progress line, without stage and time."""
    if beat is None:
        return "starting"
    words = [beat.stage.partition("/")[2], f"step {beat.step}/{beat.steps}"]
    if beat.loss is not None:
        words.append(f"loss {beat.loss:.4g}")
    if beat.throughput is not None:
        words.append(f"{rate(beat.throughput)} {beat.unit}")
    if beat.message:
        words.append(beat.message)
    if beat.eta_seconds is not None and beat.step < beat.steps:
        words.append(f"eta {duration(beat.eta_seconds)}")
    return "  ".join(word for word in words if word)


class ProgressLine:
    """The live line of one stage: rewritten in place on a terminal, a line every 15 s elsewhere."""

    def __init__(self, label: str, stream: TextIO | None = None) -> None:
        self.label = label
        self.stream = stream if stream is not None else sys.stdout
        self.terminal = self.stream.isatty()
        self.begin = time.monotonic()
        self._last_time = self.begin
        self._last_text = ""

    @property
    def elapsed(self) -> float:
        """Seconds since the line was made."""
        return time.monotonic() - self.begin

    def update(self, beat: Heartbeat | None) -> None:
        """Show the newest heartbeat."""
        text = describe(beat)
        if self.terminal:
            self._rewrite(f"{self.label}  {text}  {duration(self.elapsed)}")
        elif text != self._last_text and time.monotonic() - self._last_time >= _PLAIN_SECONDS:
            self._last_time = time.monotonic()
            self._last_text = text
            self._write(f"{self.label}  {text}  {duration(self.elapsed)}\n")

    def finish(self, text: str) -> None:
        """Replace the live line by the last word on the stage."""
        if self.terminal:
            self._rewrite("")
            self._write("\r")
        self._write(f"{self.label}  {text}\n")

    def _rewrite(self, text: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        self._write("\r" + text[:width].ljust(width))

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()


def stage_label(index: int, count: int, stage: str) -> str:
    """Return `[2/6] train_vqvae     ` with a fixed width."""
    return f"[{index}/{count}] {stage:<{_LABEL_WIDTH}}"
