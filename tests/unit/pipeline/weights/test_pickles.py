import builtins
import codecs
import functools
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from published_weights import Evil, plain_pickle, save_archive

from cogview2.pipeline.errors import CheckpointError
from cogview2.pipeline.weights import pickles
from cogview2.pipeline.weights.archives import open_archive
from cogview2.pipeline.weights.pickles import Inert, globals_of

MARK = "executed"
EVIL: dict[str, Evil] = {
    "posix.system": Evil(os.system, f"touch {MARK}"),
    "io.open": Evil(open, MARK, "w"),
    "builtins.eval": Evil(eval, f"open({MARK!r}, 'w')"),
    "builtins.exec": Evil(exec, f"open({MARK!r}, 'w')"),
    "builtins.__import__": Evil(__import__, "antigravity"),
    "builtins.getattr": Evil(getattr, "text", "upper"),
    "builtins.bytearray": Evil(bytearray, 2**45),
    "functools.partial": Evil(functools.partial, print, 1),
    "Popen": Evil(subprocess.Popen, ["touch", MARK]),
    "os.makedirs": Evil(os.makedirs, MARK),
    "pickle.loads": Evil(pickle.loads, b"N."),
    "torch.serialization.load": Evil(torch.load, MARK),
    "torch.storage._load_from_bytes": Evil(torch.storage._load_from_bytes, b"N."),
    "torch._utils._rebuild_sparse_tensor": Evil(torch._utils._rebuild_sparse_tensor, torch.sparse_coo, ()),
    "torch._utils._rebuild_meta_tensor_no_storage": Evil(
        torch._utils._rebuild_meta_tensor_no_storage, torch.float32, (2**40,), (1,), False
    ),
    "torch._tensor._rebuild_from_type_v2": Evil(
        torch._tensor._rebuild_from_type_v2, print, torch.Tensor, (), {}
    ),
}


@pytest.mark.parametrize("form", ["zip", "before 1.6", "plain"])
@pytest.mark.parametrize("name", EVIL)
def test_any_other_global_refuses_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, form: str
) -> None:
    monkeypatch.chdir(tmp_path)
    value = {"module": {"a": torch.ones(2) if form != "plain" else 1}, "more": [(EVIL[name],)]}
    path = tmp_path / "w.pt"
    if form == "plain":
        plain_pickle(path, value)
    else:
        torch.save(value, path, _use_new_zipfile_serialization=form == "zip")
    before = set(os.listdir(tmp_path))
    with pytest.raises(CheckpointError) as caught:
        open_archive(path)
    assert str(path) in str(caught.value) and name in str(caught.value)
    assert "nothing in it was executed" in str(caught.value)
    assert set(os.listdir(tmp_path)) == before


def test_newer_protocols_hide_no_global(tmp_path: Path) -> None:
    value = {"a": torch.ones(2), "evil": Evil(os.system, f"touch {MARK}")}
    torch.save(value, tmp_path / "w.pt", pickle_protocol=4)
    with pytest.raises(CheckpointError, match=r"posix\.system"):
        open_archive(tmp_path / "w.pt")


def test_extension_codes_are_globals() -> None:
    assert list(globals_of(io.BytesIO(b"\x80\x02\x82\x07."))) == ["copyreg extension 7"]
    assert list(globals_of(io.BytesIO(b"c__builtin__\neval\n."))) == ["builtins.eval"]
    assert list(globals_of(io.BytesIO(b"(ios\nsystem\n."))) == ["os.system"]


@pytest.mark.parametrize("legacy", [False, True])
def test_training_states_of_the_published_archives_are_let_in_unbuilt(
    tmp_path: Path, legacy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_archive(tmp_path / "w.pt", {"module": {"a": torch.arange(6.0)}}, legacy=legacy)
    data = (tmp_path / "w.pt").read_bytes()
    for name in (b"numpy.core.multiarray", b"loss_scaler\nLossScaler", b"zero.config\nZeroStageEnum"):
        assert name in data
    built: list[object] = []
    monkeypatch.setattr(Inert, "__setstate__", lambda self, state: built.append(self))
    before = set(sys.modules)
    archive = open_archive(tmp_path / "w.pt")
    assert torch.equal(archive.tensors["module.a"].rows(0, 6), torch.arange(6.0))
    assert archive.values["iteration"] == 432000
    assert built and all(type(value) is Inert for value in built)
    assert not any(name.startswith("deepspeed") for name in set(sys.modules) - before)


def test_the_allow_lists_hold_nothing_that_acts() -> None:
    # Of all that torch builds itself, only tensors and plain containers; of all else, nothing is ever looked up.
    for name in (*pickles._LOADED, *pickles._INERT):
        module = name.rpartition(".")[0]
        assert module not in (
            "os",
            "posix",
            "sys",
            "subprocess",
            "functools",
            "operator",
            "importlib",
            "shutil",
        )
    allowed = {name for name in pickles._LOADED if name.startswith("builtins.")}
    assert allowed == {"builtins.set"} and builtins.set is set
    assert len(pickles._INERT) <= 12


def test_safe_globals_do_not_stay_behind(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "w.pt")
    before = set(torch.serialization.get_safe_globals())
    open_archive(tmp_path / "w.pt")
    assert set(torch.serialization.get_safe_globals()) == before


class _Odd:
    def __reduce__(self) -> Any:
        return torch.Size, ([1, 2],), {"more": 1}


def test_opcodes_that_the_restricted_loader_lacks_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1), "odd": _Odd()}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="nothing in it was executed") as caught:
        open_archive(tmp_path / "w.pt")
    assert "weights_only" not in str(caught.value)


class _Swelling:
    """Bytes that every level of unpickling makes twice as long."""

    def __init__(self, levels: int, codec: str) -> None:
        self.levels, self.codec = levels, codec

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        inner = b"12" if self.levels == 0 else _Swelling(self.levels - 1, self.codec)
        return codecs.encode, (inner, self.codec)


@pytest.mark.parametrize("form", ["zip", "before 1.6"])
@pytest.mark.parametrize("codec", ["hex", "HEX-codec", "base64", "uu"])
def test_a_few_bytes_cannot_become_many(tmp_path: Path, codec: str, form: str) -> None:
    state = {"a": torch.ones(2), "more": _Swelling(12, codec)}
    torch.save(state, tmp_path / "w.pt", _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError, match="encodes bytes in a way that weights never do"):
        open_archive(tmp_path / "w.pt")
