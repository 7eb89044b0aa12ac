import io
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cogview2.pipeline.data.records import TokenPair
from cogview2.pipeline.data.shard_index import ShardIndex, write_manifest
from cogview2.pipeline.data.shard_writer import ShardEntry, index_name, write_shard, write_text_shard
from cogview2.pipeline.errors import DataError


def pair(number: int, superres: bool = True, languages: tuple[str, ...] = ("en", "zh")) -> TokenPair:
    rng = np.random.default_rng(number)
    return TokenPair(
        key=f"images__{number:04d}",
        text_ids={name: rng.integers(0, 9999, 1 + number % 5).astype(np.int32) for name in languages},
        base_codes=rng.integers(0, 512, 16).astype(np.int32),
        superres_codes=rng.integers(0, 512, 144).astype(np.int32) if superres else None,
        captions={name: f"\u732b {number}" for name in languages},
        metadata={"source_name": f"images/{number}.png", "nested": {"a": [1, None, 2.5]}},
    )


def same(left: TokenPair, right: TokenPair) -> bool:
    def plain(p: TokenPair) -> object:
        superres = None if p.superres_codes is None else p.superres_codes.tolist()
        ids = {name: array.tolist() for name, array in p.text_ids.items()}
        return p.key, ids, p.base_codes.tolist(), superres, p.captions, p.metadata

    return plain(left) == plain(right)


def build(folder: Path, shards: int = 3, samples: int = 4) -> list[TokenPair]:
    folder.mkdir(exist_ok=True)
    pairs = [pair(number, number % 3 != 0) for number in range(shards * samples)]
    entries = [
        write_shard(folder, f"train-{s:06d}", pairs[s * samples : (s + 1) * samples]) for s in range(shards)
    ]
    write_manifest(folder, entries, {"rate": 8})
    return pairs


def test_round_trip(tmp_path: Path) -> None:
    pairs = build(tmp_path)
    index = ShardIndex.load(tmp_path)
    assert index.sizes == [4, 4, 4] and len(index) == 12 and index.extra == {"rate": 8}
    for number in (11, 0, 5, 4, 3, 8):
        read = index.read(number)
        assert same(read, pairs[number])
        assert read.base_codes.dtype == np.int32 and read.text_ids["en"].dtype == np.int32
        assert index.locate(number)[1].has_superres == (number % 3 != 0)
    index.verify()
    with pytest.raises(IndexError):
        index.read(12)
    with pytest.raises(IndexError):
        index.read(-1)


@pytest.mark.parametrize("languages", [("en",), ("zh",)])
def test_one_language(tmp_path: Path, languages: tuple[str, ...]) -> None:
    write_manifest(tmp_path, [write_shard(tmp_path, "a", [pair(1, languages=languages)])], {})
    assert set(ShardIndex.load(tmp_path).read(0).text_ids) == set(languages)


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    build(tmp_path / "one")
    os.utime(tmp_path / "one", (1, 1))
    build(tmp_path / "two")
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert "train-000000.tar" in files and "train-000000.index.json" in files and "manifest.json" in files
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_stock_reader(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    pairs = build(tmp_path)
    shards = sorted(str(path) for path in tmp_path.glob("*.tar"))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [p.key for p in pairs]
    first = samples[1]
    assert set(first) - {"__key__", "__url__", "__local_path__"} == {
        "json",
        "base.npy",
        "superres.npy",
        "text_en.npy",
        "text_zh.npy",
    }
    assert np.load(io.BytesIO(first["base.npy"])).tolist() == pairs[1].base_codes.tolist()
    assert json.loads(first["json"])["captions"] == pairs[1].captions


def test_text_shards(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    rows = [(f"text-{n}", np.arange(n, n + 8, dtype=np.int64)) for n in range(5)]
    write_manifest(tmp_path, [write_text_shard(tmp_path, "text-000000", rows)], {})
    index = ShardIndex.load(tmp_path)
    for number, (_, ids) in enumerate(rows):
        read = index.read_text(number)
        assert read.dtype == np.int32 and read.tolist() == ids.tolist()
    samples = list(webdataset.WebDataset([str(tmp_path / "text-000000.tar")], shardshuffle=False))
    assert [sorted(set(s) - {"__url__", "__key__", "__local_path__"}) for s in samples] == [["text.npy"]] * 5


def test_every_flipped_byte_of_a_sample_is_seen(tmp_path: Path) -> None:
    build(tmp_path, shards=1, samples=2)
    path = tmp_path / "train-000000.tar"
    good = path.read_bytes()
    place = ShardIndex.load(tmp_path).locate(1)[1]
    for at in range(place.offset, place.offset + place.length, 97):
        damaged = bytearray(good)
        damaged[at] ^= 0x10
        path.write_bytes(damaged)
        index = ShardIndex.load(tmp_path)
        index.read(0)
        with pytest.raises(DataError, match=r"images__0001 .*train-000000\.tar.*damaged.*shard_dataset"):
            index.read(1)
        with pytest.raises(DataError, match=r"train-000000\.tar"):
            index.verify()


def test_names_all_that_is_missing(tmp_path: Path) -> None:
    build(tmp_path)
    (tmp_path / "train-000000.tar").unlink()
    (tmp_path / index_name("train-000001.tar")).unlink()
    with open(tmp_path / "train-000002.tar", "ab") as file:
        file.write(b"x")
    with pytest.raises(DataError) as caught:
        ShardIndex.load(tmp_path)
    message = str(caught.value)
    assert "train-000000.tar is missing" in message and "train-000001.index.json is missing" in message
    assert "train-000002.tar has" in message and "shard_dataset" in message


def test_damaged_index(tmp_path: Path) -> None:
    build(tmp_path)
    path = tmp_path / index_name("train-000001.tar")
    path.write_bytes(path.read_bytes().replace(b'"offset":0', b'"offset":1'))
    index = ShardIndex.load(tmp_path)
    index.read(0)
    with pytest.raises(DataError, match=r"train-000001\.index\.json is damaged"):
        index.read(4)


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        (b'"samples": 4', b'"samples": 5', "own sha256"),
        (b"train-000001.tar", b"../../etc/passwd", "own sha256"),
        (b'"format": 2', b'"format": 9', "format"),
        (b'"shards"', b'"shreds"', "damaged"),
        (b"{", b"[", "cannot read"),
    ],
)
def test_damaged_manifest(tmp_path: Path, old: bytes, new: bytes, word: str) -> None:
    build(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    with pytest.raises(DataError, match=word):
        ShardIndex.load(tmp_path)


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json is missing.*shard_dataset"):
        ShardIndex.load(tmp_path)


def test_fingerprint_follows_content_not_extra(tmp_path: Path) -> None:
    entry = write_shard(tmp_path, "a", [pair(1)])
    first = write_manifest(tmp_path, [entry], {"a": 1})
    assert write_manifest(tmp_path, [entry], {"a": 2}) == first
    assert write_manifest(tmp_path, [write_shard(tmp_path, "a", [pair(2)])], {"a": 1}) != first


@pytest.mark.parametrize(
    "change",
    [
        {"key": "a.b"},
        {"key": "../x"},
        {"key": "k" * 65},
        {"metadata": {"x": float("nan")}},
        {"metadata": {"x": object()}},
        {"base_codes": np.array([0.5])},
        {"base_codes": np.zeros((2, 2), dtype=np.int32)},
        {"base_codes": np.array([2**31])},
        {"text_ids": {"../e": np.array([1])}},
    ],
)
def test_refuses_what_cannot_be_stored(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(DataError):
        write_shard(tmp_path, "a", [replace(pair(1), **change)])
    assert list(tmp_path.iterdir()) == []


def test_refuses_a_key_twice(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="images__0001"):
        write_shard(tmp_path, "a", [pair(1), pair(1)])
    entry = ShardEntry("a.tar", 1, "", 1, "")
    with pytest.raises(DataError, match="twice"):
        write_manifest(tmp_path, [entry, entry], {})
