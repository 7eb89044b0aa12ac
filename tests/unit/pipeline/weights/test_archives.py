import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from published_weights import raw_safetensors, rewrite_member
from safetensors.torch import save_file

from cogview2.pipeline.errors import CheckpointError
from cogview2.pipeline.weights.archives import open_archive
from cogview2.pipeline.weights.blocks import Blocks


def _state() -> dict[str, torch.Tensor]:
    whole = torch.arange(60.0).reshape(6, 10)
    return {
        "matrix": whole,
        "half": whole.half(),
        "brain": whole.bfloat16(),
        "part": whole[2:4],
        "turned": whole.T,
        "number": torch.tensor(3.0),
        "none": torch.empty(0, 4),
    }


def _read(path: Path) -> dict[str, torch.Tensor]:
    return {name: Blocks.of(tensor).tensor() for name, tensor in open_archive(path).tensors.items()}


@pytest.mark.parametrize("legacy", [False, True])
def test_torch_files_hold_what_was_saved(tmp_path: Path, legacy: bool) -> None:
    state = _state()
    nested = {"module": state, "iteration": 7, "deep": {"er": torch.nn.Parameter(torch.ones(2))}}
    torch.save(nested, tmp_path / "w.bin", _use_new_zipfile_serialization=not legacy)
    found = _read(tmp_path / "w.bin")
    assert set(found) == {f"module.{name}" for name in state} | {"deep.er"}
    for name, tensor in state.items():
        assert found[f"module.{name}"].dtype == tensor.dtype
        assert torch.equal(found[f"module.{name}"], tensor), name
    assert open_archive(tmp_path / "w.bin").values == {"iteration": 7}


def test_safetensors_hold_what_was_saved(tmp_path: Path) -> None:
    state = {name: tensor.contiguous().clone() for name, tensor in _state().items()}
    save_file(state, tmp_path / "misnamed.pt", {"format": "pt"})
    found = _read(tmp_path / "misnamed.pt")
    assert set(found) == set(state)
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def _entry(begin: Any, end: Any, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BAD_HEADERS: dict[str, tuple[Any, bytes]] = {
    "not JSON": (b"{" * 40, b""),
    "deeply nested": (b"[" * 100_000, b""),
    "not UTF-8": (b"\xff\xfe{}", b""),
    "a list": ([1, 2], b""),
    "past the end": ({"a": _entry(0, 8)}, b"1234"),
    "negative": ({"a": _entry(-8, 0)}, b"12345678"),
    "backwards": ({"a": _entry(8, 0)}, b"12345678"),
    "overlapping": ({"a": _entry(0, 8), "b": _entry(4, 12)}, b"123456789012"),
    "hole": ({"a": _entry(0, 8), "b": _entry(12, 20)}, b"1" * 20),
    "rest": ({"a": _entry(0, 8)}, b"1" * 20),
    "shape and bytes": ({"a": _entry(0, 8, (3,))}, b"12345678"),
    "negative shape": ({"a": _entry(0, 8, (-1, -2))}, b"12345678"),
    "shape of bools": ({"a": _entry(0, 4, (True,))}, b"1234"),
    "giant shape": ({"a": _entry(0, 8, (2**40, 2**40))}, b"12345678"),
    "no such dtype": ({"a": _entry(0, 8, (2,), "F33")}, b"12345678"),
    "dtype of a list": ({"a": _entry(0, 8, (2,), ["F32"])}, b"12345678"),
    "text offsets": ({"a": _entry("0", "8")}, b"12345678"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, b"12345678"),
    "entry is a number": ({"a": 3}, b""),
    "twice": (b'{"a":%s,"a":%s}' % ((json.dumps(_entry(0, 8)).encode(),) * 2), b"12345678"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_safetensors_are_refused(tmp_path: Path, case: str) -> None:
    path = raw_safetensors(tmp_path / "w.safetensors", *BAD_HEADERS[case])
    with pytest.raises(CheckpointError, match="is not a whole safetensors file") as caught:
        open_archive(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300 + len(str(path))


@pytest.mark.parametrize("claimed", [10 * 2**30, 2**62, 2**64 - 1])
def test_a_giant_header_is_not_read(tmp_path: Path, claimed: int) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(claimed.to_bytes(8, "little") + b"{}")
    os.truncate(path, 11 * 2**30)  # sparse: the bytes would be there to read
    with pytest.raises(CheckpointError, match="its header claims"):
        open_archive(path)


FOREIGN = {
    b"": "is empty",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n": "git lfs pull",
    b"<!DOCTYPE html><html><body>404</body></html>": "web page",
    b"\n<html>": "web page",
    b"\x1f\x8b\x08\x00": "gzip",
    b"\x93NUMPY\x01\x00": "NumPy",
    b"\0" * 257 + b"ustar" + b"\0" * 250: "tar archive",
    b"PK\x03\x04 and then nothing": "damaged",
    b"\x80\x02}q\x00.": "damaged",
    b"hello": "not a whole safetensors file",
}


@pytest.mark.parametrize("content", FOREIGN, ids=list(FOREIGN.values()))
def test_other_files_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=FOREIGN[content]):
        open_archive(tmp_path / "w.pt")


def test_only_plain_files_are_opened(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    os.mkfifo(tmp_path / "pipe")
    for name, words in (
        (".", "is a folder"),
        ("pipe", "not a plain"),
        ("no", "not exist"),
    ):
        with pytest.raises(CheckpointError, match=words):
            open_archive(tmp_path / name)
    assert open_archive(tmp_path / "link").tensors.keys() == {"a"}


def _torch_file(path: Path) -> Path:
    torch.save({"a": torch.ones(1000), "b": torch.ones(3)}, path)
    return path


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_cut_torch_file_is_refused(tmp_path: Path, keep: float, legacy: bool) -> None:
    torch.save({"a": torch.ones(1000)}, tmp_path / "w", _use_new_zipfile_serialization=not legacy)
    data = (tmp_path / "w").read_bytes()
    (tmp_path / "w").write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(CheckpointError, match="damaged"):
        open_archive(tmp_path / "w")


def _rezip(path: Path, **names: Any) -> None:
    with zipfile.ZipFile(path) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    method = names.get("method", zipfile.ZIP_STORED)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members:
            archive.writestr(names.get("rename", {}).get(name.rpartition("/")[2], name), data)
        for name in names.get("more", ()):
            archive.writestr(name, b"x")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": zipfile.ZIP_DEFLATED}, "compressed"),
        ({"more": ["../../etc/evil"]}, "lies outside"),
        ({"more": ["/etc/evil"]}, "lies outside"),
        ({"more": ["w/../evil"]}, "lies outside"),
        ({"more": ["other/file"]}, "lies outside"),
        ({"more": ["x/data.pkl"]}, "2 object trees"),
        ({"rename": {"data.pkl": "w/other.pkl"}}, "0 object trees"),
        ({"more": ["w/constants.pkl"]}, "TorchScript"),
        ({"more": ["w/version"]}, "two members have one name"),
        ({"rename": {"0": "w/data/7"}}, "damaged"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_bad_zip_archives_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = _torch_file(tmp_path / "w.pt")
    _rezip(path, **changes)
    with pytest.raises(CheckpointError, match=words):
        open_archive(path)


def test_an_archive_that_was_packed_again_is_read_right(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(9.0), "b": torch.ones(3)}, tmp_path / "w.pt")
    _rezip(tmp_path / "w.pt", more=["w/.data/note"])
    found = _read(tmp_path / "w.pt")
    assert torch.equal(found["a"], torch.arange(9.0)) and torch.equal(found["b"], torch.ones(3))


def test_the_byte_order_of_another_machine_is_refused(tmp_path: Path) -> None:
    path = _torch_file(tmp_path / "w.pt")
    rewrite_member(path, "byteorder", lambda _: b"big")
    with pytest.raises(CheckpointError, match="byte order"):
        open_archive(path)


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path: Path) -> None:
    path = _torch_file(tmp_path / "w.pt")
    # The claim of 1000 numbers (as a 2-byte integer) becomes 60000: in the storage's size and in the tensor's.
    rewrite_member(path, "data.pkl", lambda data: data.replace(b"M\xe8\x03", b"M\x60\xea"))
    with pytest.raises(CheckpointError, match="damaged"):
        open_archive(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_small_storage_does_not_pose_as_a_giant_tensor(tmp_path: Path, legacy: bool) -> None:
    bomb = {"a": torch.ones(1).expand(2**40)}
    torch.save(bomb, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match="of which fewer are stored"):
        open_archive(tmp_path / "w.pt")


def test_a_tree_without_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"a": 1, "b": [torch.ones(2)]}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="holds no named tensors"):
        open_archive(tmp_path / "w.pt")


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1000)}, tmp_path / "w")
    archive = open_archive(tmp_path / "w")
    os.truncate(tmp_path / "w", 500)
    with pytest.raises(CheckpointError, match="became shorter"):
        Blocks.of(archive.tensors["a"]).tensor()


def test_a_wide_tree_of_repeated_tables_is_refused_in_time(tmp_path: Path) -> None:
    wide = {f"k{i}": 1 for i in range(2000)}
    torch.save({f"t{i}": {"x": wide} for i in range(2000)}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="more than 1,000,000 values"):
        open_archive(tmp_path / "w.pt")


def test_a_modules_own_state_dict_from_a_gpu(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    torch.save({"module": module.state_dict()}, tmp_path / "w.pt")
    assert torch.equal(_read(tmp_path / "w.pt")["module.0.weight"], module[0].weight)
    place, gpu = b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"
    rewrite_member(tmp_path / "w.pt", "data.pkl", lambda data: data.replace(place, gpu))
    assert torch.equal(_read(tmp_path / "w.pt")["module.0.weight"], module[0].weight)


@pytest.mark.parametrize("extra", range(0, 264, 8))
def test_every_length_of_a_header_is_read(tmp_path: Path, extra: int) -> None:
    """The first byte is the low one of the header's length; 0x80 is also how a pickle begins."""
    name = "a" * (1 + extra)
    save_file({name: torch.ones(2)}, tmp_path / "w.safetensors")
    archive = open_archive(tmp_path / "w.safetensors")
    assert archive.form == "safetensors" and list(archive.tensors) == [name]


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    save_file({}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        open_archive(tmp_path / "w.safetensors")


def test_a_transposed_tensor_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.arange(4096.0).view(64, 64).T}, tmp_path / "w.pt")
    stored = open_archive(tmp_path / "w.pt").tensors["a"]
    reads: list[int] = []
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *arguments: reads.append(1) or read(*arguments))
    rows = torch.cat([stored.rows(row, row + 1) for row in range(64)])
    assert torch.equal(rows, torch.arange(4096.0).view(64, 64).T) and len(reads) == 1
