"""`cogview2 checkpoint`: what is there, whether it is whole, what differs."""

from pathlib import Path

import pytest
import torch

from cogview2.pipeline.config.loading import load_recipe
from cogview2.pipeline.config.training import CheckpointConfig
from cogview2.pipeline.data.sample_plan import DataState, SamplePlan
from cogview2.pipeline.distributed.process import World
from cogview2.pipeline.run_dir import RunDirectory
from cogview2.pipeline.training.checkpoint import Checkpointer
from cogview2.pipeline.training.state.files import WEIGHT, Entry, RankState
from cogview2.pipeline.training.state.identity import Identity
from cogview2.pipeline.training.state.manifest import Topology, read_manifest
from cogview2.stages.commands import checkpoint

PLAN = SamplePlan([10], 3)


class Engine:
    def __init__(self, numbers: torch.Tensor) -> None:
        self.numbers = numbers

    def state(self) -> RankState:
        return RankState(
            {Entry(WEIGHT, 0, "w"): self.numbers, Entry(WEIGHT, 0, "same"): torch.ones(2)}, {"w": (4,)}
        )


def _save(folder: Path, step: int, numbers: list[float], layers: int = 3) -> Path:
    identity = Identity("a", {"coglm.model.layers": layers})
    writer = Checkpointer(
        folder,
        World(0, 1, 0, torch.device("cpu")),
        identity,
        Topology(1, 1, 0, "float32"),
        CheckpointConfig(),
    )
    data = DataState.at(PLAN, "d", step)
    writer.save(Engine(torch.tensor(numbers)), step, data, torch.zeros(2, 1))  # type: ignore[arg-type]
    return folder / f"step_{step:09d}"


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "runs" / "q").create(load_recipe("quickstart", []))


@pytest.fixture
def folder(run: RunDirectory) -> Path:
    return run.stage("pretrain_coglm").create().checkpoints


def test_a_run_without_any(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    assert checkpoint.main(["ls", "q", "--runs-dir", str(run.path.parent)]) == 0
    assert "no checkpoints" in capsys.readouterr().out
    assert checkpoint.main(["ls", "other", "--runs-dir", str(run.path.parent)]) != 0
    assert "no run 'other'" in capsys.readouterr().err


def test_good_and_bad_ones(run: RunDirectory, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = _save(folder, 2, [1, 2, 3, 4]), _save(folder, 4, [1, 2, 3, 5])
    part = run.stage("finetune_superres/direct").create().checkpoints
    _save(part, 1, [1, 1, 1, 1])
    assert checkpoint.main(["verify", str(run.path)]) == 0
    assert "3 good, 0 bad" in capsys.readouterr().out
    data = bytearray((bad / "rank_00000.safetensors").read_bytes())
    data[-1] ^= 1
    (bad / "rank_00000.safetensors").write_bytes(bytes(data))
    assert checkpoint.main(["verify", str(run.path)]) == 78
    out = capsys.readouterr().out
    assert "step_000000004/rank_00000.safetensors is damaged" in out and "2 good, 1 bad" in out
    assert checkpoint.main(["ls", str(run.path)]) == 0
    out = capsys.readouterr().out
    assert "finetune_superres/direct" in out and "1 rank, ZeRO 0, float32" in out
    digest = read_manifest(good).sha256
    assert digest in out
    assert checkpoint.main(["verify", str(good), "--expect", digest]) == 0
    assert checkpoint.main(["verify", str(good), "--expect", "0" * 64]) == 78
    assert "is whole, but its manifest has sha256" in capsys.readouterr().out


def test_differences(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = _save(folder, 2, [1, 2, 3, 4]), _save(folder, 4, [1, 2, 3, 4.5], layers=4)
    assert checkpoint.main(["diff", str(first), str(second)]) == 0
    out = capsys.readouterr().out
    assert "step: 2 -> 4" in out and "coglm.model.layers: 3 -> 4" in out
    assert "weight of w: up to 0.5 apart, 25.0% of the numbers" in out
    assert "1 tensors equal, 1 differ" in out
    assert checkpoint.main(["diff", str(first), str(first)]) == 0
    assert capsys.readouterr().out == "2 tensors equal, 0 differ\n"
