"""Exported weights: one safetensors file with the parameters and nothing that could execute."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from cogview2.pipeline import fsops
from cogview2.pipeline.errors import CheckpointError

WEIGHTS = "weights.safetensors"


def save_weights(path: Path, state: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write `state` atomically; tensors keep their dtype."""
    plain = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in state.items()}
    fsops.write_bytes(path, save(plain, metadata))


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file on the CPU.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; run the stage that makes it") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}); export it again") from error


def load_into(model: nn.Module, path: Path) -> None:
    """Load a weights file into `model`; every name and shape must agree.

    Raises:
        CheckpointError: naming what is missing, unexpected or of another shape.
    """
    state, wanted = load_weights(path), model.state_dict()
    problems = [f"{name} is missing" for name in wanted if name not in state]
    problems += [f"{name} is unexpected" for name in state if name not in wanted]
    problems += [
        f"{name} has shape {tuple(state[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{path} does not fit the model: {'; '.join(problems[:5])}{more}; check the model's section of the recipe"
        )
    model.load_state_dict(state)
