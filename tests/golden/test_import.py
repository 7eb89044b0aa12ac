"""Every fixture of weights through the public command, then computed by the models of the weights folder."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cogview2.pipeline.models.sr.layout import level0_mask
from cogview2.pipeline.models.vqvae.model import RATES
from cogview2.pipeline.weights.folder import WeightsFolder
from cogview2.stages.commands.weights import main

pytestmark = pytest.mark.golden
NAMES = {"coglm": "coglm", "direct-sr": "dsr", "iterative-sr": "itersr", "icetk-image": "hvqvae"}


def _stored(fixtures: Path, kind: str) -> dict[str, torch.Tensor]:
    return load_file(fixtures / f"golden/{NAMES[kind]}.safetensors")


def _imported(fixtures: Path, kind: str, folder: Path) -> WeightsFolder:
    source = fixtures / f"golden/{NAMES[kind]}.safetensors"
    assert main(["import", "--kind", kind, str(source), str(folder)]) == 0
    return WeightsFolder(folder)


def _bundled(fixtures: Path, kind: str, tmp_path: Path, by_bundle: bool) -> WeightsFolder:
    folder = _imported(fixtures, kind, tmp_path / "w")
    if not by_bundle:
        return folder
    assert main(["bundle", str(tmp_path / "w"), str(tmp_path / "b")]) == 0
    return WeightsFolder(tmp_path / "b")


def _close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("by_bundle", [False, True])
def test_coglm(fixtures: Path, tmp_path: Path, by_bundle: bool) -> None:
    model, stored = _bundled(fixtures, "coglm", tmp_path, by_bundle).coglm(), _stored(fixtures, "coglm")
    for name in ("with", "without"):
        bias = stored["log_attention_weights"] if name == "with" else None
        with torch.no_grad():
            hidden = model(stored["tokens"], stored["position_ids"], stored["mask"] > 0, attention_bias=bias)
            _close(model.logits(hidden), stored[f"logits_{name}_weights"])


@pytest.mark.parametrize("by_bundle", [False, True])
def test_direct(fixtures: Path, tmp_path: Path, by_bundle: bool) -> None:
    model, stored = (
        _bundled(fixtures, "direct-sr", tmp_path, by_bundle).direct(),
        _stored(fixtures, "direct-sr"),
    )
    sizes = json.loads((fixtures / "golden/dsr.json").read_text())
    tokens = stored["tokens"]
    text = sizes["layout"][0]
    mask = (stored["mask"] > 0).expand(tokens.shape[0], 1, -1, -1)
    assert torch.equal(level0_mask(mask[:, 0, -1, :text], sizes["layout"][1] - text), mask)
    with torch.no_grad():
        logits = model.logits(model(tokens, stored["position_ids"].expand_as(tokens), mask), rows=20_000)
    _close(logits[:, stored["logit_rows"]], stored["logits"])


@pytest.mark.parametrize("by_bundle", [False, True])
def test_iterative(fixtures: Path, tmp_path: Path, by_bundle: bool) -> None:
    model = _bundled(fixtures, "iterative-sr", tmp_path, by_bundle).iterative()
    stored = _stored(fixtures, "iterative-sr")
    tokens = stored["tokens"]
    text = json.loads((fixtures / "golden/itersr.json").read_text())["layout"][0]
    real = (stored["mask"] > 0).reshape(1, text).expand(tokens.shape[0], -1)
    with torch.no_grad():
        logits = model.logits(model(tokens, stored["position_ids"].expand_as(tokens), real), rows=20_000)
    _close(logits[:, stored["logit_rows"]], stored["logits"])


@pytest.mark.parametrize("by_bundle", [False, True])
def test_icetk_image(fixtures: Path, tmp_path: Path, by_bundle: bool) -> None:
    model, stored = (
        _bundled(fixtures, "icetk-image", tmp_path, by_bundle).vqvae(),
        _stored(fixtures, "icetk-image"),
    )
    for rate in RATES:
        assert torch.equal(model.encode(stored["pixels"], rate), stored[f"rate{rate}/ids"])
        with torch.no_grad():
            _close(model.decode(stored[f"rate{rate}/ids"], rate), stored[f"rate{rate}/decoded"])


@pytest.mark.parametrize("kind", NAMES)
def test_the_way_back_is_bit_equal(fixtures: Path, tmp_path: Path, kind: str) -> None:
    state = {
        name.removeprefix("state/"): value
        for name, value in _stored(fixtures, kind).items()
        if name.startswith("state/")
    }
    folder = _imported(fixtures, kind, tmp_path / "w")
    target = tmp_path / ("out" if kind != "icetk-image" else "out.pt")
    assert main(["export", "--kind", kind, str(folder.path), str(target)]) == 0
    file = target / "1" / "mp_rank_00_model_states.pt" if target.is_dir() else target
    module = torch.load(file, weights_only=True)["module"]
    assert module.keys() == state.keys()
    for name, tensor in state.items():
        assert module[name].dtype == tensor.dtype and torch.equal(module[name], tensor), name
    assert main(["import", "--kind", kind, str(target), str(tmp_path / "v")]) == 0
    files = [(tmp_path / place / f"{kind}.safetensors").read_bytes() for place in "wv"]
    assert files[0] == files[1]


@pytest.mark.parametrize("kind", ["coglm", "direct-sr", "iterative-sr"])
@pytest.mark.parametrize("parts", [2, 4])
def test_tensor_parallel_parts_and_back(fixtures: Path, tmp_path: Path, kind: str, parts: int) -> None:
    folder = _imported(fixtures, kind, tmp_path / "w")
    command = [
        "export",
        "--kind",
        kind,
        str(folder.path),
        str(tmp_path / "out"),
        "--tensor-parallel",
        str(parts),
    ]
    assert main(command) == 0
    assert main(["import", "--kind", kind, str(tmp_path / "out"), str(tmp_path / "v")]) == 0
    files = [(tmp_path / place / f"{kind}.safetensors").read_bytes() for place in "wv"]
    assert files[0] == files[1]


def test_all_in_one_folder(fixtures: Path, tmp_path: Path) -> None:
    for kind in NAMES:
        _imported(fixtures, kind, tmp_path / "w")
    folder = WeightsFolder(tmp_path / "w")
    assert folder.kinds() == ("icetk-image", "coglm", "direct-sr", "iterative-sr")
    sizes = json.loads((fixtures / "golden/dsr.json").read_text())
    assert folder.data.base_grid**2 == sizes["layout"][1] - sizes["layout"][0]
