from pathlib import Path

import pytest
import torch
from torch import nn

from cogview2.pipeline.errors import CheckpointError
from cogview2.pipeline.weights import load_into, load_weights, save_weights


def test_round_trip_keeps_values_and_dtypes(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    state = {"view": whole.T, "shared": whole[:2], "half": whole.bfloat16(), "number": torch.tensor(3)}
    save_weights(tmp_path / "w.safetensors", state, {"kind": "test"})
    loaded = load_weights(tmp_path / "w.safetensors")
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_equal_weights_give_equal_bytes(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    for name in ("a", "b"):
        save_weights(tmp_path / name, dict(model.state_dict()), {"kind": "test"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_load_into_fills_the_model(tmp_path: Path) -> None:
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    save_weights(tmp_path / "w", dict(source.state_dict()))
    load_into(target, tmp_path / "w")
    assert torch.equal(source.weight, target.weight)


def test_missing_file_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist; run the stage"):
        load_weights(tmp_path / "none")


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"not weights at all", b"\xff" * 9])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_weights(tmp_path / "w")


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    save_weights(tmp_path / "w", {"a": torch.ones(100)})
    (tmp_path / "w").write_bytes((tmp_path / "w").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_weights(tmp_path / "w")


def test_every_misfit_is_named(tmp_path: Path) -> None:
    save_weights(tmp_path / "w", {"weight": torch.ones(2, 5), "more": torch.ones(1)})
    with pytest.raises(CheckpointError) as caught:
        load_into(nn.Linear(3, 2), tmp_path / "w")
    for words in ("bias is missing", "more is unexpected", "weight has shape (2, 5) instead of (2, 3)"):
        assert words in str(caught.value)
