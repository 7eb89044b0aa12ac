from pathlib import Path

import pytest
import torch
from published_weights import Evil
from torch import nn

from cogview2.pipeline.errors import CheckpointError
from cogview2.pipeline.models.vqvae.quantizer import Codebook
from cogview2.pipeline.weights.files import load_into, load_model, load_weights, save_weights


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


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.table = Codebook(4, 2)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_load_model_takes_the_files_numbers_and_draws_none(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Small().half()
    state = {name: value.half() for name, value in source.state_dict().items()}
    path = tmp_path / f"w.{suffix}"
    if suffix == "pt":
        torch.save(state, path)
    else:
        save_weights(path, state)
    generator = torch.get_rng_state()
    model = load_model(Small, path)
    assert torch.equal(torch.get_rng_state(), generator) and not model.training
    assert model.linear.weight.dtype == torch.float16 and model.linear.weight.requires_grad
    assert model.table.weight.dtype == torch.float32  # a codebook never leaves float32
    assert torch.equal(model.linear.weight, source.linear.weight)
    cast = load_model(Small, path, dtype=torch.float32)
    assert cast.linear.weight.dtype == torch.float32
    cast.linear.weight.data.zero_()
    assert torch.equal(load_model(Small, path).linear.weight, source.linear.weight)  # the file is as it was


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_load_model_refuses_what_does_not_fit(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w.{suffix}"
    state = dict(nn.Linear(3, 3).state_dict())
    if suffix == "pt":
        torch.save(state, path)
    else:
        save_weights(path, state)
    with pytest.raises(CheckpointError, match="linear.weight is missing"):
        load_model(Small, path)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_model(Small, tmp_path / f"none.{suffix}")


@pytest.mark.parametrize("content", [{"a": {"b": torch.ones(1)}}, {"a": torch.ones(1), "n": 3}])
def test_a_pt_file_must_be_a_flat_table(tmp_path: Path, content: dict) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="no flat table of tensors"):
        load_model(Small, tmp_path / "w.pt")


def test_a_hostile_pt_file_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1), "evil": Evil(print, "executed")}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"builtins\.print"):
        load_model(Small, tmp_path / "w.pt")
