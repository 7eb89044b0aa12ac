import io
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cogview2.pipeline.config.data import DataConfig
from cogview2.pipeline.config.model import CogLMConfig, DirectSRConfig, IterativeSRConfig
from cogview2.pipeline.config.stages import ObjectiveConfig
from cogview2.pipeline.data.pixels import downsample, load_pixels
from cogview2.pipeline.data.records import RawPair, RefusedError, TokenPair
from cogview2.pipeline.data.shard_index import ShardIndex, write_manifest
from cogview2.pipeline.data.shard_writer import write_shard, write_text_shard
from cogview2.pipeline.errors import ConfigError, DataError
from cogview2.pipeline.tokenizers.vocabulary import Vocabulary
from cogview2.pipeline.training.batches import (
    ImageBatches,
    MixedBatches,
    Mixture,
    PairBatches,
    coglm_sample,
    direct_sample,
    iterative_sample,
)

VOCABULARY = Vocabulary.uniform(64, 60)
GRID, RATIO, TEXT = 4, 2, 8
COGLM = CogLMConfig(layers=1, hidden=8, heads=1, max_positions=64, text_length=TEXT, image_position=16)
DATA = DataConfig(base_size=16, compression_rate=4, superres_ratio=2)
COUNT = 20


class Pictures:
    """Grey pictures of 32 pixels; picture k has brightness k. Number 3 is no picture."""

    def __init__(self) -> None:
        self.fingerprint, self.description = "f" * 64, "grey pictures"
        self.reads = 0
        self.keys = [f"p{index}" for index in range(COUNT)]

    def read(self, index: int) -> RawPair:
        self.reads += 1
        buffer = io.BytesIO()
        ramp = np.full((32, 32, 3), index, dtype=np.uint8)
        ramp[:, :, 0] = np.arange(32)
        Image.fromarray(ramp).save(buffer, "PNG")
        return RawPair(str(index), buffer.getvalue()[: 50 if index == 3 else None], {"en": "x"}, {})


def image_batches(
    kinds: tuple[str, ...] = ("base", "crop"), rank: int = 0, size: int = 1, **options: int
) -> ImageBatches:
    usable = [index for index in range(COUNT) if index != 3]
    settings = {"seed": 5, "global_batch": 8, "accumulation": 2} | options
    return ImageBatches(Pictures(), usable, DATA, kinds, data_rank=rank, data_size=size, **settings)  # type: ignore[arg-type]


def shards(folder: Path, superres: bool = True) -> ShardIndex:
    rng = np.random.default_rng(0)
    pairs = [
        TokenPair(
            f"k{number:03d}",
            {
                "en": rng.integers(70, 90, 3).astype(np.int32),
                "zh": rng.integers(100, 120, 2).astype(np.int32),
            },
            rng.integers(0, 64, GRID**2).astype(np.int32),
            rng.integers(0, 64, (GRID * RATIO) ** 2).astype(np.int32) if superres and number % 2 else None,
            {"en": "a", "zh": "b"},
            {},
        )
        for number in range(COUNT)
    ]
    folder.mkdir(parents=True)
    write_manifest(folder, [write_shard(folder, f"s{k}", pairs[k * 10 : k * 10 + 10]) for k in range(2)], {})
    return ShardIndex.load(folder)


def text_shards(folder: Path) -> ShardIndex:
    rows = [(f"{k}", np.full(TEXT + GRID**2, 70 + k, dtype=np.int32)) for k in range(9)]
    folder.mkdir(parents=True)
    write_manifest(folder, [write_text_shard(folder, "t0", rows)], {})
    return ShardIndex.load(folder)


MAKE = partial(coglm_sample, objectives=ObjectiveConfig(), config=COGLM, vocabulary=VOCABULARY)


def pair_batches(
    index: ShardIndex, rank: int = 0, size: int = 1, global_batch: int = 8, **options: object
) -> PairBatches:
    settings: dict = {"seed": 5, "accumulation": 2} | options
    return PairBatches(
        index,
        settings.pop("make", MAKE),
        "coglm",
        global_batch=global_batch,
        data_rank=rank,
        data_size=size,
        **settings,
    )


def rows(batches: list[dict[str, torch.Tensor]], name: str = "tokens") -> list[tuple]:
    return [tuple(row.flatten().tolist()) for batch in batches for row in batch[name]]


def test_pictures_have_the_size_of_their_kind() -> None:
    batches = image_batches(("base", "crop", "superres"))
    sides = [batches.step(step)[0]["pixels"].shape for step in range(3)]
    assert [tuple(shape) for shape in sides] == [(4, 3, 16, 16), (4, 3, 16, 16), (4, 3, 32, 32)]
    assert len(batches.step(0)) == 2


def test_crops_are_cut_out_of_the_full_picture() -> None:
    for picture in image_batches(("crop",)).step(1)[0]["pixels"]:
        left = round(float(picture[0, 0, 0]) * 255)
        assert torch.equal((picture[0, 0] * 255).round(), torch.arange(left, left + 16).float())


def test_the_same_step_gives_the_same_pictures_whenever_it_is_asked_for() -> None:
    straight = image_batches()
    expected = [straight.step(step) for step in range(6)]
    fresh = image_batches()
    for step in (4, 5, 0):
        assert rows(fresh.step(step), "pixels") == rows(expected[step], "pixels")
    assert rows(image_batches(seed=6).step(0), "pixels") != rows(expected[0], "pixels")


def test_ranks_share_the_pictures_of_a_step() -> None:
    whole = rows(image_batches(accumulation=1).step(3), "pixels")
    parts = [rows(image_batches(rank=rank, size=2, accumulation=1).step(3), "pixels") for rank in range(2)]
    assert parts[0] + parts[1] == whole


def test_an_epoch_shows_every_usable_picture_once() -> None:
    batches = image_batches(("superres",), global_batch=19, accumulation=1)
    seen = sorted(round(float(picture[1, 0, 0]) * 255) for picture in batches.step(2)[0]["pixels"])
    assert seen == [index for index in range(COUNT) if index != 3]


def test_decoded_pictures_are_kept() -> None:
    batches = image_batches(("superres",), global_batch=19, accumulation=1)
    for step in range(3):
        batches.step(step)
    batches._loader.close()
    assert batches._source.reads == 19  # type: ignore[attr-defined]


def test_which_pictures_are_usable_is_part_of_the_dataset() -> None:
    other = ImageBatches(
        Pictures(), [0, 1], DATA, ("base",), seed=5, global_batch=2, accumulation=1, data_rank=0, data_size=1
    )  # type: ignore[arg-type]
    assert other.dataset_sha256 != image_batches().dataset_sha256


def test_no_picture_at_all_is_refused() -> None:
    with pytest.raises(DataError, match="no usable picture"):
        ImageBatches(
            Pictures(), [], DATA, ("base",), seed=5, global_batch=2, accumulation=1, data_rank=0, data_size=1
        )  # type: ignore[arg-type]


def test_a_broken_picture_is_refused() -> None:
    with pytest.raises(RefusedError):
        load_pixels(Pictures(), 3, DATA)  # type: ignore[arg-type]


def test_downsample_averages_and_stays_in_range() -> None:
    pixels = torch.zeros(1, 3, 32, 32)
    pixels[..., ::2] = 1
    small = downsample(pixels, 16)
    assert small.shape == (1, 3, 16, 16)
    torch.testing.assert_close(small[..., 1:-1], torch.full((1, 3, 16, 14), 0.5), atol=0.05, rtol=0)
    assert 0 <= float(small.min()) and float(small.max()) <= 1


@pytest.mark.parametrize("size", [1, 2, 4])
def test_pairs_do_not_depend_on_the_number_of_ranks(tmp_path: Path, size: int) -> None:
    index = shards(tmp_path / "s")
    for step in (0, 7):
        whole = rows(pair_batches(index, accumulation=1).step(step))
        parts = [rows(pair_batches(index, rank, size, accumulation=1).step(step)) for rank in range(size)]
        assert sum(parts, []) == whole


def test_accumulation_only_cuts(tmp_path: Path) -> None:
    index = shards(tmp_path / "s")
    one, four = pair_batches(index, accumulation=1).step(2), pair_batches(index, accumulation=4).step(2)
    assert [len(batch["tokens"]) for batch in four] == [2, 2, 2, 2]
    for name in ("tokens", "position_ids", "labels", "loss_mask", "roles", "loss_weights"):
        assert rows(one, name) == rows(four, name)


def test_a_pair_is_drawn_anew_in_each_epoch(tmp_path: Path) -> None:
    batches = pair_batches(
        shards(tmp_path / "s"), global_batch=COUNT, accumulation=1, make=lambda pair, rng: rng.random()
    )
    first, second = (sorted(batches.samples(step)) for step in (0, 1))
    assert first != second
    assert sorted(batches.samples(0)) == first


def test_only_pairs_with_high_resolution_codes(tmp_path: Path) -> None:
    index = shards(tmp_path / "s")
    batches = pair_batches(
        index, global_batch=10, accumulation=1, make=lambda pair, rng: pair.key, only_superres=True
    )
    assert sorted(batches.samples(0)) == [f"k{k:03d}" for k in range(1, COUNT, 2)]  # type: ignore[type-var]
    with pytest.raises(DataError, match="no sample of the shards has high-resolution codes"):
        pair_batches(shards(tmp_path / "none", superres=False), only_superres=True)


def mixed_batches(
    index: ShardIndex, text: ShardIndex, rank: int = 0, size: int = 1, batch: int = 16, **options: Any
) -> MixedBatches:
    """A quarter of text."""
    mixture = Mixture.of(batch, 0.25, rank, size)
    make = {"make": options.pop("make")} if "make" in options else {}
    accumulation = options.get("accumulation", 2)
    pairs = pair_batches(
        index,
        rank,
        size,
        global_batch=batch - mixture.text_batch,
        part=mixture.pairs,
        accumulation=accumulation,
        **make,
    )
    options |= {"seed": 5, "accumulation": accumulation, "data_rank": rank, "data_size": size}
    return MixedBatches(pairs, text, mixture, **options)


@pytest.mark.parametrize(("size", "accumulation"), [(1, 1), (1, 2), (2, 2), (4, 1), (8, 1), (16, 1)])
def test_a_global_batch_is_the_same_in_the_same_order_for_any_ranks_and_micro_batches(
    tmp_path: Path, size: int, accumulation: int
) -> None:
    index, text = shards(tmp_path / "s"), text_shards(tmp_path / "t")
    seen, texts = [], []
    for rank in range(size):
        batches = mixed_batches(index, text, rank, size, accumulation=accumulation).step(3)
        assert [len(batch["tokens"]) for batch in batches] == [16 // size // accumulation] * accumulation
        for batch in batches:
            # Rows of one repeated id are the text.
            texts += (batch["tokens"] == batch["tokens"][:, :1]).all(1).tolist()
        seen += rows(batches)
    assert seen == rows(mixed_batches(index, text, accumulation=1).step(3))
    assert texts == [False, False, False, True] * 4


def test_text_samples_count_by_region_where_the_recipe_says_so(tmp_path: Path) -> None:
    index, text = shards(tmp_path / "s"), text_shards(tmp_path / "t")
    objectives = ObjectiveConfig(loss_normalisation="region", caption_ratio=0.0)
    make = partial(coglm_sample, objectives=objectives, config=COGLM, vocabulary=VOCABULARY)
    mixed = mixed_batches(index, text, make=make, loss_normalisation="region", accumulation=1)
    shares = set()
    for batch in [batch for step in range(3) for batch in mixed.step(step)]:
        sums = batch["loss_weights"].sum(1)
        torch.testing.assert_close(sums, sums.round())  # whole regions
        assert torch.equal(batch["loss_weights"] > 0, batch["loss_mask"])
        torch.testing.assert_close(sums[0:3], torch.ones(3))  # a picture is one region
        shares |= {round(1 / float(weight)) for weight in batch["loss_weights"][3::4].unique() if weight}
    assert shares == {1, 2, 3}  # spans within 15 % of 24 slots


@pytest.mark.parametrize("weight", [0.01, 0.99])
def test_a_share_that_leaves_nothing_of_one_kind_is_refused(weight: float) -> None:
    with pytest.raises(ConfigError, match=f"text_weight {weight}"):
        Mixture.of(16, weight, 0, 1)


@pytest.mark.parametrize(("mode", "languages"), [("one", {1}), ("all", {2})])
def test_captions_of_a_row(tmp_path: Path, mode: str, languages: set[int]) -> None:
    pair = shards(tmp_path / "s").read(0)
    objectives = ObjectiveConfig(captions_per_row=mode, caption_ratio=0.0)
    found = set()
    kinds = set()
    for seed in range(20):
        sample = coglm_sample(
            pair, np.random.default_rng(seed), objectives=objectives, config=COGLM, vocabulary=VOCABULARY
        )
        text = set(sample.tokens[:TEXT].tolist())
        english, chinese = (bool(text & set(pair.text_ids[name].tolist())) for name in ("en", "zh"))
        found.add(english + chinese)
        kinds.add((english, chinese))
    assert found == languages
    assert mode == "all" or kinds == {(True, False), (False, True)}


def test_superres_samples_have_the_codes_as_labels(tmp_path: Path) -> None:
    pair = shards(tmp_path / "s").read(1)
    assert pair.superres_codes is not None
    rng = np.random.default_rng(0)
    common = {"coglm": COGLM, "vocabulary": VOCABULARY}
    direct = direct_sample(pair, rng, config=DirectSRConfig(text_length=4), **common)  # type: ignore[arg-type]
    iterative = iterative_sample(pair, rng, config=IterativeSRConfig(text_length=4), **common)  # type: ignore[arg-type]
    for sample, masked in ((direct, 64), (iterative, int(iterative.loss_mask.sum()))):
        assert np.array_equal(sample.labels[-64:], pair.superres_codes)
        assert int(sample.loss_mask.sum()) == masked > 0
    assert 0 < iterative.loss_mask.sum() < 64


def test_every_kind_names_the_samples_of_a_batch(tmp_path: Path) -> None:
    index, text = shards(tmp_path / "s"), text_shards(tmp_path / "t")
    named = pair_batches(index, global_batch=10, make=lambda pair, rng: pair.key, only_superres=True)
    assert named.keys(3) == named.samples(3)  # type: ignore[comparison-overlap]
    whole = [key for rank in range(2) for key in mixed_batches(index, text, rank, 2).keys(3)[:6]]
    assert whole == pair_batches(index, global_batch=12).keys(3)
    for rank in range(2):
        keys = mixed_batches(index, text, rank, 2).keys(3)
        assert len(keys) == 8 and all(key in "012345678" for key in keys[6:])
    pictures = image_batches(("superres",), rank=1, size=2, accumulation=1)
    shown = [round(float(picture[1, 0, 0]) * 255) for picture in pictures.step(2)[0]["pixels"]]
    assert pictures.keys(2) == [f"p{number}" for number in shown]
