import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from published_weights import (
    Evil,
    plain_pickle,
    raw_safetensors,
    sat_directory,
    transformer_state,
    vqvae_file,
    vqvae_state,
)

from cogview2.pipeline.weights.folder import WeightsFolder
from cogview2.stages.commands.weights import main


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _import(kind: str, source: str, target: str, *more: str) -> int:
    return main(["import", "--kind", kind, source, target, *more])


def test_in_and_out_by_the_command_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sat_directory(place / "sat", transformer_state(), parts=2)
    assert _import("coglm", "sat", "w") == 0
    out = capsys.readouterr().out
    count = sum(tensor.numel() for tensor in transformer_state().values())
    assert f"coglm: {count:,} parameters, float16" in out and "np_rng" not in out
    assert main(["export", "--kind", "coglm", "w", "out", "--tensor-parallel", "4"]) == 0
    assert len(os.listdir(place / "out" / "432000")) == 4
    assert main(["export", "--kind", "coglm", "w", "f.pt", "--layout", "plain", "--dtype", "float32"]) == 0
    assert (
        torch.load(place / "f.pt", weights_only=True)["transformer.final_layernorm.bias"].dtype
        == torch.float32
    )
    assert main(["show", "w", "--verify"]) == 0
    assert "2 layers, 16 hidden, 4 heads, 30 ids" in capsys.readouterr().out


def test_options_of_an_import_reach_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = transformer_state() | {"extra": torch.ones(1)}
    torch.save(state, place / "c.pt")
    assert _import("coglm", "c.pt", "w") == 78  # heads unknown
    assert _import("coglm", "c.pt", "w", "--heads", "4", "--strict") == 78
    options = ["--heads", "4", "--rows", "20", "--dtype", "bfloat16", "--rate", "4"]
    assert _import("coglm", "c.pt", "w", *options) == 0
    assert "extra" in capsys.readouterr().err
    facts = WeightsFolder(place / "w").facts
    assert facts.models.coglm is not None and facts.models.coglm.config.heads == 4
    assert (facts.models.coglm.rows, facts.models.coglm.dtype, facts.data.compression_rate) == (
        20,
        "bfloat16",
        4,
    )
    assert _import("coglm", "c.pt", "w", "--heads", "2") == 78
    (place / "sizes.json").write_text(json.dumps({"num_attention_heads": 8}))
    assert _import("coglm", "c.pt", "w", "--config", "sizes.json", "--replace") == 0
    coglm = WeightsFolder(place / "w").facts.models.coglm
    assert coglm is not None and coglm.config.heads == 8
    state["transformer.final_layernorm.bias"][0] = float("inf")
    torch.save(state, place / "c.pt")
    assert _import("coglm", "c.pt", "v", "--heads", "4") == 78
    assert _import("coglm", "c.pt", "v", "--heads", "4", "--allow-nonfinite") == 0


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["import", "a", "b"],
        ["import", "--kind", "gpt", "a", "b"],
        ["export", "a", "b"],
        ["show"],
        ["import", "--kind", "coglm", "a", "b", "--rate", "5"],
    ],
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 64 and "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--heads", "--rows", "--image-codes"])
def test_sizes_below_one_are_refused(place: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _import("coglm", "c.pt", "w", option, "0") == 78
    assert "is no size" in capsys.readouterr().err and not os.listdir(place)


@pytest.mark.parametrize("command", [["bundle"], ["export", "--bundle"]])
def test_a_bundle_has_the_clusters_that_src_would_draw_with(place: Path, command: list[str]) -> None:
    vqvae_file(place / "i.pt", vqvae_state())
    assert _import("icetk-image", "i.pt", "w") == 0
    np.save(place / "labels.npy", np.arange(12) % 7)
    assert _import("clusters", "labels.npy", "w") == 0
    assert main([*command, "w", "out"]) == 0
    labels = WeightsFolder(place / "out").labels()
    assert labels is not None and labels.tolist() == [i % 7 for i in range(12)]


def test_show_lists_a_file_and_a_directory(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sat_directory(place / "sat", transformer_state(extra="direct"), parts=2)
    for path in ("sat", "sat/432000/mp_rank_00_model_states.pt"):
        assert main(["show", path]) == 0
        out = capsys.readouterr().out
        assert "looks like: direct-sr" in out
        assert any(line.split()[:2] == ["2", "x"] and "layers.*.mlp" in line for line in out.splitlines())
    assert "[48, 16]" not in out  # a part is shown as it is
    assert main(["show", "sat", "--verify"]) == 78


def test_verify_notices_a_flipped_bit(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(transformer_state(), place / "c.pt")
    _import("coglm", "c.pt", "w", "--heads", "4")
    file = place / "w" / "coglm.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)
    assert main(["show", "w"]) == 0
    assert main(["show", "w", "--verify"]) == 78
    assert "sha256" in capsys.readouterr().err


def _hostile(place: Path) -> dict[str, str]:
    """Write hostile and broken sources; return path -> a word of the answer."""
    state = transformer_state()
    evil = Evil(os.system, "touch PICKLE_WAS_EXECUTED.marker")
    plain_pickle(place / "pickle.pth", evil)
    torch.save(state | {"x": evil}, place / "zip.pt")
    torch.save({"module": evil}, place / "old.pt", _use_new_zipfile_serialization=False)
    sat_directory(place / "sat", state, parts=2)
    torch.save({"module": state, "np_rng_state": evil}, place / "sat/432000/mp_rank_01_model_states.pt")
    (place / "empty.pt").write_bytes(b"")
    (place / "page.pt").write_text("<!DOCTYPE html>")
    (place / "pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
    (place / "link.pt").symlink_to(place / "zip.pt")
    torch.save(state, place / "cut.pt", _use_new_zipfile_serialization=False)
    os.truncate(place / "cut.pt", 3000)
    raw_safetensors(
        place / "h.safetensors", {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1"
    )
    (place / "m.index.json").write_text(json.dumps({"weight_map": {"a": "zip.pt"}}))
    return {
        "pickle.pth": "posix.system",
        "zip.pt": "posix.system",
        "old.pt": "posix.system",
        "sat": "posix.system",
        "m.index.json": "posix.system",
        "empty.pt": "empty",
        "page.pt": "web page",
        "pointer.pt": "git lfs",
        "link.pt": "posix.system",
        "cut.pt": "damaged",
        "h.safetensors": "past the end",
        "nothing.pt": "does not exist",
    }


def test_hostile_sources_are_refused_in_a_sentence_and_leave_nothing(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = _hostile(place)
    torch.save(transformer_state(), place / "good.pt")
    assert _import("coglm", "good.pt", "held", "--heads", "4") == 0
    capsys.readouterr()
    held = {path.name: path.read_bytes() for path in (place / "held").iterdir()}
    before = sorted(os.listdir(place))
    for source, word in expected.items():
        for target in ("new", "held"):
            assert _import("coglm", source, target, "--heads", "4", "--replace") == 78, source
            error = capsys.readouterr().err
            assert error.count("\n") == 1 and word in error, error
            assert source in error or source == "m.index.json"
        assert main(["show", source]) == 78
        assert word in capsys.readouterr().err
    assert sorted(os.listdir(place)) == before
    assert {path.name: path.read_bytes() for path in (place / "held").iterdir()} == held


def test_known_bad_checkpoints(fixtures: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in sorted((fixtures / "data/bad/checkpoints").iterdir()):
        for kind in ("coglm", "direct-sr", "iterative-sr", "icetk-image", "icetk-text", "clusters"):
            assert _import(kind, str(path), "dst") == 78
            assert capsys.readouterr().err.count("\n") == 1
    assert not os.listdir(place)


def test_a_full_disk_is_code_73_and_leaves_nothing(place: Path) -> None:
    torch.save(transformer_state(dtype=torch.float32, rows=5000), place / "c.pt")
    code = (
        "import resource, sys; from cogview2.stages.commands.weights import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); sys.exit(main(sys.argv[1:]))"
    )
    command = ["import", "--kind", "coglm", "c.pt", "dst", "--heads", "4"]
    result = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, check=False
    )
    assert result.returncode == 73, result.stderr
    assert "cannot write" in result.stderr and result.stderr.count("\n") == 1
    assert os.listdir(place) == ["c.pt"]


def test_a_full_disk_during_an_export(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(transformer_state(dtype=torch.float32, rows=5000), place / "c.pt")
    assert _import("coglm", "c.pt", "w", "--heads", "4") == 0
    before = sorted(os.listdir(place))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        assert main(["export", "--kind", "coglm", "w", "out"]) == 73
        assert main(["bundle", "w", "bundle"]) == 73
        assert main(["export", "--kind", "coglm", "w", "x.safetensors", "--layout", "plain"]) == 73
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(os.listdir(place)) == before
