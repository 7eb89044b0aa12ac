"""Ranks open a checkpoint in shares, fail together, and decide together whether a state is copied."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked_ranks import run_ranks

from cogview2.pipeline.config.training import CheckpointConfig
from cogview2.pipeline.data.sample_plan import DataState, SamplePlan
from cogview2.pipeline.distributed.process import World, gather_objects
from cogview2.pipeline.training import checkpoint
from cogview2.pipeline.training.checkpoint import Checkpointer
from cogview2.pipeline.training.state import loading
from cogview2.pipeline.training.state.files import WEIGHT, Entry, RankState, read_header
from cogview2.pipeline.training.state.host_memory import Need, lack
from cogview2.pipeline.training.state.identity import Identity
from cogview2.pipeline.training.state.manifest import Topology, folder_name, verify

pytestmark = pytest.mark.distributed
RANKS = 3
STEP = 2


class _Engine:
    """Holds two numbers of each of two parameters."""

    def __init__(self) -> None:
        self.weights = {name: torch.arange(2.0) + 10 * dist.get_rank() for name in ("u", "w")}

    def state(self) -> RankState:
        at = 2 * dist.get_rank()
        entries = {Entry(WEIGHT, at, name): value for name, value in self.weights.items()}
        return RankState(entries, {name: (RANKS, 2) for name in self.weights})


def _checkpointer(folder: Path, rank: int, **how: Any) -> Checkpointer:
    world = World(rank, RANKS, rank, torch.device("cpu"))
    topology = Topology(RANKS, 1, 3, "float32")
    return Checkpointer(folder, world, Identity("a"), topology, CheckpointConfig(**how))


def _opens(folder: Path, rank: int) -> dict[str, Any]:
    writer, engine = _checkpointer(folder, rank), _Engine()
    writer.save(engine, STEP, DataState.at(SamplePlan([10], 3), "d", 4), torch.full((2, 3), float(rank)))  # type: ignore[arg-type]
    saved, opened = folder / folder_name(STEP), []
    loading.read_header = lambda path: opened.append(path.name) or read_header(path)  # type: ignore[assignment,func-returns-value]
    _, reader = loading.open_together(saved, verify(saved), writer.world)
    same = loading.take_own_over(reader, writer.world, None)
    other = loading.take_own_over(reader, writer.world, 5)

    def broken(path: Path) -> Any:
        if dist.get_rank() == 1:
            raise OSError(5, "Input/output error")
        return read_header(path)

    loading.read_header = broken
    try:
        loading.open_together(saved, verify(saved), writer.world)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    else:
        said = ""
    return {
        "opened": opened,
        "whole": [reader.whole(name).tolist() for name in reader.names()],
        "sums": [same[0, 0].item(), other[0, 0].item()],
        "said": said,
    }


def test_each_rank_reads_its_share_and_all_have_the_whole(tmp_path: Path) -> None:
    found = run_ranks(partial(_opens, tmp_path), RANKS)
    assert [answer["opened"] for answer in found] == [
        [f"rank_{rank:05d}.safetensors"] for rank in range(RANKS)
    ]
    whole = [[10.0 * rank, 10.0 * rank + 1] for rank in range(RANKS)]
    assert all(answer["whole"] == [whole, whole] for answer in found)
    assert [answer["sums"] for answer in found] == [[0, 3], [1, 0], [2, 0]]
    assert all("rank 1 could not open " in answer["said"] for answer in found)
    assert all("Input/output error" in answer["said"] for answer in found)


def _stages(folder: Path, deciding: Any, rank: int) -> dict[str, Any]:
    """Rank 1 has too little memory; return who copies."""
    checkpoint.available_bytes = lambda: 10 if dist.get_rank() == 1 else 10**9
    checkpoint.lack = deciding
    writer = _checkpointer(folder, rank, asynchronous=True)
    _, copied = writer._stage(STEP, _Engine(), torch.zeros(2, 3))  # type: ignore[arg-type]
    return {"copied": gather_objects(copied)}


def _alone(needs: list[Need]) -> str | None:
    return lack([needs[dist.get_rank()]])


@pytest.mark.parametrize(("deciding", "copied"), [(lack, [False] * 3), (_alone, [True, False, True])])
def test_all_ranks_take_the_same_way(tmp_path: Path, deciding: Any, copied: list[bool]) -> None:
    """The second line is the mutant: each rank decides for itself, and they would never meet again."""
    assert run_ranks(partial(_stages, tmp_path, deciding), RANKS)[0]["copied"] == copied
