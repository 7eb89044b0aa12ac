import json
import shutil
from pathlib import Path

import pytest
import torch

from cogview2.pipeline.data.sample_plan import DataState, SamplePlan
from cogview2.pipeline.distributed.process import World
from cogview2.pipeline.errors import CheckpointError
from cogview2.pipeline.training.checkpoint import MANIFEST, Checkpointer, verify

WORLD = World(0, 1, 0, torch.device("cpu"))
PLAN = SamplePlan([10], 3)


class FakeEngine:
    """Saves one number, as an engine saves its state; fails on demand."""

    def __init__(self, value: int = 0) -> None:
        self.value = value
        self.broken = False

    def save(self, folder: str, step: int) -> None:
        (Path(folder) / "ds").mkdir()
        (Path(folder) / "ds" / "state.json").write_text(json.dumps(self.value))
        (Path(folder) / "zero_to_fp32.py").write_text("print('never run')")
        if self.broken:
            raise OSError(28, "No space left on device")

    def load(self, folder: str) -> None:
        self.value = json.loads((Path(folder) / "ds" / "state.json").read_text())


def checkpointer(
    folder: Path, fingerprint: str = "a", keep_last: int = 2, world: World = WORLD
) -> Checkpointer:
    return Checkpointer(folder, world, fingerprint, keep_last)


def save(folder: Path, *steps: int, **options: object) -> None:
    for step in steps:
        meters = torch.full((2, 3), float(step))
        checkpointer(folder, **options).save(
            FakeEngine(step * 10), step, DataState.at(PLAN, "data", step * 4), meters
        )  # type: ignore[arg-type]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_restore_gives_back_everything_and_the_random_state(tmp_path: Path) -> None:
    torch.manual_seed(5)
    save(tmp_path, 2)
    expected = torch.rand(3)
    torch.manual_seed(99)
    engine = FakeEngine()
    restored = checkpointer(tmp_path).restore(engine)  # type: ignore[arg-type]
    assert restored is not None
    assert (restored.step, restored.data, engine.value) == (2, DataState.at(PLAN, "data", 8), 20)
    assert torch.equal(restored.meters, torch.full((2, 3), 2.0))
    assert torch.equal(torch.rand(3), expected)


def test_nothing_there_is_a_fresh_start(tmp_path: Path) -> None:
    assert checkpointer(tmp_path).restore(FakeEngine()) is None  # type: ignore[arg-type]


def test_checkpoints_hold_no_script(tmp_path: Path) -> None:
    save(tmp_path, 2)
    assert not list(tmp_path.rglob("*.py"))
    assert (tmp_path / "latest").read_text() == "step_000000002\n"


def test_keep_last_removes_the_oldest(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 4, keep_last=3)
    assert checkpointer(tmp_path).steps() == [2, 3, 4]
    assert not list(tmp_path.glob(".*"))


def test_saving_a_step_again_changes_nothing(tmp_path: Path) -> None:
    save(tmp_path, 2)
    before = (tmp_path / "step_000000002" / MANIFEST).read_bytes()
    checkpointer(tmp_path).save(FakeEngine(7), 2, DataState.at(PLAN, "data", 8), torch.zeros(2, 3))  # type: ignore[arg-type]
    assert (tmp_path / "step_000000002" / MANIFEST).read_bytes() == before


def test_leftovers_of_a_killed_save_are_removed_and_not_used(tmp_path: Path) -> None:
    save(tmp_path, 2)
    for name in (".staging.step_000000004", ".trash.step_000000001.ab12"):
        shutil.copytree(tmp_path / "step_000000002", tmp_path / name)
    restored = checkpointer(tmp_path).restore(FakeEngine())  # type: ignore[arg-type]
    assert restored is not None and restored.step == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000000002"]


def _no_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def _flipped_state(folder: Path) -> None:
    flip(folder / "ds" / "state.json")


def _flipped_random_state(folder: Path) -> None:
    flip(folder / "rng_rank0.pt")


def _flipped_manifest(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"step": 4', '"step": 5'))


def _lost_file(folder: Path) -> None:
    (folder / "data_state.json").unlink()


def _cut_file(folder: Path) -> None:
    (folder / "rng_rank0.pt").write_bytes((folder / "rng_rank0.pt").read_bytes()[:-1])


def _additional_file(folder: Path) -> None:
    (folder / "ds" / "extra.pt").write_bytes(b"?")


def _not_an_object(folder: Path) -> None:
    (folder / MANIFEST).write_text("[]")


DAMAGES = [
    _no_manifest,
    _flipped_state,
    _flipped_random_state,
    _flipped_manifest,
    _lost_file,
    _cut_file,
    _additional_file,
    _not_an_object,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_goes_to_quarantine_and_the_one_before_is_used(tmp_path: Path, damage) -> None:  # noqa: ANN001
    save(tmp_path, 2, 4)
    damage(tmp_path / "step_000000004")
    with pytest.raises(CheckpointError):
        verify(tmp_path / "step_000000004")
    engine = FakeEngine()
    restored = checkpointer(tmp_path).restore(engine)  # type: ignore[arg-type]
    assert restored is not None
    assert (restored.step, engine.value) == (2, 20)
    assert [path.name for path in (tmp_path / "quarantine").iterdir()] == ["step_000000004.0"]
    save(tmp_path, 4)
    assert checkpointer(tmp_path).restore(engine).step == 4  # type: ignore[arg-type,union-attr]


def test_a_renamed_checkpoint_is_not_believed(tmp_path: Path) -> None:
    save(tmp_path, 2)
    shutil.copytree(tmp_path / "step_000000002", tmp_path / "step_000000009")
    restored = checkpointer(tmp_path).restore(FakeEngine())  # type: ignore[arg-type]
    assert restored is not None and restored.step == 2


def test_all_bad_is_refused_now_and_at_the_next_start(tmp_path: Path) -> None:
    save(tmp_path, 2, 4)
    for step in (2, 4):
        flip(tmp_path / f"step_{step:09d}" / "ds" / "state.json")
    for _ in range(2):  # the same command again must not begin at step 0 either
        with pytest.raises(CheckpointError, match="no good checkpoint is left"):
            checkpointer(tmp_path).restore(FakeEngine())  # type: ignore[arg-type]


def test_another_fingerprint_is_refused_and_stays(tmp_path: Path) -> None:
    save(tmp_path, 2)
    with pytest.raises(CheckpointError, match="another section, seed or input"):
        checkpointer(tmp_path, fingerprint="b").restore(FakeEngine())  # type: ignore[arg-type]
    assert checkpointer(tmp_path).steps() == [2]


def test_another_number_of_ranks_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 2)
    two = World(0, 2, 0, torch.device("cpu"))
    with pytest.raises(CheckpointError, match="launch.ranks=1"):
        checkpointer(tmp_path, world=two).restore(FakeEngine())  # type: ignore[arg-type]


def test_a_failed_save_leaves_the_one_before(tmp_path: Path) -> None:
    save(tmp_path, 2)
    broken = FakeEngine(1)
    broken.broken = True
    with pytest.raises(CheckpointError, match=r"rank 0 could not write.*No space left.*before is untouched"):
        checkpointer(tmp_path).save(broken, 4, DataState.at(PLAN, "data", 16), torch.zeros(2, 3))  # type: ignore[arg-type]
    restored = checkpointer(tmp_path).restore(FakeEngine())  # type: ignore[arg-type]
    assert restored is not None and restored.step == 2
