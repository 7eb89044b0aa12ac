"""A small data set of token shards, and what a reader makes of it when it is damaged."""

import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cogview2.pipeline.data.records import TokenPair
from cogview2.pipeline.data.shard_index import ShardIndex, write_manifest
from cogview2.pipeline.data.shard_writer import write_shard
from cogview2.pipeline.errors import DataError

SHARDS = 3
SAMPLES = 4


def token_pair(number: int) -> TokenPair:
    """Return a pair whose content follows from its number."""
    rng = np.random.default_rng(number)
    return TokenPair(
        key=f"images__{number:04d}",
        text_ids={name: rng.integers(0, 9999, 5).astype(np.int32) for name in ("en", "zh")},
        base_codes=rng.integers(0, 512, 16).astype(np.int32),
        superres_codes=rng.integers(0, 512, 64).astype(np.int32) if number % 3 else None,
        captions={"en": f"picture {number:04d}", "zh": f"\u732b {number:04d}"},
        metadata={"source_name": f"images/{number:04d}.png"},
    )


def plain(pair: TokenPair) -> tuple[object, ...]:
    """Return all of a pair as values that can be compared."""
    superres = None if pair.superres_codes is None else pair.superres_codes.tolist()
    ids = {name: array.tolist() for name, array in pair.text_ids.items()}
    return pair.key, ids, pair.base_codes.tolist(), superres, pair.captions, pair.metadata


def build(folder: Path, first: int = 0) -> list[TokenPair]:
    """Write SHARDS shards of SAMPLES pairs; other numbers from `first` on give another data set of the same sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [token_pair(first + number) for number in range(SHARDS * SAMPLES)]
    entries = [
        write_shard(folder, f"train-{shard:06d}", pairs[shard * SAMPLES : (shard + 1) * SAMPLES])
        for shard in range(SHARDS)
    ]
    write_manifest(folder, entries, {"split": "train", "source": "small"})
    return pairs


@dataclass
class Verdict:
    """What reading every sample of a data set gave."""

    errors: list[str] = field(default_factory=list)
    """The messages of refusals, of the whole set or of single samples."""
    wrong: list[int] = field(default_factory=list)
    """Numbers of samples that were delivered although they are not what was written."""
    right: list[int] = field(default_factory=list)

    @property
    def silent(self) -> bool:
        """Whether the damage went by without a word, or reached a batch."""
        return bool(self.wrong) or not self.errors


def read_all(folder: Path, expected: list[TokenPair]) -> Verdict:
    """Read every sample; only a DataError is a refusal, anything else is a crash."""
    verdict = Verdict()
    try:
        index = ShardIndex.load(folder)
    except DataError as error:
        verdict.errors.append(str(error))
        return verdict
    for number in range(len(index)):
        try:
            read = index.read(number)
        except DataError as error:
            verdict.errors.append(str(error))
            continue
        same = number < len(expected) and plain(read) == plain(expected[number])
        (verdict.right if same else verdict.wrong).append(number)
    index.close()
    return verdict


def flip(path: Path, at: int, bit: int) -> None:
    """Turn one bit of a file around."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def random_place(folder: Path, rng: random.Random) -> tuple[Path, int]:
    """Return a file of the data set and a byte of it; every byte of all files is as likely."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    at = rng.randrange(sum(path.stat().st_size for path in files))
    for path in files:
        if at < path.stat().st_size:
            return path, at
        at -= path.stat().st_size
    raise AssertionError("unreachable")
