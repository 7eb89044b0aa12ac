"""What a rank leaves behind: its outcome, and its exit code even where no outcome can be written."""

from pathlib import Path

import pytest
import torch

from cogview2.pipeline.attempt import Attempt
from cogview2.pipeline.distributed.process import World
from cogview2.pipeline.errors import ExitCode, Preempted, RunDirectoryError
from cogview2.stages._runner import _guarded

WORLD = World(0, 1, 0, torch.device("cpu"))
ENDS = [
    (None, ExitCode.DONE, "done"),
    (Preempted("stopped"), ExitCode.REQUEUE, "preempted"),
    (RunDirectoryError("the disk is full"), ExitCode.CANNOT_WRITE, "RunDirectoryError"),
    (ValueError("a bug"), ExitCode.FAILED, "ValueError"),
]


def _work(error: Exception | None) -> None:
    if error is not None:
        raise error


@pytest.mark.parametrize(("error", "code", "reason"), ENDS)
def test_every_end_has_its_outcome(
    tmp_path: Path, error: Exception | None, code: ExitCode, reason: str
) -> None:
    assert _guarded(Attempt(tmp_path), WORLD, lambda: _work(error)) == code
    (outcome,) = Attempt(tmp_path).outcomes()
    assert (outcome.code, outcome.reason) == (code, reason)


@pytest.mark.parametrize(("error", "code", "reason"), ENDS)
def test_the_code_counts_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None, code: ExitCode, reason: str
) -> None:
    def full(*_: object) -> None:
        raise RunDirectoryError("the disk is full")

    monkeypatch.setattr(Attempt, "write_outcome", full)
    assert _guarded(Attempt(tmp_path), WORLD, lambda: _work(error)) == code
