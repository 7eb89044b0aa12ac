"""Reads the samples of a step for one rank, one step ahead."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import numpy as np

from cogview2.pipeline.data.sample_plan import SamplePlan, philox_key, rank_slice

T = TypeVar("T")


def sample_rng(seed: int, epoch: int, key: str, salt: str) -> np.random.Generator:
    """Return the random generator of one sample in one epoch: the same on any rank, at any time.

    Args:
        seed: of the run.
        epoch: so that augmentation differs between epochs.
        key: of the sample.
        salt: names the use, so that two uses draw different numbers.
    """
    return np.random.Generator(np.random.Philox(key=philox_key("sample", seed, epoch, key, salt)))


class StepLoader(Generic[T]):
    """The samples of each step for one data-parallel rank; any step may be asked for, in any order."""

    def __init__(
        self,
        read: Callable[[int], T],
        plan: SamplePlan,
        global_batch: int,
        dp_rank: int,
        dp_size: int,
        *,
        part: range | None = None,
        prefetch: bool = True,
    ) -> None:
        """Read through `read(index)`; with `prefetch`, another thread calls it (one thread at a time).

        `part` is this rank's part of each global batch, where it is not an equal share.
        """
        self._part = rank_slice(0, global_batch, dp_rank, dp_size) if part is None else part
        self._read = read
        self._plan = plan
        self._global_batch = global_batch
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="step-loader") if prefetch else None
        self._ahead: tuple[int, Future[list[T]]] | None = None

    def positions(self, step: int) -> list[tuple[int, int]]:
        """Return (epoch, index) of this rank's samples in `step`, counted from 0."""
        return self._plan.positions(step * self._global_batch + self._part.start, len(self._part))

    def step(self, step: int) -> list[T]:
        """Return this rank's samples of `step`, in the order of `positions`.

        An error of `read` is raised here, by the step that needs the sample, never by the one before.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == step:
            samples = ahead[1].result()
        else:
            if ahead is not None and not ahead[1].cancel():
                ahead[1].exception()  # wait: `read` is called by one thread at a time
            samples = self._load(step)
        if self._pool is not None:
            self._ahead = (step + 1, self._pool.submit(self._load, step + 1))
        return samples

    def _load(self, step: int) -> list[T]:
        return [self._read(index) for _, index in self.positions(step)]

    def close(self) -> None:
        """End the thread; what it has read ahead is dropped."""
        self._ahead = None
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def __enter__(self) -> "StepLoader[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
