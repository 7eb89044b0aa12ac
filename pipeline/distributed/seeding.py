"""Seeds of a process, and its random state for exact resume."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

_SPREAD = 1_000_003


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed python, numpy and torch; `rank` moves the streams apart (0 on all ranks gives equal weights)."""
    value = (seed * _SPREAD + rank) % 2**31
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


_PYTHON, _NUMPY, _TORCH, _CUDA = "random_python", "random_numpy", "random_torch", "random_cuda"


def _second(value: float | None) -> list[float]:
    """Return the normal number that a generator keeps for its next call, behind a 1, or two zeros."""
    return [0.0, 0.0] if value is None else [1.0, value]


def random_state() -> dict[str, torch.Tensor]:
    """Return the states of all generators of this process as tensors: int64, float64 and uint8 vectors."""
    version, internal, gauss = random.getstate()
    numbers: dict[str, Any] = np.random.get_state(legacy=False)
    state = {
        _PYTHON: torch.tensor([version, *internal]),
        f"{_PYTHON}_normal": torch.tensor(_second(gauss), dtype=torch.float64),
        _NUMPY: torch.tensor([*numbers["state"]["key"].tolist(), numbers["state"]["pos"]]),
        f"{_NUMPY}_normal": torch.tensor(
            _second(numbers["gauss"] if numbers["has_gauss"] else None), dtype=torch.float64
        ),
        _TORCH: torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state[_CUDA] = torch.cuda.get_rng_state()
    return state


def load_random_state(state: Mapping[str, torch.Tensor]) -> None:
    """Restore what `random_state` gave; further tensors are left alone."""
    version, *internal = state[_PYTHON].tolist()
    kept, normal = state[f"{_PYTHON}_normal"].tolist()
    random.setstate((version, tuple(internal), normal if kept else None))
    *keys, position = state[_NUMPY].tolist()
    kept, normal = state[f"{_NUMPY}_normal"].tolist()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, int(kept), normal))
    torch.set_rng_state(state[_TORCH])
    if torch.cuda.is_available() and _CUDA in state:
        torch.cuda.set_rng_state(state[_CUDA])
