"""The weights inside a checkpoint, without an engine."""

from pathlib import Path

import torch

from cogview2.pipeline.training.state.files import StateReader
from cogview2.pipeline.training.state.manifest import verify


def trained_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the trained parameters of a checkpoint in float32, by their names in the plain model.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    verify(folder)
    reader = StateReader(folder)
    return {name: reader.whole(name) for name in reader.names()}
