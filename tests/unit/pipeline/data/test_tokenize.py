import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cogview2.pipeline.config.data import DataConfig
from cogview2.pipeline.data.records import RawPair, Refusal, RefusedError
from cogview2.pipeline.data.shard_index import ShardIndex, write_manifest
from cogview2.pipeline.data.tokenize import PairTokenizer, Refused, shard_ranges, write_range

DATA = DataConfig(base_size=16, compression_rate=4, superres_ratio=2)


class Text:
    def encode(self, caption: str) -> list[int]:
        return [100 + ord(character) for character in caption]


class Image4:
    """The code of a 4x4 cell is its brightness."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.batches: list[int] = []

    def encode(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(pixels_BCHW))
        return (torch.nn.functional.avg_pool2d(pixels_BCHW.mean(1), 4) * 255).round().long().flatten(1)


class Source:
    """Grey pictures of 40 pixels; 1 is small, 2 unreadable, 3 no picture, 4 without a Chinese caption."""

    keys = [f"k{index}" for index in range(9)]

    def read(self, index: int) -> RawPair:
        if index == 2:
            raise RefusedError("image_unreadable", "gone")
        side = 20 if index == 1 else 40
        buffer = io.BytesIO()
        Image.new("RGB", (side, side), (index * 10,) * 3).save(buffer, "PNG")
        captions = {"en": f"number {index}"} | ({} if index == 4 else {"zh": "数"})
        return RawPair(self.keys[index], b"?" if index == 3 else buffer.getvalue(), captions, {"n": index})


def tokenizer(batch: int = 3) -> PairTokenizer:
    return PairTokenizer(Text(), Image4(), DATA, batch)  # type: ignore[arg-type]


def test_pairs_come_in_order_and_the_unusable_are_counted() -> None:
    refused = Refused()
    made = tokenizer()
    pairs = list(made.tokenize(Source(), list(range(9)), refused))  # type: ignore[arg-type]
    assert [pair.key for pair in pairs] == ["k0", "k1", "k4", "k5", "k6", "k7", "k8"]
    assert made.image.batches == [3, 3, 3, 3, 1, 1]  # type: ignore[attr-defined]
    assert sum(refused.counts.values()) == 2 and refused.counts["image_unreadable"] == 1
    assert refused.examples["image_unreadable"] == ["k2: gone"]
    fifth = pairs[3]
    assert fifth.text_ids["en"].tolist() == [100 + ord(c) for c in "number 5"]
    assert fifth.metadata == {"n": 5} and set(pairs[2].captions) == {"en"} == set(pairs[2].text_ids)
    assert fifth.base_codes.tolist() == [50] * 16
    assert fifth.superres_codes is not None and fifth.superres_codes.tolist() == [50] * 64
    assert fifth.base_codes.dtype == fifth.superres_codes.dtype == np.int32


def test_an_enlarged_picture_has_no_high_resolution_codes() -> None:
    (small,) = tokenizer().tokenize(Source(), [1], Refused())  # type: ignore[arg-type]
    assert small.superres_codes is None and small.base_codes.tolist() == [10] * 16


def test_refused_keeps_three_examples_of_each_reason() -> None:
    refused = Refused()
    for number in range(5):
        refused.add(Refusal(f"k{number}", "broken", "x"))
    assert refused.counts == {"broken": 5} and len(refused.examples["broken"]) == 3
    assert json.loads(json.dumps(refused.to_dict()))["counts"] == {"broken": 5}


@pytest.mark.parametrize(
    ("count", "size", "expected"),
    [(0, 4, []), (3, 4, [(0, 3)]), (4, 4, [(0, 4)]), (9, 4, [(0, 4), (4, 8), (8, 9)])],
)
def test_shard_ranges(count: int, size: int, expected: list[tuple[int, int]]) -> None:
    assert [(r.start, r.stop) for r in shard_ranges(count, size)] == expected


def test_a_shard_is_a_pure_function_of_its_range(tmp_path: Path) -> None:
    reports: list[Refused] = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        made = tokenizer()
        if name == "b":  # whatever was tokenized before
            list(made.tokenize(Source(), [8, 7], Refused()))  # type: ignore[arg-type]
        entry = write_range(tmp_path / name, "s", made, Source(), [0, 2, 4, 6], reports.append)  # type: ignore[arg-type]
        assert entry.samples == 3
    assert (tmp_path / "a" / "s.tar").read_bytes() == (tmp_path / "b" / "s.tar").read_bytes()
    assert [report.counts["image_unreadable"] for report in reports] == [1, 1]


def test_a_range_without_a_usable_picture_is_an_empty_shard(tmp_path: Path) -> None:
    entry = write_range(tmp_path, "s", tokenizer(), Source(), [2, 3], lambda refused: None)  # type: ignore[arg-type]
    assert entry.samples == 0
    write_manifest(tmp_path, [entry], {})
    assert len(ShardIndex.load(tmp_path)) == 0
