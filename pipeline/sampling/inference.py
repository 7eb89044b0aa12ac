"""Evaluation mode without gradients for the time of a block, and the mode of before after it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def inference(*models: nn.Module) -> Iterator[None]:
    """Put `models` into evaluation mode and record no graph; restores both, so a trainer may call it.

    Not torch.inference_mode: the models keep window masks for later steps, and masks made there could not be
    used in a backward pass.
    """
    modes = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for model, training in zip(models, modes, strict=True):
            model.train(training)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's weights."""
    return next(model.parameters()).device
