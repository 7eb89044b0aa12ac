"""The CPU kernels do what attention_contract asks for."""

import pytest
from attention_contract import *  # noqa: F403
from attention_contract import Target
from compiled_kernels import target_on


@pytest.fixture(scope="module")
def target() -> Target:
    """The backend that the imported tests try."""
    return target_on("cpu")
