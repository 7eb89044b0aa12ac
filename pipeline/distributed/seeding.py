"""Seeds of a process, and its random state for exact resume."""

import random
from pathlib import Path

import numpy as np
import torch

_SPREAD = 1_000_003


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed python, numpy and torch; `rank` moves the streams apart (0 on all ranks gives equal weights)."""
    value = (seed * _SPREAD + rank) % 2**31
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def save_random_state(path: Path) -> None:
    """Write the states of all generators of this process in a form that loads without unpickling code."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    torch.save(state, path)


def load_random_state(path: Path) -> None:
    """Restore what `save_random_state` wrote."""
    state = torch.load(path, weights_only=True)
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
