"""Exported weights: one safetensors file with the parameters and nothing that could execute."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from cogview2.pipeline import fsops
from cogview2.pipeline.errors import CheckpointError
from cogview2.pipeline.models.vqvae.quantizer import Float32Buffers
from cogview2.pipeline.weights.archives import open_archive

Model = TypeVar("Model", bound=nn.Module)
WEIGHTS = "weights.safetensors"


def save_weights(path: Path, state: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write `state` atomically; tensors keep their dtype."""
    plain = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in state.items()}
    fsops.write_bytes(path, save(plain, metadata))


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a .safetensors file, or of the .pt of a bundle, on the CPU.

    They are a private map of the file: what is not used is not read.

    Raises:
        CheckpointError: missing, damaged or hostile.
    """
    if Path(path).suffix == ".pt":
        return _mapped_torch(path)
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
    state = load_weights(path)
    _check_fit(path, {name: tuple(value.shape) for name, value in state.items()}, model)
    model.load_state_dict(state)


def _check_fit(path: Path, shapes: Mapping[str, tuple[int, ...]], model: nn.Module) -> None:
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    problems = [f"{name} is missing" for name in wanted if name not in shapes]
    problems += [f"{name} is unexpected" for name in shapes if name not in wanted]
    problems += [
        f"{name} has shape {shapes[name]} instead of {wanted[name]}"
        for name in wanted
        if name in shapes and shapes[name] != wanted[name]
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{path} does not fit the model: {'; '.join(problems[:5])}{more}; check the model's section of the recipe"
        )


def load_model(
    build: Callable[[], Model],
    path: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Model:
    """Return a model with the weights of a file, in evaluation mode, without ever drawing random ones.

    On the CPU the parameters are a private map of the file: they take memory when they are used.

    Args:
        build: makes the model; called on the meta device.
        path: .safetensors, or the .pt of a bundle.
        device: where the model goes, tensor by tensor.
        dtype: of the parameters; by default that of the file. Buffers that stay in float32 do so.

    Raises:
        CheckpointError: missing, damaged, hostile, or names and shapes that do not fit.
    """
    with torch.device("meta"):
        model = build()
    mapped = load_weights(path)
    _check_fit(path, {name: tuple(value.shape) for name, value in mapped.items()}, model)
    state = {name: value.to(device=device, dtype=dtype) for name, value in mapped.items()}
    model.load_state_dict(state, assign=True)
    for module in model.modules():
        if isinstance(module, Float32Buffers):
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.float())
    return model.eval()


def _mapped_torch(path: Path) -> dict[str, torch.Tensor]:
    open_archive(path)  # refuses whatever is more than tensors
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a whole torch file; copy it again") from error
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise CheckpointError(f"{path} is no flat table of tensors; copy it again")
    return found
