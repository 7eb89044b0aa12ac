"""Micro batches of each training stage: pure functions of the number of the batch, over pictures or token shards.

Batch `step` is what that update (from 0) reads, except in a run that leaves batches out (data/skipped_batches.py).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from cogview2.pipeline.config.base import fingerprint
from cogview2.pipeline.config.data import DataConfig
from cogview2.pipeline.config.model import CogLMConfig, DirectSRConfig, IterativeSRConfig
from cogview2.pipeline.config.stages import ObjectiveConfig
from cogview2.pipeline.data.loader import StepLoader, sample_rng
from cogview2.pipeline.data.objectives import (
    Normalisation,
    Sample,
    compose_row,
    direct_sr_sample,
    iterative_sr_sample,
    text_image_sample,
    text_sample,
)
from cogview2.pipeline.data.pixels import downsample, load_pixels
from cogview2.pipeline.data.records import TokenPair
from cogview2.pipeline.data.sample_plan import SamplePlan, rank_slice
from cogview2.pipeline.data.shard_index import ShardIndex
from cogview2.pipeline.data.sources import Source
from cogview2.pipeline.errors import ConfigError, DataError
from cogview2.pipeline.tokenizers.vocabulary import Vocabulary
from cogview2.pipeline.training.modules import Batch

_CACHE_BYTES = 512 * 1024 * 1024


def _cut(batch: list[Batch], accumulation: int) -> list[Batch]:
    """Stack samples and cut them into `accumulation` micro batches."""
    size = len(batch) // accumulation
    names = batch[0].keys()
    return [
        {name: torch.stack([sample[name] for sample in batch[k : k + size]]) for name in names}
        for k in range(0, len(batch), size)
    ]


class ImageBatches:
    """Training pictures for the VQVAE; the kind of picture (DataConfig, image_sizes) changes with the batch."""

    def __init__(
        self,
        source: Source,
        usable: list[int],
        data: DataConfig,
        kinds: tuple[str, ...],
        *,
        seed: int,
        global_batch: int,
        accumulation: int,
        data_rank: int,
        data_size: int,
    ) -> None:
        """Read the pictures `usable` of `source`, which are known to decode."""
        if not usable:
            raise DataError(
                f"no usable picture for training in {source.description}; check data.source and data.images"
            )
        self._source, self._usable, self._data, self._kinds = source, usable, data, kinds
        self._seed, self._accumulation = seed, accumulation
        self.plan = SamplePlan([len(usable)], seed)
        self.dataset_sha256 = fingerprint({"source": source.fingerprint, "usable": usable})
        self._loader = StepLoader(self._read, self.plan, global_batch, data_rank, data_size)
        self._cache: dict[int, np.ndarray] = {}

    def _read(self, index: int) -> np.ndarray:
        """Return picture `index` at full size, uint8 [3, S, S]; decoded pictures are kept while they fit."""
        pixels = self._cache.get(index)
        if pixels is None:
            pixels = load_pixels(self._source, self._usable[index], self._data)
            if (len(self._cache) + 1) * pixels.nbytes <= _CACHE_BYTES:
                self._cache[index] = pixels
        return pixels

    def step(self, step: int) -> list[Batch]:
        """Return the micro batches of batch `step`: {"pixels"}."""
        kind = self._kinds[step % len(self._kinds)]
        places = self._loader.positions(step)
        pixels = torch.from_numpy(np.stack(self._loader.step(step))).float() / 255
        side = self._data.base_size
        if kind == "base":
            pixels = downsample(pixels, side)
        elif kind == "crop":
            pixels = torch.stack(
                [self._crop(p, epoch, index) for p, (epoch, index) in zip(pixels, places, strict=True)]
            )
        return _cut([{"pixels": picture} for picture in pixels], self._accumulation)

    def keys(self, step: int) -> list[str]:
        """Return the keys of this rank's pictures of batch `step`."""
        return [self._source.keys[self._usable[index]] for _, index in self._loader.positions(step)]

    def _crop(self, picture_CHW: torch.Tensor, epoch: int, index: int) -> torch.Tensor:
        rng = sample_rng(self._seed, epoch, str(index), "crop")
        side = self._data.base_size
        top, left = rng.integers(0, picture_CHW.shape[-1] - side + 1, size=2).tolist()
        return picture_CHW[:, top : top + side, left : left + side]


def _to_batch(samples: list[Sample], accumulation: int) -> list[Batch]:
    fields = ("tokens", "position_ids", "labels", "loss_mask", "roles", "loss_weights")
    return _cut(
        [{f: torch.from_numpy(getattr(sample, f)) for f in fields} for sample in samples], accumulation
    )


class PairBatches:
    """Samples made from token pairs of shards by a function of the pair and its own random generator."""

    def __init__(
        self,
        index: ShardIndex,
        make: Callable[[TokenPair, np.random.Generator], Sample],
        salt: str,
        *,
        seed: int,
        global_batch: int,
        accumulation: int,
        data_rank: int,
        data_size: int,
        only_superres: bool = False,
        part: range | None = None,
    ) -> None:
        """Read pairs in the order of the plan.

        Args:
            index: of the shards.
            make: a sample of a pair.
            salt: names the use of the pairs, see `sample_rng`.
            seed: of the run.
            global_batch: pairs of a step, over all ranks.
            accumulation: micro batches of a step.
            data_rank: among the data-parallel ranks.
            data_size: how many they are.
            only_superres: leave out pairs without high-resolution codes.
            part: this rank's part of the global batch, where it is not an equal share (`Mixture`).
        """
        self._index, self._make, self._salt = index, make, salt
        self._seed, self._accumulation = seed, accumulation
        numbers = range(len(index))
        self._numbers = (
            [i for i in numbers if index.locate(i)[1].has_superres] if only_superres else list(numbers)
        )
        if not self._numbers:
            raise DataError(
                "no sample of the shards has high-resolution codes: every picture is smaller than the final size; "
                "set data.base_size or data.superres_ratio lower"
            )
        sizes = index.sizes if len(self._numbers) == len(index) else [len(self._numbers)]
        self.plan = SamplePlan(sizes, seed)
        self.dataset_sha256 = index.fingerprint
        self._loader = StepLoader(
            lambda i: index.read(self._numbers[i]), self.plan, global_batch, data_rank, data_size, part=part
        )

    def samples(self, step: int) -> list[Sample]:
        """Return this rank's samples of batch `step`."""
        places = self._loader.positions(step)
        pairs = self._loader.step(step)
        return [
            self._make(pair, sample_rng(self._seed, epoch, pair.key, self._salt))
            for pair, (epoch, _) in zip(pairs, places, strict=True)
        ]

    def step(self, step: int) -> list[Batch]:
        """Return the micro batches of batch `step`."""
        return _to_batch(self.samples(step), self._accumulation)

    def keys(self, step: int) -> list[str]:
        """Return the keys of this rank's pairs of batch `step`."""
        return [self._index.locate(self._numbers[index])[1].key for _, index in self._loader.positions(step)]


@dataclass(frozen=True)
class Mixture:
    """Which samples of a global batch are text, and which of them are this rank's; the former is the same for any ranks."""

    text_batch: int
    """Samples of text in a global batch."""
    is_text: tuple[bool, ...]
    """Of each of this rank's samples."""
    pairs: range
    """This rank's, among the pairs of a global batch."""
    text: range
    """This rank's, among the texts of a global batch."""

    @classmethod
    def of(cls, global_batch: int, weight: float, data_rank: int, data_size: int) -> "Mixture":
        """Spread text evenly over a global batch, and give each rank an equal part of it.

        Raises:
            ConfigError: `weight` of the batch is none of it, or all.
        """
        text = round(weight * global_batch)
        if not 0 < text < global_batch:
            raise ConfigError(
                f"coglm.objectives.text_weight {weight} of a global batch of {global_batch} is {text} samples, and both kinds "
                "must be in it; change it or the batch"
            )
        before = [slot * text // global_batch for slot in range(global_batch + 1)]
        mine = rank_slice(0, global_batch, data_rank, data_size)
        first, last = before[mine.start], before[mine.stop]
        return cls(
            text,
            tuple(before[slot + 1] > before[slot] for slot in mine),
            range(mine.start - first, mine.stop - last),
            range(first, last),
        )


class MixedBatches:
    """Pairs and pure text in a fixed share of every global batch."""

    def __init__(
        self,
        pairs: PairBatches,
        text: ShardIndex,
        mixture: Mixture,
        *,
        seed: int,
        loss_normalisation: Normalisation = "batch",
        accumulation: int,
        data_rank: int,
        data_size: int,
    ) -> None:
        """Mix samples of `text` into those of `pairs`, which read the part of the same mixture."""
        self._pairs, self._text, self._seed, self._accumulation = pairs, text, seed, accumulation
        self._is_text = mixture.is_text
        self._loss_normalisation: Normalisation = loss_normalisation
        self.plan, self.dataset_sha256 = pairs.plan, pairs.dataset_sha256
        self._text_plan = SamplePlan(text.sizes, seed)
        self._loader = StepLoader(
            text.read_text, self._text_plan, mixture.text_batch, data_rank, data_size, part=mixture.text
        )

    def step(self, step: int) -> list[Batch]:
        """Return the micro batches of batch `step`, with the text spread over them."""
        places = self._loader.positions(step)
        rows = self._loader.step(step)
        samples = [
            text_sample(
                row,
                sample_rng(self._seed, epoch, str(index), "text"),
                loss_normalisation=self._loss_normalisation,
            )
            for row, (epoch, index) in zip(rows, places, strict=True)
        ]
        pairs, texts = iter(self._pairs.samples(step)), iter(samples)
        together = [next(texts) if is_text else next(pairs) for is_text in self._is_text]
        return _to_batch(together, self._accumulation)

    def keys(self, step: int) -> list[str]:
        """Return the keys of this rank's pairs and rows of text of batch `step`."""
        rows = [self._text.locate(index)[1].key for _, index in self._loader.positions(step)]
        return self._pairs.keys(step) + rows


def _one_language(pair: TokenPair, rng: np.random.Generator) -> list[int]:
    languages = sorted(pair.text_ids)
    return [int(i) for i in pair.text_ids[languages[int(rng.integers(len(languages)))]]] if languages else []


def coglm_sample(
    pair: TokenPair,
    rng: np.random.Generator,
    *,
    objectives: ObjectiveConfig,
    config: CogLMConfig,
    vocabulary: Vocabulary,
) -> Sample:
    """Make a text-image sample of CogLM; which captions share a row is the recipe's choice."""
    if objectives.captions_per_row == "one":
        captions = [_one_language(pair, rng)]
    else:
        # Chinese first, as stored by the published pipeline.
        captions = [
            [int(i) for i in pair.text_ids[language]] for language in sorted(pair.text_ids, reverse=True)
        ]
    row = compose_row(captions, pair.base_codes, config.text_length, vocabulary)
    return text_image_sample(row, rng, objectives=objectives, config=config, vocabulary=vocabulary)


def direct_sample(
    pair: TokenPair,
    rng: np.random.Generator,
    *,
    config: DirectSRConfig,
    coglm: CogLMConfig,
    vocabulary: Vocabulary,
) -> Sample:
    """Make a sample of direct SR with one of the pair's captions."""
    assert pair.superres_codes is not None
    text = _one_language(pair, rng)
    return direct_sr_sample(
        text, pair.base_codes, pair.superres_codes, config=config, coglm=coglm, vocabulary=vocabulary
    )


def iterative_sample(
    pair: TokenPair,
    rng: np.random.Generator,
    *,
    config: IterativeSRConfig,
    coglm: CogLMConfig,
    vocabulary: Vocabulary,
) -> Sample:
    """Make a sample of iterative SR with one of the pair's captions."""
    assert pair.superres_codes is not None
    text = _one_language(pair, rng)
    return iterative_sr_sample(
        text, pair.superres_codes, rng, config=config, coglm=coglm, vocabulary=vocabulary
    )
