"""All ranks of a job open a checkpoint together, and take over what its ranks had for themselves."""

import json
from pathlib import Path

import torch

from cogview2.pipeline.data.sample_plan import DataState
from cogview2.pipeline.distributed.process import World
from cogview2.pipeline.distributed.seeding import load_random_state, seed_everything
from cogview2.pipeline.distributed.together import together
from cogview2.pipeline.training.state.files import Header, StateReader, read_header, state_files
from cogview2.pipeline.training.state.manifest import DATA_STATE, Manifest


def open_together(folder: Path, manifest: Manifest, world: World) -> tuple[DataState, StateReader]:
    """Return the data position of a verified checkpoint, and a reader of its files. Collective.

    Each rank reads the headers of its share of the files, and tells them to all others.

    Raises:
        CheckpointError: on all ranks, when any of them could not read its share.
    """
    found: list[DataState] = []

    def look() -> list[Header]:
        found.append(DataState.from_dict(json.loads((folder / DATA_STATE).read_text(encoding="utf-8"))))
        mine = state_files(manifest.files)[world.rank :: world.size]
        return [read_header(folder / name) for name in mine]

    shares = together(look, f"open {folder}")
    return found[0], StateReader(folder, [header for share in shares for header in share])


def take_own_over(reader: StateReader, world: World, new_seed: int | None) -> torch.Tensor:
    """Take the random state over, and return this rank's sums since the last logged step. Collective.

    Args:
        reader: of the checkpoint.
        world: this rank among the others.
        new_seed: None where the ranks of now are those that wrote. Otherwise no rank of now is one of then: new random
            streams are made of it, and rank 0 holds all sums.

    Raises:
        CheckpointError: on all ranks, when any of them could not read what it needs.
    """
    found: list[torch.Tensor] = []

    def take() -> None:
        if new_seed is None:
            own = reader.own(world.rank)
            load_random_state(own)
            found.append(own["meters"])
            return
        seed_everything(new_seed, world.rank + 1)
        writers = range(reader.ranks) if world.is_first else range(1)
        sums = torch.stack([reader.own(rank)["meters"] for rank in writers]).sum(0)
        found.append(sums if world.is_first else torch.zeros_like(sums))

    together(take, f"take its own state over from {reader.folder}")
    return found[0]
