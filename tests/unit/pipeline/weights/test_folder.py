import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published_weights import transformer_state

from cogview2.pipeline.errors import CheckpointError
from cogview2.pipeline.models.coglm.model import CogLM
from cogview2.pipeline.weights.folder import WeightsFolder, alone, read_labels, update_facts
from cogview2.pipeline.weights.importing import Wanted, import_weights


@pytest.fixture
def folder(tmp_path: Path) -> WeightsFolder:
    torch.save(transformer_state(), tmp_path / "c.pt")
    import_weights("coglm", tmp_path / "c.pt", tmp_path / "dst", Wanted(heads=4))
    return WeightsFolder(tmp_path / "dst")


def test_the_model_is_that_of_the_stages_with_the_files_numbers(folder: WeightsFolder) -> None:
    assert folder.exists() and folder.kinds() == ("coglm",)
    model = folder.coglm()
    assert type(model) is CogLM and not model.training
    state, expected = model.state_dict(), transformer_state()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert folder.coglm(dtype=torch.float32).transformer.final_layernorm.weight.dtype == torch.float32


def test_what_is_not_there_is_named_with_the_remedy(folder: WeightsFolder, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match="holds no icetk-text .it holds coglm.; add it: cogview2 weights import"
    ):
        folder.vocabulary()
    with pytest.raises(CheckpointError, match="holds no direct-sr"):
        folder.direct()
    assert folder.labels() is None
    assert not WeightsFolder(tmp_path).exists()
    with pytest.raises(CheckpointError, match="is no weights folder"):
        WeightsFolder(tmp_path).kinds()


def _spoil(path: Path, change: Any) -> None:
    found = json.loads((path / "weights.json").read_text())
    change(found)
    (path / "weights.json").write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w["models"]["coglm"].update(file="../c.pt"), "names '../c.pt' as the file"),
        (lambda w: w["models"]["coglm"].update(file="/etc/passwd"), "names '/etc/passwd'"),
        (lambda w: w["models"]["coglm"].update(bytes=3), "bytes, but weights.json records 3"),
        (lambda w: w["models"]["coglm"]["config"].update(hidden=17), "not a multiple of heads"),
        (lambda w: w["models"]["coglm"]["config"].update(hidden=32), "does not fit the model"),
        (lambda w: w["models"]["coglm"].update(surprise=1), "Extra inputs"),
        (lambda w: w["models"].update(gpt={}), "Extra inputs"),
        (lambda w: w.update(format=2), "reads format 1"),
        (lambda w: w.update(models=[]), "no table of models"),
    ],
)
def test_a_spoilt_manifest_is_refused(folder: WeightsFolder, change: Any, words: str) -> None:
    _spoil(folder.path, change)
    with pytest.raises(CheckpointError, match=words):
        folder.coglm()


def test_a_missing_file_is_refused_and_a_link_followed(folder: WeightsFolder) -> None:
    file = folder.file("coglm")
    file.rename(file.with_name("x"))
    with pytest.raises(CheckpointError, match="is missing, the weights of coglm"):
        folder.coglm()
    file.mkdir()
    with pytest.raises(CheckpointError, match="is not a plain file"):
        folder.coglm()
    file.rmdir()
    file.symlink_to(file.with_name("x"))
    folder.coglm()


def test_writers_side_by_side_lose_nothing(tmp_path: Path) -> None:
    def add(seed: int) -> None:
        with alone(tmp_path / "dst"):
            update_facts(tmp_path / "dst", lambda old: old.model_copy(update={"seed": old.seed + 1}))

    threads = [threading.Thread(target=add, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert WeightsFolder(tmp_path / "dst").seed == 1234 + 12


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((3, 3), dtype=np.int64),
        np.zeros(3),
        np.array([0, 1, -1]),
        np.array([0, 1, 3]),
        np.zeros(0, dtype=np.int64),
        np.array([None]),
        np.array(["a"]),
    ],
    ids=str,
)
def test_other_arrays_are_no_clusters(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "c.npy", array, allow_pickle=True)
    with pytest.raises(CheckpointError, match="is no file of clusters") as caught:
        read_labels(tmp_path / "c.npy", None)
    assert "allow_pickle" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        b"\x93NUMPY\x01\x00",
        b"\x80\x02cposix\nsystem\n(S'touch executed'\ntR.",
        b"\x93NUMPY\x01\x00v\x00{'descr': '<i8', 'fortran_order': False, 'shape': (1099511627776,), }".ljust(
            127
        )
        + b"\n",
        b"\x93NUMPY\x01\x00v\x00{'descr': __import__('os').system('touch executed'), }".ljust(127) + b"\n",
    ],
)
def test_hostile_npy_files_are_refused(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.npy").write_bytes(content)
    with pytest.raises(CheckpointError, match="is no file of clusters"):
        read_labels(tmp_path / "c.npy", None)
    assert os.listdir(tmp_path) == ["c.npy"]


def test_clusters_by_a_link(tmp_path: Path) -> None:
    np.save(tmp_path / "c.npy", np.zeros(3, dtype=np.int64))
    (tmp_path / "l.npy").symlink_to(tmp_path / "c.npy")
    assert read_labels(tmp_path / "l.npy", 3).tolist() == [0, 0, 0]
    with pytest.raises(CheckpointError, match="is no plain file"):
        read_labels(tmp_path, None)
