"""The progress line: words, numbers, and no flood where there is no terminal."""

import io
import json
import os
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


METERS = {
    "images_per_second": 24.0,
    "model_tflops": 412.3,
    "mfu": 0.413,
    "data_wait": 0.352,
    "slowest_ratio": 1.42,
}


def test_words_of_the_meters() -> None:
    shown = describe(beat(meters=METERS, slowest="rank 3 on node2"), "cascade eta ~5 h 0 min")
    assert shown == (
        "step 3/10  loss 1.235  2.1k tokens/s  24 images/s  412 TFLOP/s  41% MFU  35% waiting for data  "
        "slowest: rank 3 on node2 (1.42x)  eta 1 min 15 s  cascade eta ~5 h 0 min"
    )
    at_the_end = describe(beat(step=10, meters=METERS, slowest="rank 3 on node2"))
    assert "41% MFU" in at_the_end and "slowest" not in at_the_end
    # What is not known, does not matter, or stands there already, takes no room.
    quiet = beat(meters={"images_per_second": 24.0, "data_wait": 0.004}, unit="images/s")
    assert describe(quiet) == "step 3/10  loss 1.235  2.1k images/s  eta 1 min 15 s"


def test_a_narrow_line_keeps_what_matters_most() -> None:
    whole = beat(meters=METERS, slowest="rank 3 on node2")
    cascade = "cascade eta ~5 h 0 min"
    least = "step 3/10  loss 1.235  2.1k tokens/s  eta 1 min 15 s"
    optional = ["images/s", "TFLOP/s", "MFU", "waiting", "slowest", "cascade"]
    gone: list[str] = []
    for width in range(len(describe(whole, cascade)), 0, -1):
        shown = describe(whole, cascade, width)
        assert len(shown) <= width or shown == least
        gone += [word for word in optional if word not in shown and word not in gone]
    assert gone == optional


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
    stage.write_heartbeat(2, 4, meters={"mfu": 0.5, "data_wait": float("nan")}, slowest="rank 1")
    found = stage.heartbeat()
    assert found is not None and found.meters == {"mfu": 0.5} and found.slowest == "rank 1"


def test_a_heartbeat_from_before_there_were_meters_is_read(tmp_path: Path) -> None:
    stage = StageDirectory(tmp_path, "train_vqvae").create()
    stage.write_heartbeat(1, 4, loss=2.0)
    content = json.loads(stage.heartbeat_path.read_text())
    for name in ("meters", "slowest"):
        del content[name]
    stage.heartbeat_path.write_text(json.dumps(content))
    assert describe(stage.heartbeat()) == "step 1/4  loss 2"


def test_a_terminal_line_fits_its_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.shutil, "get_terminal_size", lambda: os.terminal_size((100, 24)))
    stream = Terminal()
    line = ProgressLine("[1/6] train_vqvae     ", stream)
    line.update(beat(meters=METERS, slowest="rank 3 on node2"), "cascade eta ~5 h 0 min")
    shown = stream.getvalue()
    assert len(shown.removeprefix("\r")) == 99 and shown.rstrip().endswith("eta 1 min 15 s  0 s")
