"""A checkpoint is committed whole or not at all, verified before it is read, and never silently replaced by step 0."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from cogview2.pipeline import fsops
from cogview2.pipeline.config.training import CheckpointConfig
from cogview2.pipeline.data.sample_plan import DataState, SamplePlan
from cogview2.pipeline.distributed.process import World
from cogview2.pipeline.errors import CheckpointError, LockedError, RunDirectoryError
from cogview2.pipeline.training import checkpoint
from cogview2.pipeline.training.checkpoint import Checkpointer
from cogview2.pipeline.training.state import manifest
from cogview2.pipeline.training.state.files import WEIGHT, Entry, RankState, StateReader
from cogview2.pipeline.training.state.identity import Identity
from cogview2.pipeline.training.state.manifest import (
    MANIFEST,
    Topology,
    UnreadableError,
    committed_steps,
    verify,
)

WORLD = World(0, 1, 0, torch.device("cpu"))
PLAN = SamplePlan([10], 3)
STATE = "rank_00000.safetensors"
ONE_RANK = Topology(1, 1, 0, "float32")


class FakeEngine:
    """Has one parameter with one number; fails on demand."""

    def __init__(self, value: float = 0) -> None:
        self.value = value
        self.broken: Exception | None = None

    def state(self) -> RankState:
        if self.broken is not None:
            raise self.broken
        return RankState({Entry(WEIGHT, 0, "w"): torch.tensor([float(self.value)])}, {"w": (1,)})

    def load(self, reader: StateReader) -> None:
        self.value = reader.whole("w").item()


def checkpointer(
    folder: Path,
    fingerprint: str = "a",
    settings: dict[str, object] | None = None,
    topology: Topology = ONE_RANK,
    fence: object = None,
    **config: object,
) -> Checkpointer:
    identity = Identity(fingerprint, settings or {}, 7)
    return Checkpointer(folder, WORLD, identity, topology, CheckpointConfig(**config), fence)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "stage" / "checkpoints").mkdir(parents=True)
    return tmp_path / "stage" / "checkpoints"


def save(folder: Path, *steps: int, **options: object) -> None:
    for step in steps:
        meters = torch.full((2, 3), float(step))
        writer = checkpointer(folder, **options)
        writer.save(FakeEngine(step * 10), step, DataState.at(PLAN, "data", step * 4), meters)  # type: ignore[arg-type]
        writer.finish()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


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


def _no_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def _flipped_state(folder: Path) -> None:
    flip(folder / STATE)


def _flipped_data_state(folder: Path) -> None:
    flip(folder / "data_state.json")


def _flipped_manifest(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"step": 4', '"step": 5'))


def _lost_file(folder: Path) -> None:
    (folder / "data_state.json").unlink()


def _cut_file(folder: Path) -> None:
    (folder / STATE).write_bytes((folder / STATE).read_bytes()[:-1])


def _additional_file(folder: Path) -> None:
    (folder / "extra.pt").write_bytes(b"?")


def _not_an_object(folder: Path) -> None:
    (folder / MANIFEST).write_text("[]")


DAMAGES = [
    _no_manifest,
    _flipped_state,
    _flipped_data_state,
    _flipped_manifest,
    _lost_file,
    _cut_file,
    _additional_file,
    _not_an_object,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_goes_to_quarantine_and_the_one_before_is_used(folder: Path, damage) -> None:  # noqa: ANN001
    save(folder, 2, 4)
    damage(folder / "step_000000004")
    with pytest.raises(CheckpointError):
        verify(folder / "step_000000004")
    engine = FakeEngine()
    restored = checkpointer(folder).restore(engine)  # type: ignore[arg-type]
    assert restored is not None
    assert (restored.step, engine.value) == (2, 20)
    assert [path.name for path in (folder / "quarantine").iterdir()] == ["step_000000004.0"]
    save(folder, 4)
    assert checkpointer(folder).restore(engine).step == 4  # type: ignore[arg-type,union-attr]


def test_a_renamed_checkpoint_is_not_believed(folder: Path) -> None:
    save(folder, 2)
    shutil.copytree(folder / "step_000000002", folder / "step_000000009")
    restored = checkpointer(folder).restore(FakeEngine())  # type: ignore[arg-type]
    assert restored is not None and restored.step == 2


def test_all_bad_is_refused_now_and_at_the_next_start(folder: Path) -> None:
    save(folder, 2, 4)
    for step in (2, 4):
        flip(folder / f"step_{step:09d}" / STATE)
    for _ in range(2):  # the same command again must not begin at step 0 either
        with pytest.raises(CheckpointError, match="step 4 was committed, but no good checkpoint is left"):
            checkpointer(folder).restore(FakeEngine())  # type: ignore[arg-type]


def test_another_fingerprint_is_refused_and_stays(folder: Path) -> None:
    save(folder, 2)
    with pytest.raises(CheckpointError, match="was trained from other inputs or by another version"):
        checkpointer(folder, fingerprint="b").restore(FakeEngine())  # type: ignore[arg-type]
    assert committed_steps(folder) == [2]


def test_what_differs_is_named_with_both_values(folder: Path) -> None:
    save(folder, 2, settings={"coglm.model.layers": 3, "seed": 1})
    now = checkpointer(folder, fingerprint="b", settings={"coglm.model.layers": 4, "seed": 2})
    with pytest.raises(
        CheckpointError,
        match=r"trained with coglm\.model\.layers = 3, this job has 4 \(and 1 more\); restore the old value",
    ):
        now.restore(FakeEngine())  # type: ignore[arg-type]


def test_another_precision_is_refused_naming_both_topologies(folder: Path) -> None:
    save(folder, 2)
    now = checkpointer(folder, topology=Topology(4, 2, 1, "bfloat16"))
    with pytest.raises(
        CheckpointError,
        match="saved with 1 rank, ZeRO 0, float32, this job has 4 ranks, ZeRO 1, 2 pipe stages, bfloat16",
    ):
        now.restore(FakeEngine())  # type: ignore[arg-type]


def test_another_topology_is_taken_over_with_random_streams_of_its_own(folder: Path) -> None:
    save(folder, 2)
    now = checkpointer(folder, topology=Topology(1, 1, 1, "float32"))
    engine = FakeEngine()
    restored = now.restore(engine)  # type: ignore[arg-type]
    assert restored is not None and engine.value == 20
    drawn = torch.rand(3)
    assert torch.equal(restored.meters, torch.full((2, 3), 2.0))
    now.restore(engine)  # type: ignore[arg-type]
    assert torch.equal(torch.rand(3), drawn)


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


def save_value(folder: Path, step: int, value: float) -> None:
    checkpointer(folder).save(FakeEngine(value), step, DataState.at(PLAN, "data", 16), torch.zeros(2, 3))  # type: ignore[arg-type]


def test_checkpoints_that_vanished_are_not_a_fresh_start(folder: Path) -> None:
    save(folder, 2)
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(
        CheckpointError, match=r"step 2 was committed, but no good checkpoint is left.*to begin at step 0"
    ):
        checkpointer(folder).restore(FakeEngine())  # type: ignore[arg-type]
    (folder.parent / checkpoint.COMMITTED).write_text("{")
    with pytest.raises(CheckpointError, match=r"COMMITTED\.json cannot be read"):
        checkpointer(folder).restore(FakeEngine())  # type: ignore[arg-type]


@pytest.mark.parametrize("text", [None, "", "step_000000009\n", "../other/step_000000001\n", "\0"])
def test_latest_is_for_people_only(folder: Path, text: str | None) -> None:
    save(folder, 2, 4)
    (folder / "latest").unlink()
    if text is not None:
        (folder / "latest").write_text(text)
    restored = checkpointer(folder).restore(FakeEngine())  # type: ignore[arg-type]
    assert restored is not None and restored.step == 4


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
    with pytest.raises(RunDirectoryError, match=r"needs 0\.00 GB, its disk has 0\.00 GB left; free space"):
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


# --- what cannot be read is not damaged ------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["manifest", "content"])
def test_a_disk_that_gives_nothing_now_moves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    save(folder, 2, 4)

    def stale(*_: object) -> None:
        raise OSError(116, "Stale file handle")

    with monkeypatch.context() as broken:
        if where == "content":
            broken.setattr(fsops, "sha256_file", stale)
        else:
            broken.setattr(Path, "read_bytes", stale)
        with pytest.raises(
            UnreadableError, match="cannot be read now \\(Stale file handle\\); look at the disk"
        ) as caught:
            checkpointer(folder).restore(FakeEngine())  # type: ignore[arg-type]
        assert caught.value.exit_code == 73
    restored = checkpointer(folder).restore(FakeEngine())  # type: ignore[arg-type]
    assert restored is not None and restored.step == 4


def test_another_format_is_refused_and_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(folder, 2)
    monkeypatch.setattr(manifest, "FORMAT", 3)
    with pytest.raises(UnreadableError, match="has format 2, this version reads 3"):
        checkpointer(folder).restore(FakeEngine())  # type: ignore[arg-type]
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


def test_falling_back_behind_what_was_committed_is_said(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(folder, 2, 4)
    shutil.rmtree(folder / "step_000000004")
    restored = checkpointer(folder).restore(FakeEngine())  # type: ignore[arg-type]
    assert restored is not None and restored.step == 2
    assert "step 4 was committed, but" in caplog.text


def test_another_jobs_staging_is_not_touched(folder: Path) -> None:
    """A job that was paused wakes up while another one saves the same step."""
    save(folder, 2)
    one, two = checkpointer(folder), checkpointer(folder)
    for writer in (one, two):
        writer._stage(4, FakeEngine(1), torch.zeros(2, 3))  # type: ignore[arg-type]
    assert one._staging(4) != two._staging(4) and one._staging(4).is_dir() and two._staging(4).is_dir()
