"""What a rank leaves behind: its outcome, and its exit code even where no outcome can be written."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cogview2.pipeline.attempt import Attempt
from cogview2.pipeline.distributed.process import World
from cogview2.pipeline.errors import ExitCode, Preempted, RunDirectoryError
from cogview2.stages import _runner
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


GLOO = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:10669")


def _end(attempt: Attempt, error: Exception, caplog: pytest.LogCaptureFixture) -> tuple[str, str]:
    """Return reason and message of rank 0, which ends with `error`."""
    caplog.clear()
    assert _guarded(attempt, WORLD, lambda: _work(error)) == ExitCode.FAILED
    outcome = attempt.outcome(0)
    assert outcome is not None
    return outcome.reason, outcome.message


def test_a_rank_that_lost_a_failed_peer_points_to_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = Attempt(tmp_path)
    attempt.write_outcome(1, "RunDirectoryError", 73, None, "the disk is full; free space")
    reason, message = _end(attempt, GLOO, caplog)
    assert reason == "lost_peer" and message.startswith("rank 1 (host ")
    assert "RunDirectoryError: the disk is full; free space; look at" in message and "gloo" not in message
    assert "Traceback" not in caplog.text and message in caplog.text
    first = attempt.first_failure()
    assert first is not None and first.rank == 1

    monkeypatch.setattr(_runner, "_failed_before", lambda *_: None)  # the mutant
    assert "gloo" in _end(attempt, GLOO, caplog)[1] and "Traceback" in caplog.text


def test_the_store_that_is_gone_points_to_it_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    attempt = Attempt(tmp_path)
    attempt.write_outcome(1, "DataError", 78, None, "no pictures")
    lost = dist.DistNetworkError("Failed to recv, got 0 bytes. Did the remote server shut down?")
    reason, message = _end(attempt, lost, caplog)
    assert reason == "lost_peer" and "DataError: no pictures; look at" in message


def test_an_orderly_stop_is_no_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    attempt = Attempt(tmp_path)
    attempt.write_outcome(
        1, "preempted", ExitCode.REQUEUE, 7, "stopped by SIGTERM after step 7, which is saved"
    )
    assert "gloo" in _end(attempt, GLOO, caplog)[1]


@pytest.mark.parametrize(
    ("other", "error"),
    [
        (None, GLOO),
        ("the disk is full", ValueError("a bug of this rank's own")),
        ("the disk is full", RuntimeError("shape mismatch")),
        ("[gloo/transport] Connection closed by peer", GLOO),  # both lost a third one, which left no word
        ("Failed to recv, got 0 bytes. Connection was likely closed.", GLOO),
    ],
)
def test_other_errors_keep_their_own_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, other: str | None, error: Exception
) -> None:
    attempt = Attempt(tmp_path)
    if other is not None:
        attempt.write_outcome(1, "RunDirectoryError", 73, None, other)
    assert _end(attempt, error, caplog) == (type(error).__name__, f"{type(error).__name__}: {error}")
    assert "Traceback" in caplog.text
