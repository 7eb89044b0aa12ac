"""A checkpointer of one rank with an engine of one number, for tests of what is saved and what is loaded."""

from pathlib import Path

import torch

from cogview2.pipeline.config.training import CheckpointConfig
from cogview2.pipeline.data.sample_plan import DataState, SamplePlan
from cogview2.pipeline.distributed.process import World
from cogview2.pipeline.training.checkpoint import Checkpointer
from cogview2.pipeline.training.state.files import WEIGHT, Entry, RankState, StateReader
from cogview2.pipeline.training.state.identity import Identity
from cogview2.pipeline.training.state.manifest import Topology

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


def save(folder: Path, *steps: int, **options: object) -> None:
    for step in steps:
        meters = torch.full((2, 3), float(step))
        writer = checkpointer(folder, **options)
        writer.save(FakeEngine(step * 10), step, DataState.at(PLAN, "data", step * 4), meters)  # type: ignore[arg-type]
        writer.finish()


def save_value(folder: Path, step: int, value: float) -> None:
    checkpointer(folder).save(FakeEngine(value), step, DataState.at(PLAN, "data", 16), torch.zeros(2, 3))  # type: ignore[arg-type]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
