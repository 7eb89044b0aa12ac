"""SIGKILL right before each operation of a save and of a start: nothing committed is lost, and nothing is left lying about.

Random kills (test_kills.py) mostly hit where most time is spent; here every operation has its turn, short as it may be.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kill_points
import pytest
from equivalence import Cell
from kill_points import SAVE, Found, Reference, Watch
from killed_training import ENDLESS, Job

from cogview2.pipeline import fsops
from cogview2.pipeline.training.checkpoint import Checkpointer

pytestmark = pytest.mark.distributed
BOTH = pytest.mark.parametrize("asynchronous", [False, True], ids=["waiting", "in the background"])


def _job(path: Path, asynchronous: bool = False, log_every: int = ENDLESS) -> Job:
    return Job(Cell(1, dp=2), path, slow_rank=None, asynchronous=asynchronous, log_every=log_every)


def _judge(found: Found) -> None:
    print(found)
    assert found.is_good, vars(found)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return kill_points.reference(_job(tmp_path_factory.mktemp("undisturbed") / "stage"), 14)


def test_kills_in_a_save(undisturbed: Reference, tmp_path: Path) -> None:
    """In the file of another rank, between commit and marker, and in the deletion of an older checkpoint."""
    names = [("fsync of rank", 1), ("rename of COMMITTED", 0), ("os.remove", 0)]
    points = [undisturbed.where(name, rank) for name, rank in names]
    _judge(kill_points.sweep(undisturbed, _job(tmp_path / "stage"), points, turn=2))


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("turn", [0, 2], ids=["from nothing", "among others"])
def test_kills_at_every_operation_of_a_save(tmp_path: Path, asynchronous: bool, turn: int) -> None:
    """`from nothing`: every attempt dies in its first save, and the first of them have no checkpoint to go back to."""
    whole = kill_points.reference(_job(tmp_path / "undisturbed", asynchronous), 120)
    assert len(whole.points) >= 40
    _judge(kill_points.sweep(whole, _job(tmp_path / "stage", asynchronous), whole.points, turn))


@pytest.mark.slow
@BOTH
def test_kills_at_every_operation_of_a_start(
    undisturbed: Reference, tmp_path: Path, asynchronous: bool
) -> None:
    """Of one that finds left-overs, a damaged newest checkpoint, and logged lines of steps that come again."""
    found = kill_points.sweep_start(undisturbed, _job(tmp_path / "stage", asynchronous, log_every=1), 4)
    assert found.points >= 15
    _judge(found)


def _mark_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write COMMITTED.json before the rename."""
    replace = fsops.replace

    def early(source: Path, target: Path) -> None:
        if target.name.startswith("step_"):
            step = int(target.name.removeprefix("step_"))
            fsops.write_json(target.parents[1] / "COMMITTED.json", {"step": step, "sha256": ""})
        replace(source, target)

    monkeypatch.setattr(fsops, "replace", early)


def _retire_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Delete the oldest checkpoint before the new one is committed."""
    commit = Checkpointer._commit

    def early(self: Checkpointer, *rest: Any) -> None:
        if self.world.is_first:
            for old in sorted(self.folder.glob("step_*"))[:-1]:
                fsops.remove_tree(old)
        commit(self, *rest)

    monkeypatch.setattr(Checkpointer, "_commit", early)


def _delete_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Delete a checkpoint file by file under its final name."""

    def remove_tree(path: Path) -> None:
        fsops.hit("fsops.remove")
        shutil.rmtree(path)

    monkeypatch.setattr(fsops, "remove_tree", remove_tree)


@pytest.mark.parametrize(
    ("weaken", "where", "seen"),
    [
        pytest.param(_mark_first, "rename of step", "COMMITTED.json names step 3"),
        pytest.param(_retire_first, "rename of step", "only the checkpoints [2]", marks=pytest.mark.slow),
        pytest.param(_delete_in_place, "os.rmdir", "has no MANIFEST", marks=pytest.mark.slow),
    ],
)
def test_a_weaker_commit_is_seen(
    weaken: Callable[[pytest.MonkeyPatch], None],
    where: str,
    seen: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Right before the operation `where` of the third save of a weakened checkpointer the files are not as they ought to be."""
    weaken(monkeypatch)
    point = kill_points.reference(_job(tmp_path / "undisturbed"), 3).where(where)
    job = _job(tmp_path / "stage")
    kill_points.kill_at(job, point, Watch(job.notes, SAVE, 2))
    (words,) = kill_points.broken(job.folder, 2)
    assert seen in words


@pytest.mark.slow
def test_a_start_that_does_not_tidy_up_is_seen(
    undisturbed: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpointer, "_clean", lambda self: None)
    points = [undisturbed.where("fsync of data_state")]
    found = kill_points.sweep(undisturbed, _job(tmp_path / "stage"), points, turn=0)
    assert len(found.foreign) == 1 and found.foreign[0].startswith(".staging.") and not found.lost
