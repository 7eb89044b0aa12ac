"""Power fails at any moment of saving: the newest acknowledged checkpoint is there, whatever the disk kept."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import crash_states
import pytest
import torch

from cogview2.pipeline import fsops
from cogview2.pipeline.config.training import CheckpointConfig
from cogview2.pipeline.data.sample_plan import DataState, SamplePlan
from cogview2.pipeline.distributed.process import World
from cogview2.pipeline.errors import CogView2Error
from cogview2.pipeline.training import checkpoint
from cogview2.pipeline.training.checkpoint import Checkpointer
from cogview2.pipeline.training.state import manifest
from cogview2.pipeline.training.state.files import WEIGHT, Entry, RankState, StateReader
from cogview2.pipeline.training.state.identity import Identity
from cogview2.pipeline.training.state.manifest import Topology

PLAN = SamplePlan([10], 3)
STEPS = 4


class Engine:
    """One parameter that says which step it is of."""

    def __init__(self, value: float = -1.0) -> None:
        self.value = value

    def state(self) -> RankState:
        return RankState({Entry(WEIGHT, 0, "w"): torch.full((40,), self.value)}, {"w": (40,)})

    def load(self, reader: StateReader) -> None:
        self.value = reader.whole("w")[0].item()


def _checkpointer(folder: Path) -> Checkpointer:
    config = CheckpointConfig(keep_last=2)
    world = World(0, 1, 0, torch.device("cpu"))
    return Checkpointer(folder, world, Identity("a"), Topology(1, 1, 0, "float32"), config)


def _record(root: Path, steps: int) -> list[Any]:
    """Save `steps` times; returns the operations, and each step where `save` came back."""
    root.mkdir()
    with crash_states.recording(root) as recorded:
        folder = fsops.make_dirs(root / "stage" / "checkpoints")
        writer = _checkpointer(folder)
        for step in range(1, steps + 1):
            writer.save(Engine(step), step, DataState.at(PLAN, "d", step), torch.zeros(2, 1))  # type: ignore[arg-type]
            recorded.append(str(step))
    return recorded


def _recover(folder: Path, acknowledged: int) -> str | None:
    """Return what is wrong with what a start finds in a state of the disk, or None."""
    engine = Engine()
    try:
        restored = _checkpointer(folder / "stage" / "checkpoints").restore(engine)  # type: ignore[arg-type]
    except CogView2Error as error:
        return f"refused: {error}"
    step = 0 if restored is None else restored.step
    if step < acknowledged:
        return f"step {acknowledged} was acknowledged, found {step}"
    if restored is not None and engine.value != step:
        return f"step {step} has the weights of {engine.value}"
    return None


def _failures(tmp_path: Path, steps: int = STEPS, enough: int = 1_000_000) -> tuple[int, list[str]]:
    """Return how many states there are, and what went wrong in which; ends after `enough` problems."""
    count, problems = 0, []
    recorded = _record(tmp_path / "run", steps)
    for said, tree in crash_states.crash_states(tmp_path / "run", recorded):
        count += 1
        crash_states.write_tree(tree, tmp_path / "crashed")
        problem = _recover(tmp_path / "crashed", int(said[-1]) if said else 0)
        if problem is not None:
            problems.append(problem)
            if len(problems) == enough:
                break
        shutil.rmtree(tmp_path / "crashed")
    return count, problems


@pytest.mark.parametrize("steps", [STEPS, pytest.param(20, marks=pytest.mark.slow)])
def test_every_crash_state_recovers_without_losing_what_was_acknowledged(tmp_path: Path, steps: int) -> None:
    count, problems = _failures(tmp_path, steps)
    print(f"{count} crash states, {len(problems)} do not recover")
    assert count > 50 * steps
    assert problems == []


def _without_file_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsops, "fsync_file", lambda path: None)


def _without_folder_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsops, "fsync_dir", lambda path: None)


def _without_the_sync_of_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    real = fsops.fsync_dir
    monkeypatch.setattr(fsops, "fsync_dir", lambda path: None if path.name == "checkpoints" else real(path))


def _without_the_sync_of_staging(monkeypatch: pytest.MonkeyPatch) -> None:
    real = fsops.fsync_dir
    monkeypatch.setattr(
        fsops, "fsync_dir", lambda path: None if path.name.startswith(".staging") else real(path)
    )


def _without_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    _without_file_syncs(monkeypatch)
    monkeypatch.setattr(checkpoint, "damage", lambda *_: None)
    monkeypatch.setattr(manifest, "_check_files", lambda *_: None)


def _with_retention_before_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Checkpointer._stage

    def early(self: Checkpointer, *arguments: Any) -> Any:
        for old in manifest.committed_steps(self.folder):
            fsops.remove_tree(self.folder / manifest.folder_name(old))
        return real(self, *arguments)

    monkeypatch.setattr(Checkpointer, "_stage", early)


def _with_the_final_name_from_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpointer, "_staging", lambda self, step: self.folder / manifest.folder_name(step))
    monkeypatch.setattr(Checkpointer, "_is_committed", lambda *_: False)
    real = fsops.replace
    monkeypatch.setattr(
        fsops, "replace", lambda source, target: None if source == target else real(source, target)
    )
    monkeypatch.setattr(fsops, "discard", lambda path: None)
    _without_folder_syncs(monkeypatch)


@pytest.mark.parametrize(
    "mutant",
    [
        _without_file_syncs,
        _without_folder_syncs,
        _without_the_sync_of_the_commit,
        _without_the_sync_of_staging,
        _without_verification,
        _with_retention_before_the_commit,
        _with_the_final_name_from_the_beginning,
    ],
)
def test_a_weaker_protocol_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: Callable[[pytest.MonkeyPatch], None]
) -> None:
    mutant(monkeypatch)
    assert _failures(tmp_path, enough=1)[1]
