import io
import json
import os
import tarfile
import tempfile
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogview2.pipeline.config.data import DataConfig
from cogview2.pipeline.data.images import open_image
from cogview2.pipeline.data.listing import Listing
from cogview2.pipeline.data.open_files import OpenFiles
from cogview2.pipeline.data.records import RefusedError
from cogview2.pipeline.data.sources import open_source
from cogview2.pipeline.data.tar_members import TarWalk
from cogview2.pipeline.data.tars import list_tars, split_name
from cogview2.pipeline.errors import DataError

CONFIG = DataConfig()
# Reasons that the manifest leaves open.
ALSO = {"tars/gzipped_named.tar": "shard_compressed"}


def listed(path: Path) -> tuple[Listing, list[str]]:
    """List one tar, and try to decode every picture: names of those that open, and all refusals."""
    listing = list_tars([path], CONFIG)
    good: list[str] = []
    with OpenFiles() as files:
        for entry in listing.entries:
            data = files.read(entry.image.path, entry.image.offset, entry.image.size)
            try:
                open_image(data, CONFIG.images, 8)
                good.append(entry.name)
            except RefusedError as error:
                listing.refuse(entry.name, error.reason, error.detail)
    return listing, good


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_manifest(fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fixtures / "data" / "bad"
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text("utf-8").splitlines()]
    rows = [row for row in rows if row["file"].startswith("tars/")]
    assert rows
    monkeypatch.chdir(tmp_path)
    wrong = []
    for row in rows:
        listing, good = listed(folder / row["file"])
        reasons = {refusal.reason for refusal in listing.refused}
        expected = row["expected_accepted"]
        if row["file"] in ALSO:
            right = ALSO[row["file"]] in reasons
        else:
            right = expected in (None, len(good))
            if row["reason"] is None:
                right = right and not reasons
            elif row["reason"] != "(by image)":
                right = right and row["reason"] in reasons
        if not right:
            wrong.append((row["file"], good, listing.refused))
    assert not wrong
    assert not list(tmp_path.rglob("*")) and not list(Path(tempfile.gettempdir()).glob("EVIL_*"))


@pytest.mark.parametrize(
    ("name", "reasons"),
    [
        ("truncated.tar", ["shard_truncated"]),
        ("bad_header_checksum.tar", ["shard_corrupt"]),
        ("hardlink.tar", ["member_not_regular"]),
        ("dotdot_names.tar", ["member_unsafe_name"] * 2),
        ("mixed_bad_images.tar", None),
    ],
)
def test_exact_refusals(fixtures: Path, name: str, reasons: list[str] | None) -> None:
    listing, good = listed(fixtures / "data" / "bad" / "tars" / name)
    found = [refusal.reason for refusal in listing.refused]
    if reasons is None:
        expected = ["truncated", "empty", "not_an_image", "too_small", "too_many_pixels"]
        assert Counter(found) == Counter(f"image_{reason}" for reason in expected)
        assert [entry[-1] for entry in good] == ["0", "4", "7"]
    else:
        assert found == reasons
    if name == "truncated.tar":
        assert len(good) == 3


def test_duplicates_never_mix(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("0.jpg", b"1"), ("0.jpg", b"2"), ("0.txt", b"caption of 2")])
    listing, _ = listed(path)
    reasons = {refusal.reason for refusal in listing.refused}
    assert not listing.entries and reasons == {"duplicate_key", "sample_missing_caption"}


def test_duplicate_keeps_the_first(fixtures: Path) -> None:
    bad = fixtures / "data" / "bad" / "tars"
    pictures = {}
    for name in ("duplicate_keys", "good"):
        for entry in list_tars([bad / f"{name}.tar"], CONFIG).entries:
            with OpenFiles() as files:
                pictures[entry.name] = files.read(entry.image.path, entry.image.offset, entry.image.size)
    assert pictures["duplicate_keys/000000"] == pictures["good/000001"]


def test_lying_sizes_reserve_nothing(fixtures: Path, tmp_path: Path) -> None:
    paths = [fixtures / "data" / "bad" / "tars" / "size_lies.tar"]
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.REGTYPE):
        info = tarfile.TarInfo("x")
        info.type, info.size = kind, 8 * 1024**3 - 1
        paths.append(tmp_path / f"lie{len(paths)}.tar")
        paths[-1].write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    tracemalloc.start()
    listing = list_tars(paths, CONFIG)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not listing.entries and len(listing.refused) == len(paths)
    assert peak < 8 * 1024 * 1024


def test_cut_anywhere(tmp_path: Path) -> None:
    """Wherever a tar is cut: whole samples stay, one with a cut member goes, and the shard is reported."""
    members = []
    for number in range(4):
        members += [(f"{number}.jpg", b"j" * 700), (f"{number}.txt", b"cap"), (f"{number}.json", b'{"a": 1}')]
    data = write_tar(tmp_path / "whole.tar", members).read_bytes()
    sample = 3584
    text_end, json_start, json_end = 2048 + 3, 3072, 3072 + 8
    path = tmp_path / "cut.tar"
    for cut in range(512, 4 * sample + 1, 128):
        path.write_bytes(data[:cut])
        listing = list_tars([path], CONFIG)
        expected = sum(cut >= start + json_end for start in range(0, 4 * sample, sample))
        # Cut before the header of its json is whole, a sample cannot be told from one that never had a json.
        expected += any(
            start + text_end <= cut < start + json_start for start in range(0, 4 * sample, sample)
        )
        assert len(listing.entries) == expected
        assert all(entry.captions == {"en": "cap"} for entry in listing.entries)
        assert [refusal.reason for refusal in listing.refused] == ["shard_truncated"]


def test_img2dataset_json(tmp_path: Path) -> None:
    record = {
        "url": "http://x/y.jpg",
        "caption": "from json",
        "width": 3,
        "exif": "{}",
        "score": float("nan"),
    }
    members = [
        ("00000/0.jpg", b"j"),
        ("00000/0.json", json.dumps(record).encode()),
        ("1.jpg", b"j"),
        ("1.txt", b"from txt"),
        ("1.json", json.dumps({**record, "caption_zh": "\u732b"}).encode()),
        ("2.jpg", b"j"),
        ("2.json", b'{"caption": 3}'),
    ]
    listing = list_tars([write_tar(tmp_path / "s.tar", members)], CONFIG)
    assert [entry.captions for entry in listing.entries] == [
        {"en": "from json"},
        {"zh": "\u732b", "en": "from txt"},
    ]
    first = {"url": "http://x/y.jpg", "width": 3, "exif": "{}", "score": None, "source_name": "s/00000/0"}
    assert listing.entries[0].metadata == first
    assert [refusal.reason for refusal in listing.refused] == ["record_wrong_type"]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("0.jpg", b"j"), ("0.png", b"p"), ("0.txt", b"x")], "sample_ambiguous_image"),
        ([("0.jpg", b"j"), ("0.txt", b"\xff")], "caption_invalid_utf8"),
        ([("0.jpg", b"j"), ("0.txt", b"x" * (5 * 1024 * 1024))], "caption_too_long"),
        ([("0.jpg", b"j"), ("0.json", b"[" * 100_000)], "record_bad_json"),
        ([("0.jpg", b"j"), ("0.json", b'{"caption":"a","caption":"b"}')], "record_duplicate_key"),
        ([("a\\b.jpg", b"j"), ("a\\b.txt", b"x")], "member_unsafe_name"),
        ([("a\nb.jpg", b"j")], "member_unsafe_name"),
    ],
)
def test_bad_samples(tmp_path: Path, members: list[tuple[str, bytes]], reason: str) -> None:
    good = [("good.jpg", b"j"), ("good.txt", b"fine")]
    listing = list_tars([write_tar(tmp_path / "s.tar", members + good)], CONFIG)
    assert [refusal.reason for refusal in listing.refused] == [reason]
    assert [entry.name for entry in listing.entries] == ["s/good"]


def test_data_after_the_end_is_reported(tmp_path: Path) -> None:
    one = write_tar(tmp_path / "s.tar", [("0.jpg", b"j"), ("0.txt", b"fine")])
    one.write_bytes(one.read_bytes() * 2)
    listing = list_tars([one], CONFIG)
    assert len(listing.entries) == 1
    assert [refusal.reason for refusal in listing.refused] == ["shard_trailing_data"]


def test_other_members(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        for number, kind in enumerate([tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE]):
            info = tarfile.TarInfo(f"{number}.jpg")
            info.type, info.linkname = kind, "/dev/zero"
            tar.addfile(info)
    reasons = [refusal.reason for refusal in list_tars([path], CONFIG).refused]
    assert reasons == ["member_not_regular"] * 3


@pytest.mark.parametrize("style", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@given(
    st.dictionaries(
        st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=60),
        st.binary(max_size=1500),
        max_size=5,
    )
)
def test_walk_agrees_with_tarfile(style: int, content: dict[str, bytes]) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=style) as tar:
        for name, data in content.items():
            if style == tarfile.USTAR_FORMAT and len(name.encode()) > 100:
                name = name[:25]
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    size = buffer.tell()
    walked = [(m.name, m.offset, m.size) for m in TarWalk(buffer, size).members()]
    buffer.seek(0)
    with tarfile.open(fileobj=buffer) as tar:
        assert walked == [(m.name, m.offset_data, m.size) for m in tar]


@given(st.binary(max_size=2000), st.integers(0, 3000))
def test_damage_only_ever_refuses(noise: bytes, at: int) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("\u732b" * 50 + ".jpg")
        info.size = 600
        tar.addfile(info, io.BytesIO(bytes(600)))
    data = bytearray(buffer.getvalue())
    data[at : at + len(noise)] = noise
    try:
        list(TarWalk(io.BytesIO(bytes(data)), len(data)).members())
    except RefusedError as error:
        assert error.reason.startswith("shard_")


@pytest.mark.parametrize(
    ("name", "parts"),
    [("a/b.c/0.Cls.TXT", ("a/b.c/0", "cls.txt")), ("0.jpg", ("0", "jpg")), ("none", ("none", ""))],
)
def test_split_name(name: str, parts: tuple[str, str]) -> None:
    assert split_name(name) == parts


def test_folder_of_tars(fixtures: Path, tmp_path: Path) -> None:
    bad = fixtures / "data" / "bad" / "tars"
    for name in ("good", "nested_dirs", "zero_length", "gnu_long_names"):
        os.symlink(bad / f"{name}.tar", tmp_path / f"{name}.tar")
    (tmp_path / "00000.parquet").write_bytes(b"PAR1")
    source = open_source(DataConfig(source=str(tmp_path)), 1)
    assert len(source) == 9 and len(set(source.keys)) == 9
    assert [refusal.reason for refusal in source.refused] == ["shard_empty"]
    assert all(len(open_image(source.read(i).image, CONFIG.images, 8).getbands()) == 3 for i in range(9))
    names = {source.read(i).metadata["source_name"] for i in range(9)}
    assert {"good/000000", "nested_dirs/a/b/000000", "nested_dirs/a/c/000000"} <= names


def test_only_bad_tars(fixtures: Path) -> None:
    path = fixtures / "data" / "bad" / "tars" / "gzipped_named.tar"
    with pytest.raises(DataError, match=r"no usable record.*shard_compressed 1.*gzip"):
        open_source(DataConfig(source=str(path)), 1)
