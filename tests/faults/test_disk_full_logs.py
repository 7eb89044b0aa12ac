"""A disk that gets full under metrics, TensorBoard and logs: one sentence, and all earlier lines are good."""

import contextlib
import io
import json
import logging
import sys
import time
from pathlib import Path

import pytest
from shard_jobs import NO_RIGHT, in_a_process, on_a_small_disk

from cogview2.pipeline import fsops
from cogview2.pipeline import logging as our_logging
from cogview2.pipeline.errors import ExitCode, RunDirectoryError
from cogview2.pipeline.training.metrics import MetricsWriter

LIMIT_SECONDS = 10.0


def fill(folder: Path) -> Path:
    """Take all space that is left."""
    ballast = folder / "ballast"
    with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
        while True:
            file.write(bytes(512))
    return ballast


def run_on_a_small_disk(work: object, tmp_path: Path, size: str = "64k") -> tuple[int, str]:
    disk = tmp_path / "disk"
    disk.mkdir()
    code, said = in_a_process(on_a_small_disk(work, disk, size))  # type: ignore[arg-type]
    if code == NO_RIGHT:
        pytest.skip("no right to mount a small disk")
    return code, said


def test_metrics(tmp_path: Path) -> None:
    """The line that does not fit is refused in one sentence, and torn at most; the next one, with space, is whole."""

    def work(folder: Path) -> None:
        path = folder / "metrics.jsonl"
        for step in range(10):
            fsops.append_line(path, json.dumps({"step": step}))
        ballast = fill(folder)
        fitted, begin = 10, time.monotonic()
        with pytest.raises(RunDirectoryError, match=f"cannot write {path}: the disk is full; free space"):
            while time.monotonic() - begin < LIMIT_SECONDS:
                fsops.append_line(path, json.dumps({"step": fitted, "more": "x" * 100}))
                fitted += 1
        ballast.unlink()
        fsops.append_line(path, json.dumps({"step": "last"}))
        whole = []
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                whole.append(json.loads(line)["step"])
        assert whole == [*range(fitted), "last"]

    code, said = run_on_a_small_disk(work, tmp_path)
    assert code == 0, said


def test_tensorboard(tmp_path: Path) -> None:
    """Its thread finds out; the next call says so, with the exit code of a disk that cannot be written."""

    def work(folder: Path) -> None:
        writer = MetricsWriter(folder / "metrics.jsonl", folder / "tensorboard", 0)
        fill(folder)
        begin = time.monotonic()
        while time.monotonic() - begin < LIMIT_SECONDS:
            writer.text(1, "prompt", "x" * 200)
            with fsops.explained(folder):
                writer._board.flush()
        raise AssertionError("nothing was said in time")

    code, said = run_on_a_small_disk(work, tmp_path)
    assert code == ExitCode.CANNOT_WRITE, said
    assert "the disk is full; free space" in said and "\n" not in said


def log_on_a_full_disk(folder: Path) -> tuple[list[str], str]:
    """Log before, on, and after a full disk; return the lines of the file, and what came on stderr."""
    file, sys.stderr = folder / "rank-0.log", io.StringIO()
    our_logging.setup(logging.INFO, 0, file)
    logger = logging.getLogger("cogview2.test")
    for number in range(5):
        logger.info("before %d", number)
    ballast = fill(folder)
    for number in range(200):
        logger.info("meanwhile %d %s", number, "y" * 100)
    ballast.unlink()
    logger.info("after")
    said, sys.stderr = sys.stderr.getvalue(), sys.__stderr__
    return file.read_text().splitlines(), said


def check_log(lines: list[str], said: str) -> None:
    messages = [line.partition("cogview2.test: ")[2] for line in lines]
    assert messages[:5] == [f"before {number}" for number in range(5)]
    assert messages[-1] == "after"
    assert (
        said.count("\n") == 1 and "cannot write" in said and "No space left" in said and "free space" in said
    )


def test_the_log_of_a_rank(tmp_path: Path) -> None:
    """The work goes on: a line that is lost must not end a training of weeks; the first loss is said."""
    code, said = run_on_a_small_disk(lambda folder: check_log(*log_on_a_full_disk(folder)), tmp_path)
    assert code == 0, said


def test_mutant_the_plain_handler_prints_a_traceback_for_each_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(our_logging, "_LogFile", logging.FileHandler)
    code, said = run_on_a_small_disk(lambda folder: check_log(*log_on_a_full_disk(folder)), tmp_path)
    assert code == 1 and "AssertionError" in said


def test_mutant_an_append_that_does_not_look_back(tmp_path: Path) -> None:
    """A torn line and the next one would be one unreadable line, and a good step would be lost."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st')
    with open(path, "a") as file:
        file.write('{"step": 2}\n')
    with pytest.raises(ValueError):
        json.loads(path.read_text().splitlines()[-1])
    path.write_text('{"step": 1}\n{"st')
    fsops.append_line(path, '{"step": 2}')
    assert json.loads(path.read_text().splitlines()[-1]) == {"step": 2}
