"""Tensors put together from parts in files, read in small pieces: the tensor-parallel layout (spec 10.3)."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from cogview2.pipeline.errors import CheckpointError
from cogview2.pipeline.weights.archives import Stored

CHUNK_BYTES = 4 * 1024 * 1024
"""Read at once, of all parts together; less than a row is never read."""

STACKED = re.compile(r"(^|\.)query_key_value(\.\d+)?\.(weight|bias)$")
"""Rows Q, K, V; each part holds its share of Q, then of K, then of V."""
ROWS = re.compile(r"(^|\.)(dense_h_to_4h\.(weight|bias)|word_embeddings\.weight)$")
COLUMNS = re.compile(
    r"((^|\.)attention\.dense|(^|\.)attention_plus\.dense\.\d+|(^|\.)dense_4h_to_h)\.weight$"
)
"""Their biases, like all else, are whole on every part."""


@dataclass(frozen=True)
class Span:
    """The rows first..last-1 of a stored tensor."""

    stored: Stored
    first: int
    last: int


@dataclass(frozen=True)
class Blocks:
    """A tensor as rows of blocks: blocks below each other are stacked, those in one tuple stand side by side."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: tuple[tuple[Span, ...], ...]

    @classmethod
    def of(cls, stored: Stored) -> "Blocks":
        """Return a tensor that is one part."""
        rows = stored.shape[0] if stored.shape else 1
        return cls(stored.shape, stored.dtype, ((Span(stored, 0, rows),),))

    def first_rows(self, count: int) -> "Blocks":
        """Return the tensor cut to its first `count` rows."""
        kept, left = [], count
        for block in self.blocks:
            rows = min(left, block[0].last - block[0].first)
            if rows:
                kept.append(tuple(Span(span.stored, span.first, span.first + rows) for span in block))
            left -= rows
        return Blocks((count, *self.shape[1:]), self.dtype, tuple(kept))

    def chunks(self) -> Iterator[torch.Tensor]:
        """Yield the tensor in blocks of whole rows, contiguous, on the CPU."""
        for block in self.blocks:
            width = sum(math.prod(span.stored.shape[1:]) * self.dtype.itemsize for span in block)
            step = max(1, CHUNK_BYTES // max(1, width))
            for start in range(0, block[0].last - block[0].first, step):
                parts = [
                    span.stored.rows(span.first + start, min(span.first + start + step, span.last))
                    for span in block
                ]
                yield (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).contiguous()

    def tensor(self) -> torch.Tensor:
        """Return the whole tensor."""
        pieces = list(self.chunks())
        if len(pieces) == 1:
            return pieces[0].reshape(self.shape)
        return torch.cat(pieces).reshape(self.shape) if pieces else torch.empty(self.shape, dtype=self.dtype)


def merge(name: str, parts: Sequence[Stored], where: str) -> Blocks:
    """Put the parts of one tensor together, rank 0 first.

    Args:
        name: the published name, which decides how it was cut.
        parts: one for each rank.
        where: the file or folder, for messages.

    Raises:
        CheckpointError: parts of several shapes or dtypes, or copies that differ.
    """
    first = parts[0]
    if len(parts) == 1:
        return Blocks.of(first)
    if any(part.shape != first.shape or part.dtype != first.dtype for part in parts):
        shapes = ", ".join(str(part.shape) for part in parts[:4])
        raise CheckpointError(f"{where}: the parts of {name} do not fit together ({shapes}); copy them again")
    count = len(parts)
    if STACKED.search(name):
        if first.shape[0] % 3:
            raise CheckpointError(
                f"{where}: {name} has {first.shape[0]} rows a part, no multiple of 3 (Q, K, V)"
            )
        third = first.shape[0] // 3
        spans = [(Span(part, third * i, third * (i + 1)),) for i in range(3) for part in parts]
        return Blocks((first.shape[0] * count, *first.shape[1:]), first.dtype, tuple(spans))
    if ROWS.search(name):
        rows = [(Span(part, 0, first.shape[0]),) for part in parts]
        return Blocks((first.shape[0] * count, *first.shape[1:]), first.dtype, tuple(rows))
    if COLUMNS.search(name):
        if len(first.shape) != 2:
            raise CheckpointError(f"{where}: {name} has the shape {first.shape}, not rows and columns")
        columns = tuple(Span(part, 0, first.shape[0]) for part in parts)
        return Blocks((first.shape[0], first.shape[1] * count), first.dtype, (columns,))
    whole = Blocks.of(first)
    for rank, part in enumerate(parts[1:], start=1):
        for ours, theirs in zip(whole.chunks(), Blocks.of(part).chunks(), strict=True):
            if not torch.equal(_bits(ours), _bits(theirs)):
                raise CheckpointError(
                    f"{where}: {name} should be the same on every part, but ranks 0 and {rank} differ; "
                    "the parts are not of one model"
                )
    return whole


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a contiguous tensor: not-a-number equals itself."""
    return tensor.reshape(-1).view(torch.uint8)


def split(name: str, tensor: torch.Tensor, rank: int, parts: int) -> torch.Tensor:
    """Return what rank `rank` of `parts` holds of a tensor; undoes `merge`.

    Raises:
        CheckpointError: it cannot be cut into so many parts.
    """
    if parts == 1:
        return tensor
    axis = 1 if COLUMNS.search(name) else 0
    pieces = 3 if STACKED.search(name) else 1
    if not (COLUMNS.search(name) or ROWS.search(name) or pieces == 3):
        return tensor
    if tensor.shape[axis] % (parts * pieces):
        raise CheckpointError(
            f"{name} of shape {tuple(tensor.shape)} cannot be cut into {parts} parts; choose another --tensor-parallel"
        )
    return torch.cat([piece.chunk(parts, axis)[rank] for piece in tensor.chunk(pieces, axis)], dim=axis)
