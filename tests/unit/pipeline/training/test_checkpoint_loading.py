"""What is loaded: the newest good checkpoint of the same training, and never step 0 in its place."""

import shutil
from pathlib import Path

import pytest
import torch
from small_checkpoints import STATE, FakeEngine, checkpointer, flip, save

from cogview2.pipeline import fsops
from cogview2.pipeline.errors import CheckpointError
from cogview2.pipeline.training import checkpoint
from cogview2.pipeline.training.state import manifest
from cogview2.pipeline.training.state.manifest import (
    MANIFEST,
    Topology,
    UnreadableError,
    committed_steps,
    verify,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "stage" / "checkpoints").mkdir(parents=True)
    return tmp_path / "stage" / "checkpoints"


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


def test_falling_back_behind_what_was_committed_is_said(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(folder, 2, 4)
    shutil.rmtree(folder / "step_000000004")
    restored = checkpointer(folder).restore(FakeEngine())  # type: ignore[arg-type]
    assert restored is not None and restored.step == 2
    assert "step 4 was committed, but" in caplog.text
