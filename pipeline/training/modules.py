"""What the trainer needs to know of a model: a module that turns a micro batch into a loss."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

Batch = dict[str, torch.Tensor]


class LossOutput(NamedTuple):
    """Loss of one micro batch, and sums and counts that add up over micro batches and ranks.

    A tuple, because DeepSpeed looks for tensors in tuples only: without the hook that it puts on the loss, float32 sums of
    bf16 gradients count every micro batch but the last one again.
    """

    loss: torch.Tensor
    """Scalar with gradient."""
    sums: torch.Tensor
    """float32 [metrics], without gradient; order of TrainModule.metric_names."""
    counts: torch.Tensor
    """float32 [metrics]; mean = sum / count."""


class TrainModule(nn.Module):
    """A model with its loss. The engine wraps it whole, so that ZeRO sees every forward pass.

    Subclasses set `model` (its state is what is exported) and implement forward(batch) -> LossOutput.
    """

    metric_names: tuple[str, ...] = ()
    model: nn.Module

    def forward(self, batch: Batch) -> LossOutput:
        """Return the loss of one micro batch."""
        raise TypeError(f"{type(self).__name__} does not define forward")

    def begin_step(self, step: int, micro_batches: list[Batch]) -> None:
        """Called on all ranks before update `step` (from 0)."""

    def unused_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters that this update leaves alone, the same on all ranks (ZeRO stage 0 only)."""
        return ()

    def end_step(self, step: int) -> dict[str, float]:
        """Called on all ranks after the update; may communicate. Returns further numbers to log, equal on all ranks."""
        return {}
