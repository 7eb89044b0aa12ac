"""The progress line: words, numbers, and no flood where there is no terminal."""

import io
from pathlib import Path

import pytest

from cogview2.launch import progress
from cogview2.launch.progress import ProgressLine, describe, duration, rate
from cogview2.pipeline.stage_dir import Heartbeat, StageDirectory


def beat(step: int = 3, **values: object) -> Heartbeat:
    plain: dict[str, object] = {
        "loss": 1.23456,
        "throughput": 2100.0,
        "unit": "tokens/s",
        "eta_seconds": 75.0,
    }
    return Heartbeat(stage="s", step=step, steps=10, message="", time=0.0, **(plain | values))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.4, "0 s"), (59, "59 s"), (200, "3 min 20 s"), (18720, "5 h 12 min"), (183600, "2 d 3 h")],
)
def test_duration(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.1234, "0.123"), (12.34, "12.3"), (456.7, "457"), (2149, "2.1k"), (45678, "46k")],
)
def test_rate(value: float, expected: str) -> None:
    assert rate(value) == expected


def test_words() -> None:
    assert describe(None) == "starting"
    assert describe(beat()) == "step 3/10  loss 1.235  2.1k tokens/s  eta 1 min 15 s"
    assert describe(beat(step=10, loss=None, throughput=None)) == "step 10/10"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_line_is_rewritten_in_place() -> None:
    stream = Terminal()
    line = ProgressLine("[1/6] s", stream)
    line.update(beat(1))
    line.update(beat(2))
    line.finish("done in 3 s")
    text = stream.getvalue()
    assert text.count("\n") == 1 and text.endswith("[1/6] s  done in 3 s\n")
    assert text.count("\r") == 4 and "step 2/10" in text


def test_elsewhere_at_most_a_line_every_15_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    line = ProgressLine("x", stream)
    for step in range(100):
        now[0] += 1
        line.update(beat(step % 10))
    assert "\r" not in stream.getvalue()
    assert 5 <= stream.getvalue().count("\n") <= 7


def test_a_stage_directory_feeds_it(tmp_path: Path) -> None:
    stage = StageDirectory(tmp_path, "finetune_superres/direct").create()
    stage.write_heartbeat(1, 4, loss=2.0, message="warming up")
    assert describe(stage.heartbeat()) == "direct  step 1/4  loss 2  warming up"
