"""Durable files are whole or absent, and errors that people can repair name path and remedy."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from cogview2.pipeline import fsops
from cogview2.pipeline.errors import RunDirectoryError


def test_write_and_read_back(tmp_path: Path) -> None:
    fsops.write_bytes(tmp_path / "a", b"\x00\x01")
    fsops.write_text(tmp_path / "b", "红 é\n")
    fsops.write_json(tmp_path / "c", {"k": [1, None, "红"]})
    assert (tmp_path / "a").read_bytes() == b"\x00\x01"
    assert (tmp_path / "b").read_text("utf-8") == "红 é\n"
    assert json.loads((tmp_path / "c").read_text("utf-8")) == {"k": [1, None, "红"]}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "b", "c"]


@pytest.mark.parametrize("step", ["fsync", "replace", "write"])
def test_a_failure_leaves_the_old_content_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "a"
    fsops.write_text(path, "old")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if step == "write":
        monkeypatch.setattr(os, "fdopen", fail)
    else:
        monkeypatch.setattr(os, step, fail)
    with pytest.raises(RunDirectoryError, match=f"cannot write {path}: the disk is full; free space"):
        fsops.write_text(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_order_is_write_sync_rename_sync_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        log.append("sync folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "sync file")
        real_fsync(descriptor)

    def replace(source: Any, target: Any) -> None:
        log.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    fsops.write_text(tmp_path / "a", "x")
    assert log == ["sync file", "rename", "sync folder"]
    log.clear()
    with fsops.staged(tmp_path / "b") as temporary:
        temporary.write_text("y")
    assert log == ["sync file", "rename", "sync folder"]


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free space"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EFBIG, "ulimit"),
    ],
)
def test_errors_name_path_and_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    def fail(*_: Any, **__: Any) -> int:
        raise OSError(number, "x")

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(RunDirectoryError) as caught:
        fsops.write_text(tmp_path / "a", "x")
    assert str(tmp_path / "a") in str(caught.value) and remedy in str(caught.value)
    assert caught.value.exit_code == 73


def test_other_errors_are_not_disguised(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        fsops.write_text(tmp_path / "none" / "a", "x")


def test_staged_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stop"), fsops.staged(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise ValueError("stop")
    assert list(tmp_path.iterdir()) == []


def test_json_has_no_infinity(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        fsops.write_json(tmp_path / "a", {"loss": float("nan")})


def test_append_line_repairs_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    fsops.append_line(path, '{"step": 1}')
    with open(path, "ab") as file:
        file.write(b'{"step"')
    fsops.append_line(path, '{"step": 2}')
    assert path.read_text().split("\n") == ['{"step": 1}', '{"step"', '{"step": 2}', ""]
    with pytest.raises(ValueError, match="one line"):
        fsops.append_line(path, "a\nb")


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert (
        fsops.sha256_file(tmp_path / "a")
        == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


def test_remove_tree_renames_before_it_deletes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "step_1"
    (folder / "ds").mkdir(parents=True)
    (folder / "MANIFEST.json").write_text("{}")

    def killed(path: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fsops.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        fsops.remove_tree(folder)
    assert [entry.name.startswith(".trash.step_1.") for entry in tmp_path.iterdir()] == [True]
    monkeypatch.undo()
    fsops.remove_tree(next(tmp_path.iterdir()))
    assert list(tmp_path.iterdir()) == []


def test_remove_tree_does_not_follow_a_link(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    fsops.remove_tree(tmp_path / "link")
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept"]
    with pytest.raises(FileNotFoundError):
        fsops.remove_tree(tmp_path / "link")


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 B"), (512, "512 B"), (3_395_496, "3.4 MB"), (92_100_000_000, "92.1 GB")]
)
def test_bytes_in_words(count: int, words: str) -> None:
    assert fsops.byte_words(count) == words
