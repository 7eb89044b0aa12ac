"""Evaluation mode without gradients for the time of a block, and the mode and place of before after it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

_VISITS = "cogview2_visits"
"""Attribute of a model: the device that it visits."""


@contextmanager
def inference(*models: nn.Module) -> Iterator[None]:
    """Put `models` into evaluation mode and record no graph; restores both, so a trainer may call it.

    A model that only visits its device (`let_visit`) is there for the time of the block.

    Not torch.inference_mode: the models keep window masks for later steps, and masks made there could not be
    used in a backward pass.
    """
    modes = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        with torch.no_grad(), ExitStack() as stack:
            for model in models:
                stack.enter_context(_visit(model))
            yield
    finally:
        for model, training in zip(models, modes, strict=True):
            model.train(training)


def let_visit(model: nn.Module, device: torch.device) -> None:
    """Let a model come to `device` only while it works there (`inference`); its weights stay where they are otherwise.

    Models that do not fit together take turns like this; each turn costs the copy of the weights, nothing comes back.
    """
    setattr(model, _VISITS, device)


@contextmanager
def _visit(model: nn.Module) -> Iterator[None]:
    device = getattr(model, _VISITS, None)
    if device is None:
        yield
        return
    tensors = [*model.parameters(), *model.buffers()]
    homes = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device)
        yield
    finally:
        for tensor, home in zip(tensors, homes, strict=True):
            tensor.data = home


def device_of(model: nn.Module) -> torch.device:
    """Return the device on which the model works."""
    device: torch.device = getattr(model, _VISITS, None) or next(model.parameters()).device
    return device
