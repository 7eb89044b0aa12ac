"""Layers that draw their own published initial weights (spec 2.4); so they also work under ZeRO-3's init."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def output_std(init_std: float, layers: int) -> float:
    """Return the std of the matrices that write into the residual stream: init_std / sqrt(2 L)."""
    return init_std / math.sqrt(2 * layers)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run the block with the CPU generator at `seed`, then restore it: build order plays no role."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


class Linear(nn.Linear):
    """Linear layer with bias: weights N(0, std), bias 0."""

    def __init__(self, inputs: int, outputs: int, std: float) -> None:
        self.std = std
        super().__init__(inputs, outputs)

    def reset_parameters(self) -> None:
        """Draw the weights. Called from __init__, before ZeRO-3 partitions the parameters."""
        nn.init.normal_(self.weight, std=self.std)
        nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """Embedding table with rows N(0, std)."""

    def __init__(self, rows: int, width: int, std: float) -> None:
        self.std = std
        super().__init__(rows, width)

    def reset_parameters(self) -> None:
        """Draw the rows; see `Linear.reset_parameters`."""
        nn.init.normal_(self.weight, std=self.std)
