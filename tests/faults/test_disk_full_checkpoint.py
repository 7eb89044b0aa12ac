"""The disk fails while a checkpoint is written: all ranks say so in one sentence, soon, and nothing that was there is lost."""

import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import killed_training
import pytest
from equivalence import Cell
from killed_training import ENDLESS, Job

from cogview2.pipeline import fsops
from cogview2.pipeline.training.state.manifest import committed_steps, folder_name, verify

pytestmark = pytest.mark.distributed
SECONDS = 10.0
CELL = Cell(1, dp=2)


def _saves(stage: Path) -> list[int]:
    return committed_steps(stage / "checkpoints")


def _fails(job: Job, words: str) -> None:
    """Start the job, and see how it ends."""
    with killed_training.started(job) as (ranks, phases):
        deadline = time.monotonic() + 120
        while not phases[0].value.startswith(b"save"):
            assert time.monotonic() < deadline and ranks[0].is_alive(), killed_training.failures(job)
            time.sleep(0.001)
        begin = time.monotonic()
        for process in ranks:
            process.join(60)
            assert process.exitcode == 1
        assert time.monotonic() - begin < SECONDS
    said = [(job.notes / f"refused-{rank}").read_text() for rank in range(CELL.ranks)]
    assert said[0] == said[1] and said[0].count("\n") == 1, said
    assert words in said[0] and "the checkpoint before is untouched" in said[0]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("fsops.write:enospc:rank=1", "rank 1 could not write its part of step 6: cannot write"),
        ("fsops.fsync:enospc:rank=1", "the disk is full; free space"),
        ("fsops.rename:erofs:rank=1", "the file system is read-only"),
        ("checkpoint.before_rename:enospc:rank=0", "rank 0 could not commit step 6: "),
        ("fsops.fsync_dir:exc:rank=1:n=*", "the disk reports an input or output error"),
    ],
)
def test_a_disk_that_fails_while_saving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, words: str
) -> None:
    stage = tmp_path / "stage"
    killed_training.run_on(Job(CELL, stage, every=ENDLESS, until=4))
    assert _saves(stage) == [4]
    monkeypatch.setenv("COGVIEW2_TEST_FAULTS", "1")
    monkeypatch.setenv("COGVIEW2_FAULT", fault)
    _fails(Job(CELL, stage, every=ENDLESS, until=6), words)
    assert _saves(stage) == [4] and verify(stage / "checkpoints" / folder_name(4))
    assert not list((stage / "checkpoints").glob(".*")), "what was begun takes no space"
    monkeypatch.delenv("COGVIEW2_FAULT")
    killed_training.run_on(Job(CELL, stage, every=ENDLESS, until=6))
    assert _saves(stage) == [4, 6]
    assert killed_training.seen(Job(CELL, stage)).resumed == [0, 4, 4]


def test_a_limit_on_the_size_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's own refusal, in the middle of a file."""
    stage = tmp_path / "stage"
    killed_training.run_on(Job(CELL, stage, every=ENDLESS, until=4))
    real: Callable[[Path, int], None] = fsops.require_space

    def limited(folder: Path, size: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
        real(folder, size)

    monkeypatch.setattr(fsops, "require_space", limited)
    _fails(Job(CELL, stage, every=ENDLESS, until=6), "the file is larger than this process may write")
    assert _saves(stage) == [4] and verify(stage / "checkpoints" / folder_name(4))


def test_too_little_space_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = tmp_path / "stage"
    monkeypatch.setattr(fsops.os, "statvfs", lambda _: type("Full", (), {"f_bavail": 1, "f_frsize": 512}))
    job = Job(CELL, stage, every=ENDLESS, until=2)
    with pytest.raises(AssertionError, match="its disk has 512 B left; free space"):
        killed_training.run_on(job)
    assert _saves(stage) == []
