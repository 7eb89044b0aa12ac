import hashlib
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from cogview2.pipeline.errors import CheckpointError, RunDirectoryError
from cogview2.pipeline.weights.archives import MemoryTensor
from cogview2.pipeline.weights.blocks import Blocks
from cogview2.pipeline.weights.writer import write_safetensors


def _blocks(state: dict[str, torch.Tensor]) -> dict[str, Blocks]:
    return {name: Blocks.of(MemoryTensor(tensor)) for name, tensor in state.items()}


STATE = {
    "z": torch.randn(3, 5),
    "a": torch.randn(7).half(),
    "\u00e9": torch.randn(2, 2).bfloat16(),
    "d": torch.randn(2).double(),
    "b": torch.tensor(1.5),
    "empty": torch.empty(0, 3),
}


def test_the_bytes_are_those_of_the_library(tmp_path: Path) -> None:
    digest, size = write_safetensors(tmp_path / "w", _blocks(STATE), None, allow_nonfinite=False, where="x")
    data = (tmp_path / "w").read_bytes()
    assert data == save(STATE)
    assert digest == hashlib.sha256(data).hexdigest() and size == len(data)


def test_a_dtype_casts_everything(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "w", _blocks(STATE), torch.float16, allow_nonfinite=False, where="x")
    for name, tensor in load_file(tmp_path / "w").items():
        assert torch.equal(tensor, STATE[name].half())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, bad: float) -> None:
    state = {"fine": torch.ones(3), "bad": torch.tensor([1.0, bad])}
    with pytest.raises(CheckpointError, match="bad holds numbers that are not finite"):
        write_safetensors(tmp_path / "w", _blocks(state), None, allow_nonfinite=False, where="x")
    assert not os.listdir(tmp_path)
    write_safetensors(tmp_path / "w", _blocks(state), None, allow_nonfinite=True, where="x")
    assert torch.equal(load_file(tmp_path / "w")["bad"].isfinite(), torch.tensor([True, False]))


def test_a_cast_that_overflows_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not finite as F16"):
        write_safetensors(
            tmp_path / "w",
            _blocks({"a": torch.tensor([1e6])}),
            torch.float16,
            allow_nonfinite=False,
            where="x",
        )


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        with pytest.raises(RunDirectoryError, match="larger than this process may write"):
            write_safetensors(
                tmp_path / "w", _blocks({"a": torch.ones(100_000)}), None, allow_nonfinite=False, where="x"
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert not os.listdir(tmp_path)
