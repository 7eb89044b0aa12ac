import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cogview2.pipeline.errors import CheckpointError
from cogview2.pipeline.weights_manifest import digests, is_weights_folder, read_manifest


def _write(folder: Path, content: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "weights.json").write_text(content if isinstance(content, str) else json.dumps(content))


def test_digests_of_what_is_there(tmp_path: Path) -> None:
    entry = {"file": "a.pt", "bytes": 3, "sha256": "ab"}
    _write(tmp_path, {"format": 1, "models": {"coglm": entry, "icetk-image": entry | {"sha256": "cd"}}})
    (tmp_path / "a.pt").write_bytes(b"123")
    assert is_weights_folder(tmp_path)
    assert digests(tmp_path, ["coglm", "icetk-image"]) == {"coglm": "ab", "icetk-image": "cd"}
    with pytest.raises(CheckpointError, match="holds no direct-sr .it holds coglm, icetk-image."):
        digests(tmp_path, ["direct-sr"])
    (tmp_path / "a.pt").write_bytes(b"1234")
    with pytest.raises(CheckpointError, match="has 4 bytes, but"):
        digests(tmp_path, ["coglm"])
    (tmp_path / "a.pt").unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        digests(tmp_path, ["coglm"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("\udcff", "cannot be read"),
        (" " * 5_000_000, "larger than"),
        ([], "has format None"),
        ({"format": 9}, "has format 9"),
        ({"format": 1, "models": {"coglm": 3}}, "no table of models"),
    ],
)
def test_other_content_is_refused(tmp_path: Path, content: Any, words: str) -> None:
    if content == "\udcff":
        (tmp_path / "weights.json").write_bytes(b"\xff")
    else:
        _write(tmp_path, content)
    with pytest.raises(CheckpointError, match=words):
        read_manifest(tmp_path)


@pytest.mark.parametrize("entry", [{"file": "../x", "bytes": 1}, {"file": "", "bytes": 1}, {"bytes": 1}])
def test_files_stay_in_the_folder(tmp_path: Path, entry: dict[str, Any]) -> None:
    _write(tmp_path, {"format": 1, "models": {"coglm": entry | {"sha256": "x"}}})
    with pytest.raises(CheckpointError, match="as the file of coglm"):
        digests(tmp_path, ["coglm"])


def test_no_folder_at_all(tmp_path: Path) -> None:
    assert not is_weights_folder(tmp_path) and not is_weights_folder(tmp_path / "none")
    with pytest.raises(CheckpointError, match="is no weights folder"):
        digests(tmp_path / "none", [])


def test_it_needs_no_torch() -> None:
    code = "import sys, cogview2.pipeline.weights_manifest as m; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
