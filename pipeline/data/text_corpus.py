"""Plain text, one sentence a line, packed into rows of equal length for the text objective (spec 2.6 T)."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from cogview2.pipeline.data.captions import normalise
from cogview2.pipeline.errors import DataError

MAX_LINE_BYTES = 64 * 1024
"""Longer lines are skipped and counted."""


def check_readable(paths: Sequence[Path]) -> None:
    """Refuse files that cannot be read, all at once, before any work is done.

    Raises:
        DataError: naming each.
    """
    problems: list[str] = []
    for path in paths:
        if not path.is_file():
            problems.append(f"{path} is not a file")
        elif not os.access(path, os.R_OK):
            problems.append(f"{path}: permission denied")
    if problems:
        raise DataError(f"cannot read the text of data.text: {'; '.join(problems)}; correct the paths")


def read_lines(path: Path, counts: Counter[str]) -> Iterator[str]:
    """Yield the clean non-empty lines of a UTF-8 file.

    Args:
        path: the file.
        counts: `lines`, `invalid_utf8`, `too_long` and `empty` are counted here while reading.

    Raises:
        DataError: the file cannot be read.
    """
    check_readable([path])
    with open(path, "rb") as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            if len(line) > MAX_LINE_BYTES:
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE_BYTES)
                counts["too_long"] += 1
                continue
            try:
                text = normalise(line.decode("utf-8"))
            except UnicodeDecodeError:
                counts["invalid_utf8"] += 1
                continue
            if text:
                counts["lines"] += 1
                yield text
            else:
                counts["empty"] += 1


class TextRows:
    """Rows of exactly `length` ids: line after line with `separator` between, cut wherever a row is full."""

    def __init__(
        self,
        paths: Sequence[Path],
        encode: Callable[[str], list[int]],
        length: int,
        separator: int | None = None,
    ) -> None:
        """Check the files; nothing is read yet.

        Args:
            paths: UTF-8 files, one sentence a line, in this order.
            encode: a line -> its model ids.
            length: S, ids of a row.
            separator: id put after each line, for example that of the newline piece.

        Raises:
            DataError: a file cannot be read, or `length` is not positive.
        """
        if length < 1:
            raise DataError(f"a row of {length} ids is empty; the length must be at least 1")
        check_readable(paths)
        self._paths = list(paths)
        self._encode = encode
        self._length = length
        self._separator = [] if separator is None else [separator]
        self.counts: Counter[str] = Counter()
        """Of the last pass: lines, empty, invalid_utf8, too_long, rows, and the ids left over at the end."""

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield rows int32 [S]; the incomplete last row is dropped and counted as `left_over`."""
        self.counts.clear()
        pending: list[int] = []
        for path in self._paths:
            for line in read_lines(path, self.counts):
                pending += self._encode(line)
                pending += self._separator
                while len(pending) >= self._length:
                    self.counts["rows"] += 1
                    yield np.array(pending[: self._length], dtype=np.int32)
                    pending = pending[self._length :]
        self.counts["left_over"] = len(pending)
