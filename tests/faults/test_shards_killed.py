"""Shard writing that is killed, or finds the disk full, anywhere: what was there verifies, and a rerun gives the same bytes."""

import json
import random
import signal
from collections import Counter
from pathlib import Path

import pytest
from shard_jobs import NO_RIGHT, SPLIT, expected, in_a_process, on_a_small_disk, points, write_split
from small_shards import read_all
from tiny_runs import digests

from cogview2.pipeline import fsops
from cogview2.pipeline.data import shard_writer
from cogview2.pipeline.data.shard_index import MANIFEST
from cogview2.pipeline.errors import ExitCode

KILLS = 30
SEED = 20260102


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], list[str]]:
    """The bytes of an undisturbed run, and the fault points it passed."""
    stage = tmp_path_factory.mktemp("reference")
    passed = points(lambda: write_split(stage))
    assert not read_all(stage / "output" / SPLIT, expected()).errors
    return digests(stage / "output"), passed


def numbered(passed: list[str]) -> list[tuple[str, int]]:
    """Name every point with its number among those of its kind."""
    count: Counter[str] = Counter()
    found = []
    for name in passed:
        count[name] += 1
        found.append((name, count[name]))
    return found


def finished_shards(stage: Path) -> list[str]:
    """The shards that are recorded as done and are what the record says."""
    found = []
    for path in sorted((stage / "progress" / SPLIT).glob("*.json")):
        entry = json.loads(path.read_text())["entry"]
        assert fsops.sha256_file(stage / "output" / SPLIT / entry["name"]) == entry["sha256"]
        found.append(entry["name"])
    return found


def check_rest(stage: Path) -> None:
    """A data set that is not finished is none; one that has its manifest is whole."""
    folder = stage / "output" / SPLIT
    if (folder / MANIFEST).exists():
        assert not read_all(folder, expected()).errors
    for path in folder.glob("*.tar"):  # whole under its final name, always
        assert path.stat().st_size % 512 == 0 and path.read_bytes()[-1024:] == bytes(1024)


def test_killed_anywhere_then_rerun_gives_the_same_bytes(
    tmp_path: Path, reference: tuple[dict[str, str], list[str]]
) -> None:
    bytes_of_all, passed = reference
    chosen = random.Random(SEED).sample(numbered(passed), KILLS)
    kinds: Counter[str] = Counter()
    for number, (point, n) in enumerate(chosen):
        stage = tmp_path / str(number)
        code, said = in_a_process(lambda: write_split(stage), f"{point}:kill:n={n}")  # noqa: B023 - runs now
        assert code == -signal.SIGKILL, (point, n, code, said)
        kept = finished_shards(stage)
        check_rest(stage)
        before = {name: (stage / "output" / SPLIT / name).stat().st_mtime_ns for name in kept}
        code, said = in_a_process(lambda: write_split(stage))  # noqa: B023
        assert code == 0, (point, n, said)
        assert digests(stage / "output") == bytes_of_all, (point, n)
        for name, moment in before.items():  # what was done is not done again
            assert (stage / "output" / SPLIT / name).stat().st_mtime_ns == moment
        kinds[point] += 1
    print(f"{KILLS} kills of {len(passed)} points, seed {SEED}: {dict(kinds)}")
    assert {"fsops.write", "fsops.fsync", "fsops.rename", "fsops.fsync_dir"} <= set(kinds)


def test_mutant_writing_in_place_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard written straight under its name, half of it when the process is killed: `check_rest` must object."""

    def in_place(path: Path, data: bytes, **_: object) -> None:
        path.write_bytes(data[: len(data) // 3])
        fsops.hit(f"torn{path.suffix}")
        path.write_bytes(data)

    def mutant() -> None:
        monkeypatch.setattr(shard_writer.fsops, "write_bytes", in_place)
        write_split(tmp_path)

    code, _ = in_a_process(mutant, "torn.tar:kill:n=3")
    assert code == -signal.SIGKILL
    with pytest.raises(AssertionError):
        check_rest(tmp_path)


def test_mutant_believing_any_shard_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With records that are not compared with the files, a damaged shard would stay in the set."""
    stage = tmp_path / "stage"
    code, said = in_a_process(lambda: write_split(stage), "fsops.rename:kill:n=8")
    assert code == -signal.SIGKILL, said
    name = finished_shards(stage)[0]
    path = stage / "output" / SPLIT / name
    path.write_bytes(path.read_bytes().replace(b"picture", b"torture"))
    code, _ = in_a_process(lambda: write_split(stage))
    assert code == 0 and not read_all(path.parent, expected()).errors  # noticed, and written again

    path.write_bytes(path.read_bytes().replace(b"picture", b"torture"))

    def mutant() -> None:
        real = fsops.sha256_file
        entries = {
            entry["name"]: entry["sha256"]
            for record in (stage / "progress" / SPLIT).glob("*.json")
            for entry in [json.loads(record.read_text())["entry"]]
        }
        monkeypatch.setattr(fsops, "sha256_file", lambda file: entries.get(file.name) or real(file))
        write_split(stage)

    assert in_a_process(mutant)[0] == 0
    assert read_all(path.parent, expected()).errors


@pytest.mark.parametrize(("action", "remedy"), [("enospc", "the disk is full"), ("erofs", "read-only")])
@pytest.mark.parametrize("point", ["write", "fsync", "rename", "fsync_dir"])
def test_a_disk_that_takes_no_more(
    tmp_path: Path, reference: tuple[dict[str, str], list[str]], point: str, action: str, remedy: str
) -> None:
    """One sentence with path and remedy, no half file, what was done verifies, and a rerun ends the work."""
    last = sum(name == f"fsops.{point}" for name in reference[1])
    for n in (last // 2, last):
        stage = tmp_path / f"{n}"
        code, said = in_a_process(lambda: write_split(stage), f"fsops.{point}:{action}:n={n}")  # noqa: B023
        assert code == ExitCode.CANNOT_WRITE, said
        assert remedy in said and str(stage) in said and "\n" not in said
        check_rest(stage)
        assert not [path for path in stage.rglob("*") if path.name.startswith(".")]
        finished_shards(stage)
        assert in_a_process(lambda: write_split(stage))[0] == 0  # noqa: B023
        assert digests(stage / "output") == reference[0]


@pytest.mark.parametrize("limit", [0, 1, 512, 4096, 9000])
def test_a_quota_on_the_size_of_files(
    tmp_path: Path, reference: tuple[dict[str, str], list[str]], limit: int
) -> None:
    code, said = in_a_process(lambda: write_split(tmp_path), file_limit=limit)
    assert code == ExitCode.CANNOT_WRITE, said
    assert "raise the limit (ulimit -f)" in said and str(tmp_path) in said and "\n" not in said
    check_rest(tmp_path)
    assert in_a_process(lambda: write_split(tmp_path))[0] == 0
    assert digests(tmp_path / "output") == reference[0]


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """Half of the shards fit; after room is made the rest is written, on the same disk."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def work(folder: Path) -> None:
        ballast = folder / "ballast"
        ballast.write_bytes(bytes(80 * 1024))
        try:
            write_split(folder / "stage")
        except Exception as error:
            check_rest(folder / "stage")
            done = len(finished_shards(folder / "stage"))
            assert 0 < done < 6, done
            assert "the disk is full" in str(error) and type(error).__name__ == "RunDirectoryError", error
            ballast.unlink()
            write_split(folder / "stage")
            assert not read_all(folder / "stage" / "output" / SPLIT, expected()).errors
        else:
            raise AssertionError("the disk was not full")

    code, said = in_a_process(on_a_small_disk(work, disk, "192k"))
    if code == NO_RIGHT:
        pytest.skip("no right to mount a small disk")
    assert code == 0, said
