"""Uniform numbers that depend on seed, image number and pass alone: on no machine and on no batch."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

_BITS = 24
"""Bits of a float32's mantissa with its leading one: every drawn number is exact and below 1."""


def uniforms(seed: int, image: int, name: str, count: int, columns: int) -> torch.Tensor:
    """Return float32 [count, columns] in [0, 1) on the CPU.

    The key of a Philox generator is the sha256 of the three names; its raw 64-bit outputs are turned into
    floats here, because NumPy promises stable raw outputs but not stable distributions.

    Args:
        seed: any integer.
        image: number of the image, not its place in a batch.
        name: of the sampling pass.
        count: independent draws.
        columns: numbers for each draw.
    """
    digest = hashlib.sha256(f"{seed}/{image}/{name}".encode()).digest()
    generator = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64))
    raw = generator.random_raw(count * columns) >> np.uint64(64 - _BITS)
    values = (raw.astype(np.float64) / 2**_BITS).astype(np.float32)
    return torch.from_numpy(values).view(count, columns)


def batch_uniforms(seed: int, images: Sequence[int], name: str, count: int, columns: int) -> torch.Tensor:
    """Return `uniforms` of several images, float32 [B, count, columns] on the CPU."""
    return torch.stack([uniforms(seed, image, name, count, columns) for image in images])
