from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cogview2.pipeline.data.text_corpus import MAX_LINE_BYTES, TextRows, read_lines
from cogview2.pipeline.errors import DataError


def letters(line: str) -> list[int]:
    return [ord(character) for character in line]


def test_rows_hold_every_id_in_order(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one\n\n  two\r\n\u4e09\n".encode())
    (tmp_path / "b.txt").write_bytes(b"four")
    rows = TextRows([tmp_path / "a.txt", tmp_path / "b.txt"], letters, 4, separator=7)
    expected = [*letters("one"), 7, *letters("two"), 7, ord("\u4e09"), 7, *letters("four"), 7]
    for _ in range(2):
        got = list(rows)
        assert all(row.dtype == np.int32 and row.shape == (4,) for row in got)
        assert np.concatenate(got).tolist() == expected[: 4 * len(got)]
        assert rows.counts == {"lines": 4, "empty": 1, "rows": 3, "left_over": 3}


def test_bad_lines_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\ncaf\xe9\n" + b"x" * (MAX_LINE_BYTES * 2 + 5) + b"\n\xe2\x80\x8b\nlast\n")
    counts: Counter[str] = Counter()
    assert list(read_lines(path, counts)) == ["good", "last"]
    assert counts == {"lines": 2, "invalid_utf8": 1, "too_long": 1, "empty": 1}


def test_line_longer_than_many_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"ab" * 50)
    rows = list(TextRows([path], letters, 8))
    assert len(rows) == 12 and all(row.tolist() == letters("abababab") for row in rows)


def test_names_every_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "ok.txt").write_bytes(b"x")
    with pytest.raises(DataError, match=r"(?s)gone\.txt.*" + tmp_path.name):
        TextRows([tmp_path / "ok.txt", tmp_path / "gone.txt", tmp_path], letters, 4)


def test_real_corpus(fixtures: Path) -> None:
    counts: Counter[str] = Counter()
    assert sum(1 for _ in read_lines(fixtures / "data" / "corpus" / "zh.txt", counts)) == counts["lines"]
    assert counts["lines"] == 54773 and counts["invalid_utf8"] == 0
