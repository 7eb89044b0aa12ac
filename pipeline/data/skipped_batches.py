"""The batches that training leaves out for good, and with that which batch each update reads.

Batch k is what update k (from 0) reads as long as nothing is left out. The list is kept in skipped_batches.json in the stage's
folder. It belongs to the whole job: any number of ranks reads the same samples.
"""

import json
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cogview2.pipeline import fsops
from cogview2.pipeline.data.sample_plan import DataState
from cogview2.pipeline.errors import DataError

FILE = "skipped_batches.json"
_FORMAT = 1


@dataclass(frozen=True)
class SkippedBatch:
    """One batch that is never read again, and why."""

    number: int
    """From 0."""
    step: int
    """The step that read it, from 1 as in the logs; after going back, that step reads another batch."""
    reason: str
    samples: tuple[str, ...] = ()
    """Keys of its samples, where they have keys."""


class SkippedBatches:
    """All of them; `add` returns a longer list and changes nothing."""

    def __init__(self, entries: Iterable[SkippedBatch] = ()) -> None:
        """Leave out `entries`, in the order in which they were found; a number stands once."""
        self.entries = tuple(entries)
        self._numbers = sorted({entry.number for entry in self.entries})
        if len(self._numbers) != len(self.entries):
            raise DataError(f"a batch is left out twice in {[e.number for e in self.entries]}; use each once")

    def __len__(self) -> int:
        return len(self.entries)

    def number(self, step: int) -> int:
        """Return the batch that update `step` (from 0) reads: number `step` of those that are not left out."""
        number = step
        for skipped in self._numbers:
            if skipped > number:
                break
            number += 1
        return number

    def behind(self, steps: int) -> int:
        """Return how many batches lie behind `steps` updates, with those left out between them.

        What is left out later lies ahead of every committed update, so the answer for a checkpoint stays as it was.
        """
        return self.number(steps - 1) + 1 if steps else 0

    def ahead(self, steps: int) -> int:
        """Return how many of the left-out batches lie ahead of `steps` updates."""
        return len(self._numbers) - bisect_left(self._numbers, self.behind(steps))

    def add(self, entry: SkippedBatch) -> "SkippedBatches":
        """Return a list that leaves out one more."""
        return SkippedBatches((*self.entries, entry))

    def check(self, data: DataState, steps: int, global_batch: int) -> None:
        """Refuse to go on from a checkpoint that was reached with another list.

        Args:
            data: of the checkpoint.
            steps: updates done in it.
            global_batch: samples of an update.

        Raises:
            DataError: it stands elsewhere in the data than `steps` updates under this list.
        """
        expected = self.behind(steps) * global_batch
        if data.samples_consumed != expected:
            raise DataError(
                f"the checkpoint of step {steps} stands at sample {data.samples_consumed}, but after {steps} steps of "
                f"{global_batch} samples and the {len(self)} batches of {FILE} it would be {expected}; restore {FILE} and "
                "train.global_batch as they were"
            )

    def write(self, path: Path) -> None:
        """Write the list durably.

        Raises:
            RunDirectoryError: full or read-only disk.
        """
        fsops.write_json(path, {"format": _FORMAT, "batches": [asdict(entry) for entry in self.entries]})

    @classmethod
    def read(cls, path: Path) -> "SkippedBatches":
        """Return the list of a file; without a file nothing is left out.

        Raises:
            DataError: the file is damaged.
        """
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document["format"] != _FORMAT:
                raise ValueError(f"format {document['format']!r}, known is {_FORMAT}")
            return cls(_entry(item) for item in document["batches"])
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, KeyError, TypeError, DataError) as error:
            raise DataError(
                f"{path} is damaged ({error}), and without it the order of the data is not known; restore it, or delete it "
                "together with checkpoints/ to begin at step 0"
            ) from error


def _entry(item: dict[str, Any]) -> SkippedBatch:
    entry = SkippedBatch(**item | {"samples": tuple(item["samples"])})
    numbers, words = (entry.number, entry.step), (entry.reason, *entry.samples)
    if not all(type(value) is int and value >= 0 for value in numbers):
        raise ValueError(f"{numbers} are no numbers of a batch and a step")
    if not all(isinstance(value, str) for value in words):
        raise ValueError(f"batch {entry.number} has a reason or a key that is no text")
    return entry
