"""What is saved: whole or not at all, at once or in the background, and how long it is kept."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from small_checkpoints import PLAN, STATE, FakeEngine, checkpointer, flip, save, save_value

from cogview2.pipeline import fsops
from cogview2.pipeline.data.sample_plan import DataState
from cogview2.pipeline.errors import CheckpointError, LockedError, RunDirectoryError
from cogview2.pipeline.training.state.files import WEIGHT, Entry, RankState, StateReader
from cogview2.pipeline.training.state.manifest import MANIFEST, committed_steps


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "stage" / "checkpoints").mkdir(parents=True)
    return tmp_path / "stage" / "checkpoints"


def test_restore_gives_back_everything_and_the_random_state(folder: Path) -> None:
    torch.manual_seed(5)
    save(folder, 2)
    expected = torch.rand(3)
    torch.manual_seed(99)
    engine = FakeEngine()
    restored = checkpointer(folder).restore(engine)  # type: ignore[arg-type]
    assert restored is not None
    assert (restored.step, restored.data, engine.value) == (2, DataState.at(PLAN, "data", 8), 20)
    assert torch.equal(restored.meters, torch.full((2, 3), 2.0))
    assert torch.equal(torch.rand(3), expected)


def test_nothing_there_is_a_fresh_start(folder: Path) -> None:
    assert checkpointer(folder).restore(FakeEngine()) is None  # type: ignore[arg-type]


def test_checkpoints_hold_no_script(folder: Path) -> None:
    save(folder, 2)
    assert not list(folder.rglob("*.py"))
    assert (folder / "latest").read_text() == "step_000000002\n"


def test_keep_last_removes_the_oldest(folder: Path) -> None:
    save(folder, 1, 2, 3, 4, keep_last=3)
    assert committed_steps(folder) == [2, 3, 4]
    assert not list(folder.glob(".*"))


def test_saving_a_step_again_changes_nothing(folder: Path) -> None:
    save(folder, 2)
    before = (folder / "step_000000002" / MANIFEST).read_bytes()
    checkpointer(folder).save(FakeEngine(7), 2, DataState.at(PLAN, "data", 8), torch.zeros(2, 3))  # type: ignore[arg-type]
    assert (folder / "step_000000002" / MANIFEST).read_bytes() == before


def test_leftovers_of_a_killed_save_are_removed_and_not_used(folder: Path) -> None:
    save(folder, 2)
    for name in (".staging.step_000000004", ".trash.step_000000001.ab12"):
        shutil.copytree(folder / "step_000000002", folder / name)
    restored = checkpointer(folder).restore(FakeEngine())  # type: ignore[arg-type]
    assert restored is not None and restored.step == 2
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_000000002"]


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError(28, "No space left on device"), RunDirectoryError, "No space left"),
        (CheckpointError("a number is not finite"), CheckpointError, "not finite"),
    ],
)
def test_a_failed_save_leaves_the_one_before(
    folder: Path, error: Exception, kind: type[Exception], words: str
) -> None:
    save(folder, 2)
    broken = FakeEngine(1)
    broken.broken = error
    with pytest.raises(kind, match=words):
        checkpointer(folder).save(broken, 4, DataState.at(PLAN, "data", 16), torch.zeros(2, 3))  # type: ignore[arg-type]
    restored = checkpointer(folder).restore(FakeEngine())  # type: ignore[arg-type]
    assert restored is not None and restored.step == 2


def test_a_state_that_is_not_finite_is_never_committed(folder: Path) -> None:
    save(folder, 2)
    with pytest.raises(
        CheckpointError, match=r"state/weight/0/w holds numbers that are not finite.*is untouched"
    ):
        save_value(folder, 4, float("nan"))
    assert committed_steps(folder) == [2]


def test_a_bad_checkpoint_of_the_step_that_is_saved_is_put_aside_first(folder: Path) -> None:
    save(folder, 2, 4)
    flip(folder / "step_000000004" / STATE)
    save_value(folder, 4, 41)
    engine = FakeEngine()
    restored = checkpointer(folder).restore(engine)  # type: ignore[arg-type]
    assert restored is not None and (restored.step, engine.value) == (4, 41)
    assert (folder / "quarantine" / "step_000000004.0").is_dir()


def test_every_mth_is_kept(folder: Path) -> None:
    save(folder, *range(1, 9), keep_last=2, keep_every=3)
    assert committed_steps(folder) == [3, 6, 7, 8]


def test_too_little_space_is_said_before_anything_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(folder, 2)
    real = os.statvfs(folder)

    class Full:
        f_bavail, f_frsize = 1, real.f_frsize

    monkeypatch.setattr(fsops.os, "statvfs", lambda _: Full)
    with pytest.raises(RunDirectoryError, match=r"needs [\d.]+ k?B, its disk has 4\.1 kB left; free space"):
        save(folder, 4)
    assert not list(folder.glob(".staging*"))


class Lost:
    """A lock that somebody took over."""

    token = 3

    def check(self) -> None:
        raise LockedError("another job has it")


def test_a_job_whose_lock_was_taken_over_commits_nothing(folder: Path) -> None:
    save(folder, 2)
    with pytest.raises(LockedError, match="another job has it"):
        save(folder, 4, fence=Lost())
    assert committed_steps(folder) == [2]


def test_what_fails_after_the_commit_does_not_undo_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(folder, 1, 2)
    real = fsops.discard
    monkeypatch.setattr(fsops, "discard", lambda path: (_ for _ in ()).throw(OSError(39, "not empty")))
    save(folder, 3)
    assert committed_steps(folder) == [2, 3]
    assert checkpointer(folder).restore(FakeEngine()).step == 3  # type: ignore[arg-type,union-attr]
    monkeypatch.setattr(fsops, "discard", real)
    checkpointer(folder).restore(FakeEngine())  # type: ignore[arg-type]
    assert not list(folder.glob(".*"))


def test_another_jobs_staging_is_not_touched(folder: Path) -> None:
    """A job that was paused wakes up while another one saves the same step."""
    save(folder, 2)
    one, two = checkpointer(folder), checkpointer(folder)
    for writer in (one, two):
        writer._stage(4, FakeEngine(1), torch.zeros(2, 3))  # type: ignore[arg-type]
    assert one._staging(4) != two._staging(4) and one._staging(4).is_dir() and two._staging(4).is_dir()


# --- in the background ------------------------------------------------------------------------------------------


def test_a_state_is_copied_and_committed_later(folder: Path) -> None:
    writer, engine = checkpointer(folder, asynchronous=True), FakeEngine(1)
    assert not writer.ready
    writer.save(engine, 2, DataState.at(PLAN, "data", 8), torch.zeros(2, 3))  # type: ignore[arg-type]
    engine.value = 5
    assert committed_steps(folder) == []
    writer.save(engine, 4, DataState.at(PLAN, "data", 16), torch.zeros(2, 3))  # type: ignore[arg-type]
    assert committed_steps(folder) == [2]
    writer.finish()
    assert committed_steps(folder) == [2, 4] and not writer.ready
    assert StateReader(folder / "step_000000002").whole("w").item() == 1


def test_the_copy_is_not_what_training_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.ones(4)

    class InPlace(FakeEngine):
        def state(self) -> RankState:
            return RankState({Entry(WEIGHT, 0, "w"): weight}, {"w": (4,)})

    writer = checkpointer(folder, asynchronous=True)
    writer.save(InPlace(), 2, DataState.at(PLAN, "data", 8), torch.zeros(2, 3))  # type: ignore[arg-type]
    weight.fill_(9)
    writer.finish()
    assert StateReader(folder / "step_000000002").whole("w").tolist() == [1, 1, 1, 1]


def test_going_back_forgets_what_is_being_written(folder: Path) -> None:
    save(folder, 2)
    writer = checkpointer(folder, asynchronous=True)
    writer.save(FakeEngine(1), 4, DataState.at(PLAN, "data", 16), torch.zeros(2, 3))  # type: ignore[arg-type]
    restored = writer.restore(FakeEngine())  # type: ignore[arg-type]
    assert restored is not None and restored.step == 2
    writer.finish()
    assert committed_steps(folder) == [2] and not list(folder.glob(".staging*"))


def test_an_error_in_the_background_is_raised_by_finish(folder: Path) -> None:
    writer = checkpointer(folder, asynchronous=True)
    writer.save(FakeEngine(float("inf")), 2, DataState.at(PLAN, "data", 8), torch.zeros(2, 3))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="not finite"):
        writer.finish()
