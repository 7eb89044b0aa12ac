"""A copy of the state is made only where the memory of the host holds it; otherwise training waits, and nothing is lost."""

from pathlib import Path

import pytest
import torch

from cogview2.pipeline.config.training import CheckpointConfig
from cogview2.pipeline.data.sample_plan import DataState, SamplePlan
from cogview2.pipeline.distributed.process import World
from cogview2.pipeline.training import checkpoint
from cogview2.pipeline.training.checkpoint import Checkpointer
from cogview2.pipeline.training.state.files import WEIGHT, Entry, RankState
from cogview2.pipeline.training.state.host_memory import Need, available_bytes, lack
from cogview2.pipeline.training.state.identity import Identity
from cogview2.pipeline.training.state.manifest import Topology, committed_steps

GB = 10**9


def _put(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


MEMORY = {
    "proc/meminfo": "MemTotal: 9000 kB\nMemFree: 100 kB\nMemAvailable:    8000 kB\nHugePages_Total: 0\n"
}
V2 = "sys/fs/cgroup/"
V1 = "sys/fs/cgroup/memory/"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        (MEMORY, 8000 * 1024),
        # Version 2: the limit of any level around the process counts; files in memory can be dropped.
        (
            MEMORY
            | {
                "proc/self/cgroup": "0::/job/step\n",
                V2 + "job/step/memory.max": "max\n",
                V2 + "job/step/memory.current": "500\n",
                V2 + "job/memory.max": "5000\n",
                V2 + "job/memory.current": "4000\n",
                V2 + "job/memory.stat": "anon 3300\ninactive_file 500\nactive_file 200\n",
            },
            1700,
        ),
        # In a container: the group that its own mount begins with.
        (
            MEMORY
            | {
                "proc/self/cgroup": "0::/\n",
                V2 + "memory.max": "900\n",
                V2 + "memory.current": "1000\n",
            },
            0,
        ),
        # Version 1, and a path of the host that the container does not show.
        (
            MEMORY
            | {
                "proc/self/cgroup": "5:cpu:/\n4:memory:/docker/abc\n0::/\n",
                V1 + "memory.limit_in_bytes": "7000\n",
                V1 + "memory.usage_in_bytes": "4000\n",
                V1
                + "memory.stat": "cache 100\ntotal_inactive_file 40\ntotal_active_file 10\nactive_file 9\n",
            },
            3050,
        ),
        (
            MEMORY
            | {
                "proc/self/cgroup": "4:memory:/\n",
                V1 + "memory.limit_in_bytes": "9223372036854771712\n",
                V1 + "memory.usage_in_bytes": "4000\n",
            },
            8000 * 1024,
        ),
    ],
)
def test_the_least_of_kernel_and_groups(tmp_path: Path, files: dict[str, str], expected: int | None) -> None:
    _put(tmp_path, files)
    assert available_bytes(tmp_path) == expected


def test_this_machine_has_some() -> None:
    found = available_bytes()
    assert found is not None and found > 0


def test_ranks_of_one_host_share_its_memory() -> None:
    alone = [Need("a", 10 * GB, 13 * GB), Need("b", 10 * GB, 13 * GB)]
    assert lack(alone) is None
    said = lack([*alone, Need("b", GB, 14 * GB)])
    assert said is not None and "2 ranks on b takes 11.0 GB" in said and "13.0 GB are" in said
    assert "set train.checkpoint.asynchronous to false" in said
    assert lack([Need("a", 10 * GB, None)]) is None


class _Engine:
    def __init__(self) -> None:
        self.weight = torch.ones(1000)

    def state(self) -> RankState:
        return RankState({Entry(WEIGHT, 0, "w"): self.weight}, {"w": (1000,)})


def _is_copied(folder: Path) -> bool:
    """Save in the background; return whether training goes on while it is written."""
    folder.mkdir()
    world = World(0, 1, 0, torch.device("cpu"))
    config = CheckpointConfig(asynchronous=True)
    writer = Checkpointer(folder, world, Identity("a"), Topology(1, 1, 0, "float32"), config)
    data = DataState.at(SamplePlan([10], 3), "d", 4)
    writer.save(_Engine(), 2, data, torch.zeros(2, 3))  # type: ignore[arg-type]
    copied = committed_steps(folder) == []
    writer.finish()
    assert committed_steps(folder) == [2]
    return copied


def test_without_the_memory_training_waits_and_one_line_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert _is_copied(tmp_path / "enough") and "training waits" not in caplog.text
    monkeypatch.setattr(checkpoint, "available_bytes", lambda: 4000)
    assert not _is_copied(tmp_path / "little")
    (line,) = [record.message for record in caplog.records if "training waits" in record.message]
    assert line.startswith("training waits while step 2 is written: a copy of the state of the 1 rank")
    assert "4.0 kB are" in line and "\n" not in line


def test_mutant_the_memory_is_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "available_bytes", lambda: 4000)
    monkeypatch.setattr(checkpoint, "lack", lambda needs: None)
    assert _is_copied(tmp_path / "little")
