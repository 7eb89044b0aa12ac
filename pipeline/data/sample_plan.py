"""Which sample comes when: a pure function of shard sizes, seed and sample number; ranks do not matter."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cogview2.pipeline.errors import ConfigError, DataError

DEFAULT_WINDOW = 16
_ALGORITHM = "philox-1"
_CACHED_EPOCHS = 2


def random_words(count: int, *parts: int | str) -> np.ndarray:
    """Return uint64 [count] from the counter-based generator keyed by `parts`.

    Raw words, because NumPy promises the same ones in every version, and does not for shuffles.
    """
    return np.random.Philox(key=philox_key(*parts)).random_raw(count)


def philox_key(*parts: int | str) -> int:
    """Return a 128-bit key from the sha256 of `parts`."""
    text = "\0".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")


def _permutation(count: int, *parts: int | str) -> np.ndarray:
    return np.argsort(random_words(count, *parts), kind="stable")


class SamplePlan:
    """The order of an endless sequence of epochs.

    An epoch is a permutation of the shards, cut into windows of `window` shards, and a permutation of the
    samples inside each window: few shards are open at a time. Every sample comes exactly once in an epoch.
    """

    def __init__(self, sizes: Sequence[int], seed: int, window: int = DEFAULT_WINDOW) -> None:
        """Plan over shards of `sizes` samples; samples are numbered through the shards."""
        if not sum(sizes) or min(sizes) < 0:
            raise DataError(f"no samples to order: shard sizes {list(sizes)[:8]}; check the dataset")
        if window < 1:
            raise ConfigError(f"window {window} must be at least 1 shard")
        self.sizes = tuple(int(size) for size in sizes)
        self.seed = seed
        self.window = window
        self._starts = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        """Samples of an epoch."""
        return int(self._starts[-1])

    @property
    def order_version(self) -> str:
        """Names everything but sizes and seed that decides the order."""
        return f"{_ALGORITHM}-window{self.window}"

    def order(self, epoch: int) -> np.ndarray:
        """Return the sample numbers of `epoch` in their order, int64 [len(self)]; the last two are kept."""
        order = self._orders.get(epoch)
        if order is None:
            order = self._draw(epoch)
            kept = list(self._orders.items())[-(_CACHED_EPOCHS - 1) :]
            self._orders = {**dict(kept), epoch: order}
        return order

    def _draw(self, epoch: int) -> np.ndarray:
        shards = _permutation(len(self.sizes), "shards", self.seed, epoch)
        parts: list[np.ndarray] = []
        for number, first in enumerate(range(0, len(shards), self.window)):
            chosen = shards[first : first + self.window]
            ranges = [np.arange(self._starts[shard], self._starts[shard + 1]) for shard in chosen]
            indices = np.concatenate(ranges)
            parts.append(indices[_permutation(len(indices), "window", self.seed, epoch, number)])
        return np.concatenate(parts)

    def positions(self, start: int, count: int) -> list[tuple[int, int]]:
        """Return (epoch, index) of the samples [start, start + count) of the endless sequence."""
        if start < 0 or count < 0:
            raise DataError(f"no such samples: start {start}, count {count}")
        result: list[tuple[int, int]] = []
        while count > 0:
            epoch, offset = divmod(start, len(self))
            part = self.order(epoch)[offset : offset + count]
            result.extend((epoch, index) for index in part.tolist())
            start += len(part)
            count -= len(part)
        return result


def rank_slice(step: int, global_batch: int, dp_rank: int, dp_size: int) -> range:
    """Return the sample numbers of rank `dp_rank` in `step`, from 0: its part of [step * B, (step + 1) * B).

    Raises:
        ConfigError: the batch cannot be shared equally, or there is no such rank.
    """
    if dp_size < 1 or global_batch < 1 or global_batch % dp_size:
        raise ConfigError(
            f"train.global_batch {global_batch} is no multiple of {dp_size} data-parallel ranks; change one"
        )
    if not 0 <= dp_rank < dp_size or step < 0:
        raise ConfigError(f"no rank {dp_rank} of {dp_size}, or no step {step}")
    share = global_batch // dp_size
    start = step * global_batch + dp_rank * share
    return range(start, start + share)


@dataclass(frozen=True)
class DataState:
    """Where training stands in its data: five plain values for the whole job."""

    order_version: str
    dataset_sha256: str
    seed: int
    epoch: int
    samples_consumed: int
    """Over all ranks and epochs, counted when the optimizer step is done; batches left out on the way count too."""

    @classmethod
    def at(cls, plan: SamplePlan, dataset_sha256: str, samples_consumed: int) -> "DataState":
        """Return the state after `samples_consumed` samples of `plan`."""
        epoch = samples_consumed // len(plan)
        return cls(plan.order_version, dataset_sha256, plan.seed, epoch, samples_consumed)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DataState":
        """Read `to_dict` back.

        Raises:
            DataError: a field is missing, unknown or of another type.
        """
        kinds = {
            "order_version": str,
            "dataset_sha256": str,
            "seed": int,
            "epoch": int,
            "samples_consumed": int,
        }
        wrong = [name for name, kind in kinds.items() if type(values.get(name)) is not kind]
        wrong += sorted(set(values) - set(kinds))
        if wrong or values["samples_consumed"] < 0:
            raise DataError(
                f"data state {values} is damaged in {wrong or ['samples_consumed']}; use another checkpoint"
            )
        return cls(**values)

    def check(self, plan: SamplePlan, dataset_sha256: str) -> None:
        """Refuse to continue in another order than the one that was begun.

        Raises:
            DataError: dataset, seed or order differ from those of the checkpoint.
        """
        pairs = {
            "dataset": (self.dataset_sha256, dataset_sha256, "restore the shards"),
            "seed": (self.seed, plan.seed, "restore the seed"),
            "sample order": (self.order_version, plan.order_version, "use the version that wrote it"),
        }
        for what, (saved, now, remedy) in pairs.items():
            if saved != now:
                raise DataError(
                    f"the checkpoint was trained with {what} {saved}, this run has {now}: going on would "
                    f"repeat some samples and skip others; {remedy}, or start a new run from its weights "
                    f"(init_from)"
                )
        if self.epoch != self.samples_consumed // len(plan):
            raise DataError(
                f"the checkpoint says epoch {self.epoch} after {self.samples_consumed} samples, but an "
                f"epoch has {len(plan)}; restore the shards"
            )
