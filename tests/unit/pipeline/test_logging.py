"""One line format with the rank, in a file and on stderr, and quiet libraries."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from cogview2.pipeline.logging import setup


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    for handler in root.handlers[:]:
        if handler not in before:
            root.removeHandler(handler)
            handler.close()
    root.setLevel(level)
    logging.captureWarnings(False)


def test_lines_carry_time_rank_and_level(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rank-3.log"
    setup("INFO", rank=3, file=file)
    logging.getLogger("cogview2.x").info("hello %d", 1)
    logging.getLogger("cogview2.x").debug("unseen")
    logging.getLogger("cogview2.x").warning("careful")
    lines = file.read_text().splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ rank 3 INFO cogview2\.x: hello 1", lines[0])
    error = capsys.readouterr().err
    assert "careful" in error and "hello" not in error


def test_a_stage_that_runs_as_main_is_heard(tmp_path: Path) -> None:
    setup("INFO", file=tmp_path / "log")
    logging.getLogger("__main__").info("taken from there")
    assert "taken from there" in (tmp_path / "log").read_text()


def test_libraries_are_quiet_even_with_handlers_of_their_own(tmp_path: Path) -> None:
    library = logging.getLogger("DeepSpeed")
    library.addHandler(logging.NullHandler())
    library.setLevel(logging.DEBUG)
    library.propagate = False
    file = tmp_path / "log"
    setup(file=file)
    library.info("noise")
    library.warning("matters")
    assert [line.split(": ", 1)[1] for line in file.read_text().splitlines()] == ["matters"]


def test_a_second_setup_replaces_the_first(tmp_path: Path) -> None:
    setup(file=tmp_path / "a")
    setup(file=tmp_path / "b")
    logging.getLogger("cogview2").info("once")
    assert (tmp_path / "a").read_text() == ""
    assert len((tmp_path / "b").read_text().splitlines()) == 1
