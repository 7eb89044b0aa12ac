import json
import os
from pathlib import Path

import pytest
import torch
from published_weights import ROWS, rank_state, transformer_state, vqvae_file, vqvae_state
from safetensors.torch import load_file

from cogview2.pipeline.errors import CheckpointError, RunDirectoryError
from cogview2.pipeline.weights import exporting
from cogview2.pipeline.weights.collection import open_collection
from cogview2.pipeline.weights.exporting import export_weights, save_torch, staged_folder
from cogview2.pipeline.weights.folder import WeightsFolder
from cogview2.pipeline.weights.importing import Wanted, import_weights

EXTRAS = {"coglm": "", "direct-sr": "direct", "iterative-sr": "iterative"}
LAYOUTS = {"coglm": None, "direct-sr": [8, 12, 48], "iterative-sr": [5, 41]}


def _folder(tmp_path: Path, kind: str) -> Path:
    """Import a tiny model into a folder of its own."""
    torch.save(transformer_state(extra=EXTRAS[kind]), tmp_path / "w.pt")
    known = {"num_attention_heads": 4, "layout": LAYOUTS[kind], "kernel_size": 3}
    (tmp_path / "w.json").write_text(json.dumps(known))
    import_weights(kind, tmp_path / "w.pt", tmp_path / "src", Wanted())
    return tmp_path / "src"


@pytest.mark.parametrize("kind", EXTRAS)
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_published_layout_and_the_way_back(tmp_path: Path, kind: str, parts: int) -> None:
    source = _folder(tmp_path, kind)
    state = transformer_state(extra=EXTRAS[kind])
    lines = export_weights(kind, open_collection(source), tmp_path / "out", parts=parts)
    assert sorted(os.listdir(tmp_path / "out")) == ["1", "latest", "model_config.json"]
    assert (tmp_path / "out/latest").read_text() == "1"
    padded = state | {}
    words = "transformer.word_embeddings.weight"
    padded[words] = torch.cat([state[words], torch.zeros(-ROWS % parts, 16, dtype=torch.float16)])
    for rank in range(parts):
        part = torch.load(tmp_path / f"out/1/mp_rank_{rank:02d}_model_states.pt", weights_only=True)
        expected = rank_state(padded, rank, parts)
        assert part["module"].keys() == expected.keys()
        assert all(torch.equal(part["module"][name], tensor) for name, tensor in expected.items())
    config = json.loads((tmp_path / "out/model_config.json").read_text())
    assert config["vocab_size"] == len(padded[words]) and config["model_parallel_size"] == parts
    assert any("zero rows" in line for line in lines) == (len(padded[words]) != ROWS)
    import_weights(kind, tmp_path / "out", tmp_path / "back", Wanted())
    ours, theirs = (WeightsFolder(tmp_path / name).facts.models.get(kind) for name in ("src", "back"))
    assert ours is not None and theirs is not None
    ignored = {"source", "iteration"}
    assert ours.model_dump(exclude=ignored) == theirs.model_dump(exclude=ignored)  # sha256 included


def test_the_json_without_our_own_words_is_enough(tmp_path: Path) -> None:
    """As a published loader would write it again."""
    source = _folder(tmp_path, "direct-sr")
    export_weights("direct-sr", open_collection(source), tmp_path / "out", parts=4)
    config = json.loads((tmp_path / "out/model_config.json").read_text())
    del config["cogview2"]
    (tmp_path / "out/model_config.json").write_text(json.dumps(config | {"kernel_size": 3}))
    import_weights("direct-sr", tmp_path / "out", tmp_path / "back", Wanted())
    ours, theirs = (WeightsFolder(tmp_path / name).facts.models.direct_sr for name in ("src", "back"))
    assert ours is not None and theirs is not None and ours.sha256 == theirs.sha256
    assert (ours.config, ours.base_grid, ours.rows) == (theirs.config, theirs.base_grid, theirs.rows)


def test_the_iteration_of_the_source_is_kept(tmp_path: Path) -> None:
    state = transformer_state()
    torch.save({"module": state, "iteration": 77}, tmp_path / "w.pt")
    import_weights("coglm", tmp_path / "w.pt", tmp_path / "src", Wanted(heads=4))
    export_weights("coglm", open_collection(tmp_path / "src"), tmp_path / "out")
    found = torch.load(tmp_path / "out/77/mp_rank_00_model_states.pt", weights_only=True)
    assert found["iteration"] == 77 and all(torch.equal(found["module"][name], state[name]) for name in state)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors"])
def test_plain_state_dicts(tmp_path: Path, suffix: str) -> None:
    source, state = _folder(tmp_path, "coglm"), transformer_state()
    target = tmp_path / f"out{suffix}"
    export_weights("coglm", open_collection(source), target, layout="plain", dtype=torch.float32)
    found = load_file(target) if suffix == ".safetensors" else torch.load(target, weights_only=True)
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in state.items())
    import_weights("coglm", target, tmp_path / "back", Wanted())  # its sizes lie beside it


def test_ice_image(tmp_path: Path) -> None:
    vqvae_file(tmp_path / "ice_image.pt", vqvae_state())
    import_weights("icetk-image", tmp_path / "ice_image.pt", tmp_path / "src", Wanted())
    export_weights("icetk-image", open_collection(tmp_path / "src"), tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt", weights_only=True)["module"]
    assert found.keys() == vqvae_state().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in vqvae_state().items())
    import_weights("icetk-image", tmp_path / "out.pt", tmp_path / "back", Wanted())
    ours, theirs = (WeightsFolder(tmp_path / name).facts.models.icetk_image for name in ("src", "back"))
    assert ours is not None and theirs is not None and ours.sha256 == theirs.sha256


@pytest.mark.parametrize(
    ("options", "name", "words"),
    [
        ({"parts": 3}, "out", "4 heads cannot be cut"),
        ({"parts": 0}, "out", "4 heads cannot be cut|parts"),
        ({"parts": 2, "layout": "plain"}, "out.pt", "have parts"),
        ({"layout": "plain"}, "out.txt", "none of the endings"),
        ({}, "src", "exists already"),
        ({}, "w.pt", "exists already"),
        ({"layout": "plain"}, "w.pt", "exists already"),
    ],
)
def test_exports_that_cannot_be(tmp_path: Path, options: dict, name: str, words: str) -> None:
    source = _folder(tmp_path, "coglm")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(CheckpointError, match=words):
        export_weights("coglm", open_collection(source), tmp_path / name, **options)
    assert sorted(os.listdir(tmp_path)) == before
    with pytest.raises(CheckpointError, match="holds no direct-sr"):
        export_weights("direct-sr", open_collection(source), tmp_path / "x")


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __init__(self, file: object) -> None:
            self.left = 1000

        def write(self, data: object) -> int:
            raise OSError(28, "No space left on device")

        flush = __init__

    keeper = exporting._Keeper
    monkeypatch.setattr(exporting, "_Keeper", lambda file: keeper(Full(file)))  # type: ignore[arg-type]
    with pytest.raises(RunDirectoryError, match="the disk is full"):
        save_torch(tmp_path / "w.pt", {"a": torch.ones(9)})
    source = _folder(tmp_path, "coglm")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(RunDirectoryError, match="the disk is full"):
        export_weights("coglm", open_collection(source), tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == before


def test_a_staged_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError), staged_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("x")
        raise ValueError
    assert not os.listdir(tmp_path)
    (tmp_path / "b").mkdir()
    with staged_folder(tmp_path / "b") as folder:
        (folder / "x").write_text("x")
    assert os.listdir(tmp_path) == ["b"] and os.listdir(tmp_path / "b") == ["x"]
