"""What a person sees while a stage runs: one line that says where it is."""

import shutil
import sys
import time
from typing import TextIO

from cogview2.pipeline.stage_dir import Heartbeat

_PLAIN_SECONDS = 15.0
_LABEL_WIDTH = 18
_SHOWN_WAIT = 0.01
"""A smaller share of waiting for data is not worth a word."""


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


def meter_words(beat: Heartbeat) -> list[str]:
    """Return what is known beyond the rate: `24 images/s`, `410 TFLOP/s`, `41% MFU`, `35% waiting for data`, ..."""
    meters, words = beat.meters, []
    if "images_per_second" in meters and beat.unit != "images/s":
        words.append(f"{rate(meters['images_per_second'])} images/s")
    if "model_tflops" in meters:
        words.append(f"{rate(meters['model_tflops'])} TFLOP/s")
    if "mfu" in meters:
        words.append(f"{meters['mfu']:.0%} MFU")
    if meters.get("data_wait", 0.0) >= _SHOWN_WAIT:
        words.append(f"{meters['data_wait']:.0%} waiting for data")
    if beat.slowest is not None and beat.step < beat.steps:  # at the end nobody waits any more
        ratio = f" ({meters['slowest_ratio']:.3g}x)" if "slowest_ratio" in meters else ""
        words.append(f"slowest: {beat.slowest}{ratio}")
    return words


def describe(beat: Heartbeat | None, cascade: str = "", width: int | None = None) -> str:
    """Return the words of one progress line, without stage and time.

    Args:
        beat: the newest heartbeat.
        cascade: when the whole cascade will be done, in words.
        width: columns there are; words are left out, the least important first, until the line fits.
    """
    if beat is None:
        return "starting"
    words = [beat.stage.partition("/")[2], f"step {beat.step}/{beat.steps}"]
    if beat.loss is not None:
        words.append(f"loss {beat.loss:.4g}")
    if beat.throughput is not None:
        words.append(f"{rate(beat.throughput)} {beat.unit}")
    least = meter_words(beat)
    # In this order: the wait for data and the slowest rank ask for something to be done.
    expendable = [*least, cascade]
    words += least
    if beat.message:
        words.append(beat.message)
    if beat.eta_seconds is not None and beat.step < beat.steps:
        words += [f"eta {duration(beat.eta_seconds)}", cascade]
    words = [word for word in words if word]
    for word in expendable:
        if width is not None and word in words and len("  ".join(words)) > width:
            words.remove(word)
    return "  ".join(words)


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

    def update(self, beat: Heartbeat | None, cascade: str = "") -> None:
        """Show the newest heartbeat, and when the whole cascade will be done."""
        if self.terminal:
            spent = duration(self.elapsed)
            width = shutil.get_terminal_size().columns - 1 - len(self.label) - len(spent) - 4
            self._rewrite(f"{self.label}  {describe(beat, cascade, width)}  {spent}")
            return
        text = describe(beat, cascade)
        if text != self._last_text and time.monotonic() - self._last_time >= _PLAIN_SECONDS:
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
