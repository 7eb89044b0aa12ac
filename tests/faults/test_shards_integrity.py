"""Damaged shards: 200 flips, 100 cuts, and whole files missing, doubled, swapped or foreign; none reaches a batch.

Every protection has a mutant: switched off, its damage must go by in silence, or the test would prove nothing.
"""

import contextlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import small_shards
from small_shards import SAMPLES, SHARDS, Verdict, build, flip, random_place, read_all

from cogview2.pipeline.data import shard_index
from cogview2.pipeline.data.loader import StepLoader
from cogview2.pipeline.data.records import TokenPair
from cogview2.pipeline.data.sample_plan import SamplePlan
from cogview2.pipeline.data.shard_index import MANIFEST, ShardIndex, write_manifest
from cogview2.pipeline.data.shard_writer import index_name, write_shard
from cogview2.pipeline.errors import DataError

SEED = 20260101
FLIPS = 200
CUTS = 100
FIRST, SECOND = "train-000000.tar", "train-000001.tar"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[TokenPair]]:
    """A data set that nobody damages, and its samples."""
    folder = tmp_path_factory.mktemp("shards") / "train"
    return folder, build(folder)


@pytest.fixture
def folder(original: tuple[Path, list[TokenPair]], tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(original[0], tmp_path / "train"))


@pytest.fixture
def samples(original: tuple[Path, list[TokenPair]]) -> list[TokenPair]:
    """What was written."""
    return original[1]


def damaged(
    folder: Path, samples: list[TokenPair], count: int, damage: Callable[[Path, int, random.Random], str]
) -> Iterator[tuple[str, str, Verdict]]:
    """Yield (what was done, name of the file, verdict) for `count` damages, each of the whole set alone."""
    rng = random.Random(SEED)
    for number in range(count):
        path, at = random_place(folder, rng)
        good = path.read_bytes()
        what = f"seed {SEED}, number {number}: {path.name} {damage(path, at, rng)}"
        yield what, path.name, read_all(folder, samples)
        path.write_bytes(good)


def flip_one(path: Path, at: int, rng: random.Random) -> str:
    bit = rng.randrange(8)
    flip(path, at, bit)
    return f"byte {at}, bit {bit}"


def cut_one(path: Path, at: int, rng: random.Random) -> str:
    os.truncate(path, at)
    return f"cut to {at} bytes"


@pytest.mark.parametrize(("damage", "count"), [(flip_one, FLIPS), (cut_one, CUTS)])
def test_no_damage_goes_by_in_silence(
    folder: Path,
    samples: list[TokenPair],
    damage: Callable[[Path, int, random.Random], str],
    count: int,
) -> None:
    assert read_all(folder, samples) == Verdict(right=list(range(SHARDS * SAMPLES)))
    tried: dict[str, int] = {}
    for what, name, verdict in damaged(folder, samples, count, damage):
        assert not verdict.silent, what
        shard = name.removesuffix(".index.json").removesuffix(".tar")
        assert all(shard in message for message in verdict.errors), (what, verdict.errors)
        if name.endswith(".tar") and damage is flip_one:  # neighbours of a bad sample are fine
            assert len(verdict.right) >= (SHARDS - 1) * SAMPLES, what
        kind = name.partition(".")[2]
        tried[kind] = tried.get(kind, 0) + 1
    print(f"{count} damages, seed {SEED}: {tried}")
    assert sum(tried.values()) == count and set(tried) == {"tar", "index.json", "json"}
    assert read_all(folder, samples) == Verdict(right=list(range(SHARDS * SAMPLES)))


@pytest.mark.parametrize("protection", ["_check_sample", "_check_tail", "_check_index", "_check_document"])
def test_mutant_each_digest_is_needed_against_flips(
    folder: Path, samples: list[TokenPair], monkeypatch: pytest.MonkeyPatch, protection: str
) -> None:
    """Without one of the checks some of the very same flips go by."""
    monkeypatch.setattr(shard_index, protection, lambda *_: None)
    if protection == "_check_index":
        path = folder / index_name(FIRST)
        path.write_bytes(path.read_bytes().replace(b"images__0002", b"images__9992"))
        assert read_all(folder, samples).wrong == [2]
    elif protection == "_check_document":
        path = folder / MANIFEST
        path.write_bytes(path.read_bytes().replace(b'"small"', b'"smell"'))
        assert read_all(folder, samples).silent
    else:
        path = folder / FIRST
        data = path.read_bytes()
        flip(path, data.index(b"picture") if protection == "_check_sample" else len(data) - 1, 3)
        assert read_all(folder, samples).silent


def test_mutant_sizes_are_not_enough(folder: Path, samples: list[TokenPair]) -> None:
    """Two shards of one size in each other's place: only the digests know."""
    assert (folder / FIRST).stat().st_size == (folder / SECOND).stat().st_size
    swap(folder, FIRST, SECOND)
    verdict = read_all(folder, samples)
    assert not verdict.silent and verdict.right == list(range(2 * SAMPLES, 3 * SAMPLES))


def swap(folder: Path, one: str, other: str) -> None:
    (folder / one).rename(folder / "x")
    (folder / other).rename(folder / one)
    (folder / "x").rename(folder / other)


def swap_with_indexes(folder: Path) -> None:
    swap(folder, FIRST, SECOND)
    swap(folder, index_name(FIRST), index_name(SECOND))


def of_another_set(folder: Path) -> None:
    """A shard with its index, of the same names and sizes, from other pictures."""
    other = folder.parent / "other"
    build(other, first=1000)
    for name in (FIRST, index_name(FIRST)):
        shutil.copy(other / name, folder / name)


def edit_manifest(folder: Path, change: Callable[[list[dict[str, object]]], None]) -> None:
    """Change the list of shards, with fingerprint and digest that fit: a wrong tool, no damage."""
    document = json.loads((folder / MANIFEST).read_text())
    change(document["shards"])
    entries = [shard_index.ShardEntry(**shard) for shard in document["shards"]]
    rest = {**document, "fingerprint": shard_index.fingerprint_of(entries)}
    del rest["sha256"]
    (folder / MANIFEST).write_text(json.dumps(rest | {"sha256": shard_index._sha256_of(rest)}))


def zero_a_page(folder: Path) -> None:
    """What a power loss leaves of data that had not reached the disk."""
    with open(folder / FIRST, "r+b") as file:
        file.seek(4096)
        file.write(bytes(4096))


def link(folder: Path) -> None:
    (folder / FIRST).rename(folder.parent / "outside.tar")
    (folder / FIRST).symlink_to(folder.parent / "outside.tar")


def fake_end(folder: Path) -> None:
    """A second archive appended where the end mark was: readers of tars would take it."""
    path = folder / FIRST
    data = bytearray(path.read_bytes())
    data[-1024:-512] = data[:512]
    path.write_bytes(data)


STRUCTURAL: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda f: (f / FIRST).unlink(), f"{FIRST} is missing"),
    "missing index": (lambda f: (f / index_name(FIRST)).unlink(), f"{index_name(FIRST)} is missing"),
    "empty": (lambda f: (f / FIRST).write_bytes(b""), f"{FIRST} has 0 bytes"),
    "longer": (lambda f: (f / FIRST).write_bytes((f / FIRST).read_bytes() + bytes(512)), f"{FIRST} has"),
    "a folder": (lambda f: ((f / FIRST).unlink(), (f / FIRST).mkdir()), f"{FIRST} is missing"),
    "linked": (link, f"{FIRST} is a symbolic link"),
    "swapped": (lambda f: swap(f, FIRST, SECOND), FIRST),
    "swapped with indexes": (swap_with_indexes, index_name(FIRST)),
    "of another set": (of_another_set, index_name(FIRST)),
    "copied over": (lambda f: shutil.copy(f / FIRST, f / SECOND), SECOND),
    "foreign": (lambda f: shutil.copy(f / FIRST, f / "extra.tar"), "extra.tar is foreign"),
    "foreign index": (lambda f: (f / "x.index.json").write_text("{}"), "x.index.json is foreign"),
    "named twice": (lambda f: edit_manifest(f, lambda s: s.append(s[0])), f"{FIRST} is named twice"),
    "copy with a name": (
        lambda f: (
            shutil.copy(f / FIRST, f / "train-000003.tar"),
            shutil.copy(f / index_name(FIRST), f / "train-000003.index.json"),
            edit_manifest(f, lambda s: s.append({**s[0], "name": "train-000003.tar"})),
        ),
        f"train-000003.tar is a copy of {FIRST}",
    ),
    "leaves the folder": (
        lambda f: edit_manifest(f, lambda s: s[0].update(name="../x.tar")),
        "does not agree",
    ),
    "negative count": (lambda f: edit_manifest(f, lambda s: s[0].update(samples=-1)), "does not agree"),
    "zeroed": (zero_a_page, FIRST),
    "fake end": (fake_end, FIRST),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "manifest.json is missing"),
    "linked manifest": (
        lambda f: ((f / MANIFEST).rename(f / "m"), (f / MANIFEST).symlink_to(f / "m")),
        MANIFEST,
    ),
    "linked index": (
        lambda f: (
            (f / index_name(FIRST)).rename(f / "i"),
            (f / index_name(FIRST)).symlink_to(f / "i"),
        ),
        f"{index_name(FIRST)} is a symbolic link",
    ),
}


@pytest.mark.parametrize("kind", sorted(STRUCTURAL))
def test_structural_damage_is_named(folder: Path, samples: list[TokenPair], kind: str) -> None:
    damage, expected = STRUCTURAL[kind]
    damage(folder)
    verdict = read_all(folder, samples)
    assert not verdict.silent
    assert expected in verdict.errors[0]
    assert "shard_dataset" in verdict.errors[0]  # the remedy


@pytest.mark.parametrize("kind", ["foreign", "foreign index", "copy with a name", "linked", "linked index"])
def test_mutant_without_a_look_at_the_folder_these_pass(
    folder: Path, samples: list[TokenPair], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(shard_index, "_problems", lambda *_: [])
    if kind == "linked index":
        monkeypatch.setattr(shard_index, "_read_plain", Path.read_bytes)
    STRUCTURAL[kind][0](folder)
    assert not read_all(folder, samples).errors


def test_the_start_names_every_missing_shard(folder: Path, samples: list[TokenPair]) -> None:
    for number in (0, 2):
        (folder / f"train-{number:06d}.tar").unlink()
    (folder / index_name(SECOND)).unlink()
    with pytest.raises(DataError) as caught:
        ShardIndex.load(folder)
    for name in (FIRST, "train-000002.tar", index_name(SECOND)):
        assert f"{name} is missing" in str(caught.value)
    assert caught.value.exit_code == 78


def test_damage_is_an_error_of_the_step_that_would_have_got_it(
    folder: Path, samples: list[TokenPair]
) -> None:
    """The steps before it are delivered, its own never is, with the reader one step ahead."""
    flip(folder / SECOND, 700, 0)
    index = ShardIndex.load(folder)
    bad = SAMPLES
    loader = StepLoader(index.read, SamplePlan(index.sizes, SEED), SAMPLES, 0, 1)
    delivered: list[TokenPair] = []
    with loader, pytest.raises(DataError, match=f"images__{bad:04d} of .*{SECOND}"):
        for step in range(SHARDS):
            delivered += loader.step(step)
    assert len(delivered) % SAMPLES == 0
    by_key = {pair.key: pair for pair in samples}
    assert f"images__{bad:04d}" not in {pair.key for pair in delivered}
    assert all(small_shards.plain(pair) == small_shards.plain(by_key[pair.key]) for pair in delivered)


def test_a_manifest_of_the_first_format_is_still_read(folder: Path, samples: list[TokenPair]) -> None:
    document = json.loads((folder / MANIFEST).read_text())
    del document["sha256"]
    (folder / MANIFEST).write_text(json.dumps(document))
    assert "own sha256" in read_all(folder, samples).errors[0]  # the new format has it
    document["format"] = 1
    (folder / MANIFEST).write_text(json.dumps(document))
    assert not read_all(folder, samples).errors


def test_left_overs_of_an_attempt_with_other_settings_go_with_the_manifest(tmp_path: Path) -> None:
    """Readers that take every *.tar must not find shards of another cut of the data."""
    folder = tmp_path / "train"
    build(folder)
    (folder / ".tmp.train-000003.tar.0a0b").write_bytes(b"half")
    (folder / "notes.txt").write_text("mine")
    pairs = [small_shards.token_pair(number) for number in range(20)]
    write_manifest(folder, [write_shard(folder, "train-000000", pairs)], {})
    left = sorted(path.name for path in folder.iterdir())
    assert left == [MANIFEST, "notes.txt", "train-000000.index.json", "train-000000.tar"]
    assert not read_all(folder, pairs).errors


def stock_samples(folder: Path) -> list[dict[str, object]]:
    """Read the shards as anyone does who has no index: every tar, one after the other."""
    import webdataset

    shards = sorted(str(path) for path in folder.glob("*.tar"))
    found = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False)
    return [{key: value for key, value in sample.items() if key[:2] != "__"} for sample in found]


def test_the_stock_reader_lets_much_of_it_pass(folder: Path, samples: list[TokenPair]) -> None:
    """The same damages, those that hit a tar, beside the figure above: samples lost or changed without a word."""
    good = stock_samples(folder)
    assert len(good) == len(samples)
    for name, damage, count in (("flips", flip_one, FLIPS), ("cuts", cut_one, CUTS)):
        tried = silent = 0
        rng = random.Random(SEED)
        for _ in range(count):
            path, at = random_place(folder, rng)
            whole = path.read_bytes()
            damage(path, at, rng)
            if path.suffix == ".tar":
                tried += 1
                with contextlib.suppress(Exception):  # an error of whatever kind is not silent
                    silent += stock_samples(folder) != good
            path.write_bytes(whole)
        print(f"stock reader: {silent} of {tried} {name} changed or lost samples in silence")
        assert silent > tried // 20
