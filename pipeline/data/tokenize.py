"""From accepted pictures and captions to token shards; each shard is a pure function of its range of records."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cogview2.pipeline.config.data import DataConfig
from cogview2.pipeline.data.images import open_image, square, to_array
from cogview2.pipeline.data.pixels import downsample
from cogview2.pipeline.data.records import RawPair, Refusal, RefusedError, TokenPair
from cogview2.pipeline.data.shard_writer import ShardEntry, write_shard
from cogview2.pipeline.data.sources import Source
from cogview2.pipeline.tokenizers.image import ImageTokenizer
from cogview2.pipeline.tokenizers.text import TextTokenizer

logger = logging.getLogger(__name__)


@dataclass
class Refused:
    """Records that were left out, by reason, with a few examples of each."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, refusal: Refusal) -> None:
        """Count one."""
        self.counts[refusal.reason] += 1
        examples = self.examples.setdefault(refusal.reason, [])
        if len(examples) < 3:
            examples.append(f"{refusal.key}: {refusal.detail}")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values (dataclasses.asdict breaks a Counter before Python 3.12)."""
        return {"counts": dict(self.counts), "examples": self.examples}


class PairTokenizer:
    """Turns raw pairs into token pairs, a batch of pictures at a time."""

    def __init__(self, text: TextTokenizer, image: ImageTokenizer, data: DataConfig, batch: int) -> None:
        self.text, self.image, self.data, self.batch = text, image, data, batch

    def tokenize(self, source: Source, indices: list[int], refused: Refused) -> Iterator[TokenPair]:
        """Yield the usable ones of the records `indices`, in order; the others are counted in `refused`."""
        opened: list[tuple[RawPair, np.ndarray, bool]] = []
        for index in indices:
            try:
                pair = source.read(index)
                rules = self.data.images
                image = open_image(pair.image, rules, rules.min_side or self.data.base_size)
            except RefusedError as error:
                refused.add(Refusal(source.keys[index], error.reason, error.detail))
                continue
            # Enlarging a picture would teach super-resolution to blur, so small ones have base codes only.
            large = min(image.size) >= self.data.superres_size
            opened.append((pair, to_array(square(image, self.data.superres_size)), large))
            if len(opened) == self.batch:
                yield from self._encode(opened)
                opened = []
        if opened:
            yield from self._encode(opened)

    def _encode(self, opened: list[tuple[RawPair, np.ndarray, bool]]) -> Iterator[TokenPair]:
        full = torch.from_numpy(np.stack([pixels for _, pixels, _ in opened])).float() / 255
        base = self._codes(downsample(full, self.data.base_size))
        superres = self._codes(full)
        for (pair, _, large), base_codes, superres_codes in zip(opened, base, superres, strict=True):
            text_ids = {
                language: np.array(self.text.encode(caption), dtype=np.int32)
                for language, caption in pair.captions.items()
            }
            yield TokenPair(
                pair.key,
                text_ids,
                base_codes,
                superres_codes if large else None,
                dict(pair.captions),
                dict(pair.metadata),
            )

    def _codes(self, pixels_BCHW: torch.Tensor) -> np.ndarray:
        pixels = pixels_BCHW.to(self.image.device).contiguous(memory_format=torch.channels_last)
        return self.image.encode(pixels).cpu().numpy().astype(np.int32)


def shard_ranges(count: int, per_shard: int) -> list[range]:
    """Cut `count` records into consecutive ranges, one for each shard."""
    return [range(start, min(start + per_shard, count)) for start in range(0, count, per_shard)]


def write_range(
    folder: Path,
    name: str,
    tokenizer: PairTokenizer,
    source: Source,
    indices: list[int],
    report: Callable[[Refused], None],
) -> ShardEntry:
    """Write one shard; `report` gets what was left out of it, before the shard is final."""
    refused = Refused()
    pairs = list(tokenizer.tokenize(source, indices, refused))
    report(refused)
    return write_shard(folder, name, pairs)
