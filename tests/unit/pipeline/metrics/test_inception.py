import math
import os
import struct
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cogview2.pipeline.errors import CheckpointError
from cogview2.pipeline.metrics.feature_network import build_feature_network
from cogview2.pipeline.metrics.inception import CLASSES, FEATURES, InceptionNetwork
from cogview2.pipeline.metrics.inception_weights import PUBLISHED_SHA256, load_inception, save_inception

# Measured with torch-fidelity 0.4.0 on the weights and pictures below (float32, one CPU thread).
REFERENCE_FEATURES = [0.072311, 1.299202, 0.098707, 0.470583, 0.058477, 0.425174, 0.303231, 0.136048]
REFERENCE_FEATURES += [0.743502, 0.011201, 0.78201, 0.455179, 0.931644, 0.005706, 0.002433, 0.459289]
REFERENCE_SECOND = [0.07401, 1.316912, 0.097368, 0.492995]
REFERENCE_LOGITS = [-1.247241, 0.061403, 0.301025, -0.383115]


def formula_weights() -> dict[str, Tensor]:
    """Weights from a formula, so that another implementation can have the same without a file."""
    filled = {}
    for index, (name, tensor) in enumerate(InceptionNetwork().state_dict().items()):
        if name.endswith("num_batches_tracked"):
            continue
        steps = torch.arange(tensor.numel(), dtype=torch.float64)
        uniform = torch.frac(torch.sin(steps * 12.9898 + index * 78.233) * 43758.5453).abs()
        if name.endswith(("running_var", "bn.weight")):
            values = 0.75 + 0.5 * uniform
        elif name.endswith(("running_mean", "bias")):
            values = (uniform - 0.5) * 0.2
        else:
            values = (uniform - 0.5) * 2 * math.sqrt(6 / tensor[0].numel())
        filled[name] = values.view_as(tensor).float()
    return filled


def pictures() -> Tensor:
    y, x = torch.meshgrid(torch.arange(150), torch.arange(200), indexing="ij")
    return torch.stack(
        [torch.stack([(x * (c + 1) + y * (b + 2) + (x * y) // 17) % 256 for c in range(3)]) for b in range(2)]
    ).to(torch.uint8)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return formula_weights()


@pytest.fixture(scope="module")
def weights_file(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(OrderedDict(weights), path)
    return path


def test_architecture_of_the_published_port(weights: dict[str, Tensor]) -> None:
    assert sum(parameter.numel() for parameter in InceptionNetwork().parameters()) == 23_850_960
    assert len(weights) == 472
    shapes = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
        "Mixed_6a.branch3x3.bn.running_mean": (384,),
        "Mixed_6c.branch7x7dbl_4.conv.weight": (160, 160, 7, 1),
        "Mixed_7a.branch7x7x3_2.conv.weight": (192, 192, 1, 7),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        "Mixed_7c.branch_pool.bn.weight": (192,),
        "fc.weight": (CLASSES, FEATURES),
        "fc.bias": (CLASSES,),
    }
    assert {name: tuple(weights[name].shape) for name in shapes} == shapes


def test_features_are_those_of_torch_fidelity(weights_file: Path) -> None:
    network = build_feature_network(weights_file, "tf1")
    features_BD, logits_BK = network(pictures())
    assert logits_BK is not None
    assert features_BD.shape == (2, network.dim) and logits_BK.shape == (2, CLASSES)
    torch.testing.assert_close(features_BD[0, :16], torch.tensor(REFERENCE_FEATURES), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features_BD[1, :4], torch.tensor(REFERENCE_SECOND), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits_BK[0, :4], torch.tensor(REFERENCE_LOGITS), rtol=1e-4, atol=1e-4)


def test_name_hash_and_comparability(weights_file: Path, tmp_path: Path) -> None:
    network = build_feature_network(str(weights_file), "clean")
    assert "resize clean" in network.name and not network.comparable
    assert "not the published" in network.name and len(network.sha256) == 64
    own = tmp_path / "own.safetensors"
    loaded = load_inception(weights_file)
    assert isinstance(loaded.network, InceptionNetwork)
    save_inception(loaded.network, own, PUBLISHED_SHA256 + "0" * 56)
    assert build_feature_network(own, "tf1").comparable
    save_inception(loaded.network, own, loaded.sha256)
    assert not build_feature_network(own, "tf1").comparable


def test_save_and_load_keep_every_weight(
    weights: dict[str, Tensor], weights_file: Path, tmp_path: Path
) -> None:
    first = load_inception(weights_file)
    assert isinstance(first.network, InceptionNetwork) and not first.network.training
    save_inception(first.network, tmp_path / "own.safetensors", first.sha256)
    second = load_inception(tmp_path / "own.safetensors").network.state_dict()
    assert second.keys() == InceptionNetwork().state_dict().keys()
    assert all(torch.equal(second[name], tensor) for name, tensor in weights.items())


class _Layers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)).repeat(1, 683)[:, :2048]


class _Script(nn.Module):
    """The parts of StyleGAN's export that are used."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layers = _Layers()
        self.output = nn.Linear(FEATURES, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.layers(x))


def test_torchscript(tmp_path: Path) -> None:
    script = torch.jit.script(_Script(CLASSES))
    torch.jit.save(script, str(tmp_path / "inception.pt"))
    network = build_feature_network(tmp_path / "inception.pt", "antialias")
    features_BD, logits_BK = network(torch.full((2, 3, 40, 40), 192, dtype=torch.uint8))
    torch.testing.assert_close(features_BD, torch.full((2, FEATURES), 0.5))
    assert logits_BK is not None
    torch.testing.assert_close(logits_BK[0], 0.5 * script.output.weight.sum(1))
    assert "TorchScript" in network.name and not network.comparable


def test_other_torchscript_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(_Script(1000)), str(tmp_path / "other.pt"))
    with pytest.raises(CheckpointError, match="1000 classes"):
        load_inception(tmp_path / "other.pt")
    torch.jit.save(torch.jit.script(_Layers()), str(tmp_path / "plain.pt"))
    with pytest.raises(CheckpointError, match="is not StyleGAN's"):
        load_inception(tmp_path / "plain.pt")


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "value", "nan", "list"])
def test_other_state_dicts_are_refused(weights: dict[str, Tensor], tmp_path: Path, change: str) -> None:
    state: dict[str, object] = dict(weights)
    words = {
        "missing": "1 tensors are missing \\(fc.bias\\)",
        "extra": "1 are unknown \\(AuxLogits.fc.weight\\)",
        "shape": "fc.weight is \\(1000, 2048\\), not \\(1008, 2048\\)",
        "value": "fc.bias is str",
        "nan": "fc.bias holds numbers that are not finite",
        "list": "holds a list",
    }
    if change == "missing":
        del state["fc.bias"]
    elif change == "extra":
        state["AuxLogits.fc.weight"] = torch.zeros(2)
    elif change == "shape":
        state["fc.weight"] = torch.zeros(1000, 2048)
    elif change == "value":
        state["fc.bias"] = "text"
    elif change == "nan":
        state["fc.bias"] = torch.full((CLASSES,), torch.nan)
    path = tmp_path / "state.pth"
    torch.save([1] if change == "list" else state, path)
    with pytest.raises(CheckpointError, match=words[change]):
        load_inception(path)


class _Payload:
    """A pickle that makes a folder when it is executed."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.target,)


def test_hostile_and_damaged_files_are_refused_in_one_sentence(tmp_path: Path, weights_file: Path) -> None:
    marker = tmp_path / "executed"
    torch.save({"fc.weight": _Payload(marker)}, tmp_path / "zip.pth")
    torch.save({"fc.weight": _Payload(marker)}, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("<html>404</html>")
    (tmp_path / "cut.pth").write_bytes(weights_file.read_bytes()[:100_000])
    (tmp_path / "huge.safetensors").write_bytes(struct.pack("<Q", 2**42) + b"{}")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    files = sorted([*tmp_path.glob("*.pth"), *tmp_path.glob("*.safetensors")])
    assert len(files) == 7
    for path in [*files, tmp_path / "absent.pth", tmp_path]:
        with pytest.raises(CheckpointError) as refusal:
            build_feature_network(path)
        assert "\n" not in str(refusal.value) and str(path) in str(refusal.value)
        assert "weights_only" not in str(refusal.value)
    assert not marker.exists()


@pytest.mark.golden
def test_the_bad_checkpoints(fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = sorted((fixtures / "data/bad/checkpoints").iterdir())
    assert files
    for path in files:
        with pytest.raises(CheckpointError):
            load_inception(path)
    assert not list(tmp_path.iterdir())
