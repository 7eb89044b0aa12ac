import json
from pathlib import Path

import numpy as np
import torch

from cogview2.pipeline.training.metrics import MetricsWriter, gather_rows, sum_over_ranks


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_alone_the_sum_is_a_copy() -> None:
    values = torch.tensor([1.0, 2.0])
    total = sum_over_ranks(values)
    total += 1
    assert values.tolist() == [1.0, 2.0]


def test_alone_there_is_one_row_a_copy() -> None:
    row = torch.tensor([1.0, 2.0], dtype=torch.float64)
    rows = gather_rows(row)
    rows += 1
    assert rows.tolist() == [[2.0, 3.0]] and row.tolist() == [1.0, 2.0]


def test_words_stand_beside_the_numbers(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "board", 0)
    writer.scalars(1, {"slowest_ratio": 1.5}, {"slowest": "rank 3 on node2"})
    writer.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {"step": 1, "slowest_ratio": 1.5, "slowest": "rank 3 on node2"}
    assert b"rank 3 on node2" in next((tmp_path / "board").iterdir()).read_bytes()


def test_writes_exact_numbers(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "board", 0)
    writer.scalars(1, {"loss": 0.1 + 0.2})
    writer.image(1, "picture", np.zeros((4, 4, 3), dtype=np.uint8))
    writer.text(1, "words", "text")
    writer.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.1 + 0.2}
    assert list((tmp_path / "board").iterdir())


def test_steps_that_are_trained_again_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for resumed in (0, 3):
        writer = MetricsWriter(path, tmp_path / "board", resumed)
        for step in range(resumed + 1, 6):
            writer.scalars(step, {"loss": 1.0})
        writer.close()
    assert steps(path) == [1, 2, 3, 4, 5]


def test_torn_and_foreign_lines_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n[]\n{"loss": 2}\n{"step": 2, "lo')
    MetricsWriter(path, tmp_path / "board", 2).close()
    assert steps(path) == [1]
