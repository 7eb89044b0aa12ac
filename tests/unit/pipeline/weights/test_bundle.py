import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from published_weights import transformer_state, vqvae_file, vqvae_state

from cogview2.pipeline.errors import CheckpointError
from cogview2.pipeline.weights.bundle import write_bundle
from cogview2.pipeline.weights.collection import open_collection
from cogview2.pipeline.weights.folder import WeightsFolder
from cogview2.pipeline.weights.importing import Wanted, import_weights

PLAIN = """
import json, sys
import torch
assert not any(name.startswith("cogview2") for name in sys.modules)
facts = json.load(open("weights.json"))
for kind, entry in facts["models"].items():
    state = torch.load(entry["file"], weights_only=True, mmap=True)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert sum(v.numel() for n, v in state.items() if not n.endswith(("cluster_size", "embed_avg"))) == entry["parameters"]
    print(kind, len(state), entry["dtype"])
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.save(transformer_state(), tmp_path / "c.pt")
    vqvae_file(tmp_path / "i.pt", vqvae_state())
    import_weights("coglm", tmp_path / "c.pt", tmp_path / "src", Wanted(heads=4))
    import_weights("icetk-image", tmp_path / "i.pt", tmp_path / "src", Wanted())
    return tmp_path / "src"


def test_plain_torch_opens_a_bundle(source: Path, tmp_path: Path) -> None:
    write_bundle(open_collection(source), tmp_path / "out", np.arange(12) % 3)
    result = subprocess.run(
        [sys.executable, "-I", "-c", PLAIN], cwd=tmp_path / "out", capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "coglm 36 float16" in result.stdout and "icetk-image" in result.stdout


def test_a_bundle_serves_as_a_weights_folder_and_bundles_again(source: Path, tmp_path: Path) -> None:
    lines = write_bundle(open_collection(source), tmp_path / "out", np.arange(12) % 3)
    assert any("icetk-text, direct-sr, iterative-sr" in line for line in lines)
    assert sorted(os.listdir(tmp_path / "out")) == [
        "README.md",
        "clusters.npy",
        "coglm.pt",
        "icetk-image.pt",
        "weights.json",
    ]
    folder = WeightsFolder(tmp_path / "out")
    labels = folder.labels()
    assert labels is not None and labels.tolist() == [0, 1, 2] * 4
    for name, tensor in transformer_state().items():
        assert torch.equal(folder.coglm().state_dict()[name], tensor)
    assert folder.vqvae().quantizer.embed.weight.dtype == torch.float32
    write_bundle(open_collection(tmp_path / "out"), tmp_path / "again", labels.numpy())
    first, second = (json.loads((tmp_path / name / "weights.json").read_text()) for name in ("out", "again"))
    assert first == second


def test_the_card_says_what_is_there(source: Path, tmp_path: Path) -> None:
    write_bundle(open_collection(source), tmp_path / "out", None)
    card = (tmp_path / "out" / "README.md").read_text()
    total = sum(tensor.numel() for tensor in transformer_state().values())
    for words in (
        "# out\n",
        f"{total:,}",
        "2 layers, 16 hidden, 4 heads, 30 ids",
        "12 codes of 8",
        "Licence",
        "clusters",
    ):
        assert (words in card) == (words != "clusters"), words
    assert all(len(line) < 400 for line in card.splitlines())


def test_a_bundle_never_goes_over_something_else(source: Path, tmp_path: Path) -> None:
    before = sorted(os.listdir(source))
    with pytest.raises(CheckpointError, match="exists already"):
        write_bundle(open_collection(source), source, None)
    assert sorted(os.listdir(source)) == before


def test_a_bundle_with_a_spoilt_file_is_refused(source: Path, tmp_path: Path) -> None:
    write_bundle(open_collection(source), tmp_path / "out", None)
    file = tmp_path / "out" / "coglm.pt"
    file.write_bytes(b"x" * file.stat().st_size)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        WeightsFolder(tmp_path / "out").coglm()
