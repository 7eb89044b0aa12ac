"""Fault points fail where they are told to, are inert otherwise, and the recorder sees what reached the disk."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cogview2.pipeline import fsops
from cogview2.pipeline.errors import RunDirectoryError

WRITE = "import pathlib, sys; from cogview2.pipeline import fsops; fsops.write_text(pathlib.Path(sys.argv[1]), 'new')"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test reads its own environment."""
    monkeypatch.delenv("COGVIEW2_FAULT", raising=False)
    fsops._forget_faults()
    yield
    monkeypatch.undo()
    fsops._forget_faults()


def ask(monkeypatch: pytest.MonkeyPatch, faults: str) -> None:
    monkeypatch.setenv("COGVIEW2_TEST_FAULTS", "1")
    monkeypatch.setenv("COGVIEW2_FAULT", faults)
    fsops._forget_faults()


def write_in_a_process(path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("COGVIEW2_")}
    return subprocess.run(
        [sys.executable, "-c", WRITE, str(path)],
        env=plain | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_without_the_switch_nothing_happens(tmp_path: Path) -> None:
    """The variable alone, left over in a shell, must never break a run."""
    done = write_in_a_process(tmp_path / "a", COGVIEW2_FAULT="fsops.rename:kill")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a").read_text() == "new"
    for value in ("0", "", "true"):
        done = write_in_a_process(
            tmp_path / "b", COGVIEW2_FAULT="fsops.rename:kill", COGVIEW2_TEST_FAULTS=value
        )
        assert done.returncode == 0, done.stderr


def test_with_the_switch_the_process_is_killed_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    done = write_in_a_process(tmp_path / "a", COGVIEW2_FAULT="fsops.rename:kill", COGVIEW2_TEST_FAULTS="1")
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "a").read_text() == "old"
    left = [entry.name for entry in tmp_path.iterdir() if entry.name != "a"]
    assert len(left) == 1 and left[0].startswith(".tmp.a.")
    done = write_in_a_process(tmp_path / "a", COGVIEW2_FAULT="fsops.fsync_dir:kill", COGVIEW2_TEST_FAULTS="1")
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "a").read_text() == "new"


@pytest.mark.parametrize(
    ("action", "remedy"), [("enospc", "disk is full"), ("erofs", "read-only"), ("exc", "input or output")]
)
@pytest.mark.parametrize("point", ["write", "fsync", "rename"])
def test_errors_keep_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, action: str, remedy: str
) -> None:
    fsops.write_text(tmp_path / "a", "old")
    ask(monkeypatch, f"fsops.{point}:{action}")
    with pytest.raises(RunDirectoryError, match=f"cannot write {tmp_path / 'a'}.*{remedy}"):
        fsops.write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
    fsops.write_text(tmp_path / "a", "new")  # only the first hit
    assert (tmp_path / "a").read_text() == "new"


def test_rank_number_and_several_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    ask(monkeypatch, "train.step:exc:rank=1:n=2;train.step:enospc:n=4;other:exc:n=*")
    numbers: list[int | None] = []
    for rank in ("0", "1", "1", "1"):  # one count of hits, the rank of the moment
        monkeypatch.setenv("RANK", rank)
        try:
            fsops.hit("train.step")
            numbers.append(None)
        except OSError as error:
            numbers.append(error.errno)
    assert numbers == [None, errno.EIO, None, errno.ENOSPC]
    for _ in range(3):
        with pytest.raises(OSError, match="fault point other"):
            fsops.hit("other")
    fsops.hit("a name nobody asked for")


def test_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    ask(monkeypatch, "p:delay=0.05")
    before = time.monotonic()
    fsops.hit("p")
    assert time.monotonic() - before >= 0.05


@pytest.mark.parametrize("text", ["p", "p:explode", ":kill", "p:kill:host=a", "p:kill:n=x"])
def test_a_fault_that_means_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    ask(monkeypatch, text)
    with pytest.raises(ValueError):
        fsops.hit("p")


def test_a_forked_process_reads_its_own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    fsops.hit("p")  # read here: no faults
    child = os.fork()
    if child == 0:
        os.environ |= {"COGVIEW2_TEST_FAULTS": "1", "COGVIEW2_FAULT": "p:kill"}
        fsops.hit("p")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    fsops.hit("p")


def test_the_recorder_sees_each_operation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str, str | None]] = []

    def record(operation: str, path: Path, target: Path | None) -> None:
        name = ".tmp" if path.name.startswith(".tmp.") else path.name.split(".trash")[-1]
        seen.append((operation, name, target and target.name.partition(".trash")[0]))

    folder = tmp_path / "x" / "y"
    monkeypatch.setattr(fsops, "recorder", record)
    fsops.make_dirs(folder)
    assert seen == [
        ("mkdir", "x", None),
        ("fsync_dir", tmp_path.name, None),
        ("mkdir", "y", None),
        ("fsync_dir", "x", None),
    ]
    seen.clear()
    fsops.write_text(folder / "a", "1")
    wrote = [("create", ".tmp", None), ("fsync", ".tmp", None), ("rename", ".tmp", "a")]
    assert seen == [*wrote, ("fsync_dir", "y", None)]
    seen.clear()
    with fsops.staged(folder / "a") as temporary:
        temporary.write_text("2")
    assert seen == [*wrote, ("fsync_dir", "y", None)]
    seen.clear()
    fsops.write_text(folder / "a", "3", durable=False)
    assert seen == [wrote[0], wrote[2]]
    seen.clear()
    fsops.append_line(folder / "log", "{}")
    fsops.remove_tree(folder)
    assert [entry[0] for entry in seen] == ["append", "rename", "fsync_dir", "unlink"]
    assert seen[1][:2] == ("rename", "y")


def test_only_what_succeeded_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(fsops, "recorder", lambda operation, path, target: seen.append(operation))
    ask(monkeypatch, "fsops.rename:enospc")
    with pytest.raises(RunDirectoryError):
        fsops.write_text(tmp_path / "a", "x")
    assert seen == ["create", "fsync", "unlink"]


def test_a_full_disk_takes_a_part_of_a_line_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:3]))
    fsops.append_line(tmp_path / "log", '{"step": 1}')
    assert (tmp_path / "log").read_text() == '{"step": 1}\n'


def test_discard_takes_no_results(tmp_path: Path) -> None:
    for name in (".staging.step_1", ".trash.x"):
        (tmp_path / name / "ds").mkdir(parents=True)
        fsops.discard(tmp_path / name)
    (tmp_path / ".tmp.a").write_text("")
    fsops.discard(tmp_path / ".tmp.a")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "step_1").mkdir()
    with pytest.raises(ValueError, match="remove_tree"):
        fsops.discard(tmp_path / "step_1")
    assert (tmp_path / "step_1").is_dir()


def test_parents_get_the_mode_of_a_run(tmp_path: Path) -> None:
    fsops.make_dirs(tmp_path / "runs" / "a" / "stages")
    for folder in ("runs", "runs/a", "runs/a/stages"):
        assert (tmp_path / folder).stat().st_mode & 0o777 == fsops.DIRECTORY_MODE
