"""Tests that need a CUDA device; elsewhere each is skipped with one line. Imports nothing but pytest and torch."""

import pytest
import torch


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def free_memory() -> None:
    """Hand back what the test before has left, so that large shapes fit."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
