"""Training that is killed again and again ends as training that nobody disturbed: nothing acknowledged is lost."""

from pathlib import Path
from typing import Any

import killed_training
import pytest
from equivalence import Cell
from killed_training import Job

from cogview2.pipeline.training import checkpoint
from cogview2.pipeline.training.state import loading

pytestmark = pytest.mark.distributed
WINDOW = 0.2
"""Seconds after the beginning of an attempt's first save in which the kill falls."""


def _judge(found: dict[str, Any], share: float) -> None:
    print(found)
    assert found["lost"] == 0
    assert found["different"] == []
    assert found["inside"] >= share * found["kills"], "too few kills fell into a save"


@pytest.mark.parametrize(
    ("cell", "kills", "options"),
    [
        pytest.param(Cell(1, dp=2), 5, {}, id="ZeRO 1, gate"),
        pytest.param(Cell(1, dp=2), 90, {}, id="ZeRO 1", marks=pytest.mark.slow),
        pytest.param(Cell(1, pp=2), 60, {}, id="pipe", marks=pytest.mark.slow),
        pytest.param(Cell(1, dp=2, pp=2), 30, {}, id="four ranks", marks=pytest.mark.slow),
        pytest.param(Cell(3, dp=2), 20, {}, id="ZeRO 3", marks=pytest.mark.slow),
        pytest.param(
            Cell(1, dp=2), 20, {"asynchronous": True}, id="in the background", marks=pytest.mark.slow
        ),
    ],
)
def test_kills(tmp_path: Path, cell: Cell, kills: int, options: dict[str, Any]) -> None:
    job = Job(cell, tmp_path / "stage", **options)
    share = 0.0 if options else 0.4  # in the background, what rank 0 does itself is short
    _judge(killed_training.repeat(job, kills, seed=7, window=WINDOW), share)


def test_a_random_state_that_is_not_kept_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load_random_state", lambda state: None)
    found = killed_training.repeat(Job(Cell(1, dp=2), tmp_path / "stage"), 1, seed=7, window=WINDOW)
    assert found["different"]


def test_an_acknowledgement_before_the_commit_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save that comes back without having committed: the next attempt does not find its step."""
    monkeypatch.setattr(checkpoint.Checkpointer, "_commit", lambda *_: None)
    found = killed_training.repeat(Job(Cell(1, dp=2), tmp_path / "stage"), 1, seed=7, window=WINDOW)
    assert found["lost"] == 1


@pytest.mark.slow
def test_bare_deepspeed_does_not_survive_this(tmp_path: Path) -> None:
    """The same kills on DeepSpeed's own save: the figure beside ours, and proof that they fall where it hurts."""
    job = Job(Cell(1, dp=2), tmp_path / "stage", bare=True)
    found = killed_training.repeat_bare(job, 60, seed=7, window=WINDOW)
    print(found)
    assert found["dead"] + found["behind"] > 0
