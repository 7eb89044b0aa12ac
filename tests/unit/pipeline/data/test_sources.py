import hashlib
import io
import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cogview2.pipeline.config.data import DataConfig
from cogview2.pipeline.data.images import open_image
from cogview2.pipeline.data.listing import key_of
from cogview2.pipeline.data.records import RefusedError
from cogview2.pipeline.data.sources import Source, open_source, split_held_out
from cogview2.pipeline.errors import DataError


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (number % 256, number // 256, 9)).save(buffer, "PNG")
    return buffer.getvalue()


def opened(folder: Path, seed: int = 1, **options: object) -> Source:
    return open_source(DataConfig.model_validate({"source": str(folder), **options}), seed)


def jsonl_folder(folder: Path, rows: list[dict[str, object]], pictures: int = 0) -> Path:
    (folder / "images").mkdir(parents=True)
    for number in range(pictures):
        (folder / "images" / f"{number}.png").write_bytes(png(number))
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "captions.jsonl").write_text(text, "utf-8")
    return folder


def rows_for(count: int) -> list[dict[str, object]]:
    return [{"image": f"images/{n}.png", "caption_en": f"number {n}", "n": n} for n in range(count)]


def test_jsonl_manifest(fixtures: Path, tmp_path: Path) -> None:
    bad = fixtures / "data" / "bad"
    rows = [json.loads(line) for line in (bad / "manifest.jsonl").read_text("utf-8").splitlines()]
    rows = [row for row in rows if row["file"].startswith("jsonl/")]
    assert rows
    (tmp_path / "images").mkdir()
    for name in ("good.jpg", "good.png"):
        shutil.copy(bad / "images" / name, tmp_path / "images" / name)
    wrong = []
    for row in rows:
        shutil.copyfile(bad / row["file"], tmp_path / "captions.jsonl")
        source = opened(tmp_path)
        reasons = [refusal.reason for refusal in source.refused]
        expected = [row["reason"]] * row["expected_skipped"]
        if len(source) != row["expected_accepted"] or reasons != expected:
            wrong.append((row["file"], len(source), source.refused))
        for index in range(len(source)):
            json.dumps(source.read(index).metadata, allow_nan=False)
    assert not wrong


@pytest.mark.parametrize(("name", "count", "held"), [("emoji", 2603, 200), ("photos", 160, 16)])
def test_real_sets(fixtures: Path, name: str, count: int, held: int) -> None:
    source = opened(fixtures / "data" / name)
    assert len(source) == count and not source.refused
    assert set(source.splits) == {"train", "held_out"} and len(source.splits["held_out"]) == held
    assert sorted(source.splits["train"] + source.splits["held_out"]) == list(range(count))
    pair = source.read(7)
    assert set(pair.captions) == {"en", "zh"} and pair.key == source.keys[7]
    assert open_image(pair.image, DataConfig().images, 160).mode == "RGB"
    assert "caption_en" not in pair.metadata and len(pair.metadata) > 3


def test_emoji_copies_stay_together(fixtures: Path) -> None:
    """The eight records named same_pixels_as never straddle the split, whatever the seed."""
    for seed in range(3):
        source = opened(fixtures / "data" / "emoji", seed)
        held = set(source.splits["held_out"])
        names = {key: index for index, key in enumerate(source.keys)}
        copies = 0
        for index in range(len(source)):
            twin = source._entries[index].metadata.get("same_pixels_as")  # type: ignore[attr-defined]
            if twin is not None:
                original = names[key_of(twin.removesuffix(".png"))]
                assert (index in held) == (original in held)
                copies += 1
        assert copies == 8


def test_same_list_same_fingerprint(tmp_path: Path) -> None:
    first = opened(jsonl_folder(tmp_path / "a", rows_for(20), 20))
    second = opened(jsonl_folder(tmp_path / "b", rows_for(20), 20), seed=2)
    assert first.fingerprint == second.fingerprint and first.splits != second.splits
    changed = rows_for(20)
    changed[3]["caption_en"] = "other"
    assert opened(jsonl_folder(tmp_path / "c", changed, 20)).fingerprint != first.fingerprint
    (tmp_path / "b" / "images" / "4.png").write_bytes(png(4) + b"x")
    assert opened(tmp_path / "b").fingerprint != first.fingerprint


def test_relative_to_base_dir(tmp_path: Path) -> None:
    jsonl_folder(tmp_path / "a", rows_for(2), 2)
    assert len(open_source(DataConfig(source="a"), 1, tmp_path)) == 2


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": "images/9.png", "caption": "x"}, "image_missing"),
        ({"image": "images", "caption": "x"}, "image_not_regular"),
        ({"image": "images/pipe", "caption": "x"}, "image_not_regular"),
        ({"image": "images/out.png", "caption": "x"}, "path_unsafe"),
        ({"image": "images\\0.png", "caption": "x"}, "path_unsafe"),
        ({"image": "x" * 5000, "caption": "x"}, "image_missing"),
        ({"image": "", "caption": "x"}, "path_unsafe"),
        ({"image": "images/0.png", "caption": ""}, "caption_empty"),
        ({"image": "images/0.png", "caption_en": "\ud800"}, "caption_invalid_utf8"),
        ({"image": "images/0.png", "caption_en": "ok", "caption_zh": 3}, "record_wrong_type"),
        ({"image": "images/0.png", "caption_fr": "x"}, "record_missing_field"),
        ({"image": "images/0.png", "x": {"a": [1] * 3}, "caption": "y" * 5_000_000}, "record_too_long"),
    ],
)
def test_refused_rows(tmp_path: Path, row: dict[str, object], reason: str) -> None:
    folder = jsonl_folder(tmp_path / "data", [row, *rows_for(1)], 1)
    os.mkfifo(folder / "images" / "pipe")
    (tmp_path / "secret.png").write_bytes(png(1))
    os.symlink(tmp_path / "secret.png", folder / "images" / "out.png")
    source = opened(folder)
    assert [(refusal.key, refusal.reason) for refusal in source.refused] == [("captions.jsonl:1", reason)]
    assert len(source) == 1


def test_languages(tmp_path: Path) -> None:
    rows = [
        {"image": "images/0.png", "caption": "\u732b"},
        {"image": "images/1.png", "caption": "cat"},
        {"image": "images/2.png", "caption_en": "cat", "caption_zh": ""},
        {"image": "images/3.png", "caption_en": "cat", "caption_zh": "\u732b", "caption": "dog"},
        {"image": "images/4.png", "caption_en": None, "caption_zh": "\u732b"},
    ]
    folder = jsonl_folder(tmp_path, rows, 5)
    both = opened(folder)
    found = [both.read(i).captions for i in range(5)]
    zh, en = {"zh": "\u732b"}, {"en": "cat"}
    assert found == [zh, en, en, {**en, **zh}, zh]
    only = opened(folder, languages=["zh"])
    assert [only.read(i).captions for i in range(len(only))] == [zh] * 3
    assert {refusal.reason for refusal in only.refused} == {"caption_language", "caption_empty"}


def test_one_picture_with_two_captions(tmp_path: Path) -> None:
    rows = [{"image": "images/0.png", "caption": text} for text in ("one", "two")]
    source = opened(jsonl_folder(tmp_path, [*rows, *rows_for(20)[1:]], 20))
    assert len(set(source.keys)) == 21
    assert (0 in source.splits["train"]) == (1 in source.splits["train"])


class TestTextBeside:
    def build(self, folder: Path) -> Path:
        for number, caption in enumerate(["a cat", "\u732b", "dog"]):
            place = folder / ("sub/deep" if number else "")
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number}.PNG").write_bytes(png(number))
            (place / f"{number}.txt").write_text(f" {caption}\n", "utf-8")
        return folder

    def test_recursive(self, tmp_path: Path) -> None:
        source = opened(self.build(tmp_path))
        assert source.keys == ["0", "sub__deep__1", "sub__deep__2"] and not source.refused
        assert [source.read(i).captions for i in range(3)] == [
            {"en": "a cat"},
            {"zh": "\u732b"},
            {"en": "dog"},
        ]
        assert source.read(1).image == png(1)

    @pytest.mark.parametrize(
        ("files", "reasons"),
        [
            ({"a.png": b"x"}, ["sample_missing_caption"]),
            ({"a.txt": b"x"}, ["sample_missing_image"]),
            ({"a.png": b"x", "a.jpg": b"x", "a.txt": b"x"}, ["sample_ambiguous_image"]),
            ({"a.png": b"x", "a.PNG": b"x", "a.txt": b"x"}, ["duplicate_key"]),
            ({"a.png": b"x", "a.txt": b"\xff"}, ["caption_invalid_utf8"]),
            ({"._a.png": b"x", ".DS_Store": b"x", "notes.md": b"x", "stats.json": b"{}"}, []),
        ],
    )
    def test_refused(self, tmp_path: Path, files: dict[str, bytes], reasons: list[str]) -> None:
        self.build(tmp_path)
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
        source = opened(tmp_path)
        assert len(source) == 3 and [refusal.reason for refusal in source.refused] == reasons

    def test_links_that_leave(self, tmp_path: Path) -> None:
        folder = self.build(tmp_path / "data")
        (tmp_path / "secret.txt").write_text("secret")
        os.symlink(tmp_path / "secret.txt", folder / "a.txt")
        (folder / "a.png").write_bytes(png(5))
        os.symlink(tmp_path, folder / "loop")
        source = opened(folder)
        assert [refusal.reason for refusal in source.refused] == ["path_unsafe"]


class TestCoco:
    def build(self, folder: Path, name: str = "coco_captions_x.json", place: str = "images") -> Path:
        (folder / place).mkdir(parents=True)
        (folder / name).parent.mkdir(exist_ok=True)
        for number in range(3):
            (folder / place / f"{number:012d}.jpg").write_bytes(png(number))
        images = [{"id": n, "file_name": f"{n:012d}.jpg", "license": 4} for n in range(5)]
        images[4]["file_name"] = "../x.jpg"
        notes = [
            {"image_id": n, "id": 9, "caption": f"{w} {n}"} for n in (0, 1, 3, 4) for w in ("\u200b", "b")
        ]
        notes += [{"image_id": 0, "caption": "\u732b"}, {"image_id": 0, "caption": 7}]
        notes[0]["caption"] = ""
        (folder / name).write_text(json.dumps({"images": images, "annotations": notes}), "utf-8")
        return folder

    @pytest.mark.parametrize(
        ("name", "place"),
        [
            ("coco_captions_x.json", "images"),
            ("annotations/captions_val2017.json", "val2017"),
            ("coco_captions.json", "."),
        ],
    )
    def test_reads(self, tmp_path: Path, name: str, place: str) -> None:
        source = opened(self.build(tmp_path / "c", name, place))
        assert source.keys == ["000000000000", "000000000001"]
        assert source.read(0).captions == {"en": "b 0", "zh": "\u732b"}
        assert source.read(0).metadata["captions"] == ["", "b 0", "\u732b"]
        reasons = [refusal.reason for refusal in source.refused]
        assert reasons == ["sample_missing_caption", "image_missing", "path_unsafe"]

    def test_official_file(self, fixtures: Path, tmp_path: Path) -> None:
        photos = fixtures / "data" / "photos"
        shutil.copy(photos / "coco_captions_subset.json", tmp_path)
        (tmp_path / "images").mkdir()
        for path in (photos / "images").glob("coco_*.jpg"):
            shutil.copy(path, tmp_path / "images" / path.name.removeprefix("coco_"))
        source = opened(tmp_path)
        assert len(source) == 94 and len(source.read(0).metadata["captions"]) == 5

    @pytest.mark.parametrize(
        "text", ["[]", '{"images": 3}', "nonsense", '{"images": [1], "annotations": []}']
    )
    def test_not_coco(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "coco_captions.json").write_text(text)
        with pytest.raises(DataError, match=r"coco_captions\.json"):
            opened(tmp_path)


class TestSplit:
    @given(
        st.lists(st.integers(0, 12), min_size=2, max_size=60), st.integers(1, 30), st.integers(0, 2**31 - 1)
    )
    def test_groups_stay_together(self, labels: list[int], wanted: int, seed: int) -> None:
        groups = [[i for i, label in enumerate(labels) if label == one] for one in sorted(set(labels))]
        keys = [f"k{i}" for i in range(len(labels))]
        split = split_held_out(keys, groups, wanted, seed)
        assert sorted(split["train"] + split["held_out"]) == list(range(len(labels)))
        held = set(split["held_out"])
        assert all(len(held & set(group)) in (0, len(group)) for group in groups)
        if len(groups) > 1:
            limit = min(wanted, max(1, len(labels) // 10))
            assert held and split["train"]
            assert len(held) <= max(limit, min(len(group) for group in groups))
        else:
            assert not held

    def test_takes_the_smallest_hashes(self) -> None:
        keys = [f"k{i}" for i in range(100)]
        held = split_held_out(keys, [[i] for i in range(100)], 200, 5)["held_out"]
        ranked = sorted(range(100), key=lambda i: hashlib.sha256(f"5:{keys[i]}".encode()).hexdigest())
        assert held == sorted(ranked[:10])

    def test_order_of_the_list_does_not_matter(self) -> None:
        keys = [f"k{i}" for i in range(50)]
        singles = [[i] for i in range(50)]
        forward = split_held_out(keys, singles, 3, 1)["held_out"]
        backward = split_held_out(keys[::-1], singles, 3, 1)["held_out"]
        assert {keys[i] for i in forward} == {keys[::-1][i] for i in backward}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: p / "gone", "does not exist"),
        (lambda p: p, "holds no data"),
        (lambda p: jsonl_folder(p / "x", []), "holds no data"),
        (lambda p: jsonl_folder(p / "x", rows_for(3)), r"image_missing 3.*captions\.jsonl:1"),
    ],
)
def test_nothing_to_read(tmp_path: Path, make: object, words: str) -> None:
    with pytest.raises(DataError, match=words):
        opened(make(tmp_path))  # type: ignore[operator]


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"x\.csv is neither"):
        opened(tmp_path / "x.csv")


def test_reading_refuses_one_record_only(tmp_path: Path) -> None:
    folder = jsonl_folder(tmp_path, rows_for(3), 3)
    source = opened(folder, images={"max_file_bytes": 200})
    (folder / "images" / "0.png").unlink()
    (folder / "images" / "1.png").write_bytes(b"")
    reasons = []
    for index in range(3):
        try:
            source.read(index)
        except RefusedError as error:
            reasons.append(error.reason)
    assert reasons == ["image_unreadable", "image_truncated"]
    with pytest.raises(RefusedError, match="image_file_too_large"):
        opened(folder, images={"max_file_bytes": 20}).read(1)


def test_drawings() -> None:
    config = DataConfig.model_validate({"drawings": {"count": 5}, "held_out": 3, "base_size": 32})
    source = open_source(config, 4)
    assert {name: len(rows) for name, rows in source.splits.items()} == {
        "train": 5,
        "held_out": 3,
        "unseen": 3,
    }
    size = config.superres_size
    assert open_image(source.read(0).image, config.images, size).size == (size, size)


@given(st.text(max_size=90), st.text(max_size=90))
def test_keys_are_safe_and_differ(one: str, two: str) -> None:
    keys = [key_of(name) for name in (one, two)]
    assert all(0 < len(key) <= 64 and set(key) <= set(SAFE) for key in keys)
    assert (keys[0] == keys[1]) == (one == two)


SAFE = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-"


@pytest.mark.parametrize(
    ("name", "key"), [("0023", "0023"), ("a/b", "a__b"), ("train-000001", "train-000001")]
)
def test_plain_keys_stay_legible(name: str, key: str) -> None:
    assert key_of(name) == key


@pytest.mark.parametrize("pair", [("a/b", "a__b"), ("a_/b", "a/_b"), ("a b", "a_b"), ("\u732b", "\u72d7")])
def test_look_alikes_get_other_keys(pair: tuple[str, str]) -> None:
    assert key_of(pair[0]) != key_of(pair[1])
