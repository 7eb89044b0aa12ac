"""`cogview2 status` shows what every rank is doing, by its files only."""

import time
from pathlib import Path

import pytest

from cogview2.launch.ranks import rank_lines, rank_states
from cogview2.launch.status import table
from cogview2.pipeline.attempt import Attempt, Beat
from cogview2.pipeline.config.loading import load_recipe
from cogview2.pipeline.run_dir import RunDirectory
from cogview2.pipeline.stage_dir import StageDirectory

NOW = 1_700_000_000.0


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    attempt = StageDirectory(tmp_path / "stage", "pretrain_coglm").new_attempt()
    attempt.prepare_beats()
    return attempt


def beat(attempt: Attempt, rank: int, age: float = 1.0, *, step: int = 7, phase: str = "step") -> None:
    attempt.write_beat(Beat(rank, f"node{rank // 8}", 100 + rank, phase, step, 3, NOW - age - 4, NOW - age))


def test_living_silent_and_ended_ranks(attempt: Attempt) -> None:
    beat(attempt, 0)
    beat(attempt, 1, 30.0, phase="data")
    beat(attempt, 2)
    attempt.write_outcome(2, "NumericError", 70, 7, "nan")
    assert [str(state) for state in rank_states(attempt, NOW)] == [
        "  rank 0 on node0: phase step of step 7, last progress 5 s ago",
        "  rank 1 on node0: phase data of step 7, last progress 34 s ago, SILENT for 30 s "
        "(stopped, killed, or its host hangs)",
        "  rank 2 on node0: ended: NumericError at step 7",
    ]
    assert [state.silent for state in rank_states(attempt, NOW)] == [False, True, False]


def test_of_many_ranks_only_the_odd_ones_are_shown(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: NOW)
    for rank in range(32):
        beat(attempt, rank, 99.0 if rank == 17 else 1.0, step=6 if rank == 3 else 7)
    lines = rank_lines(attempt)
    assert lines[:2] == ["ranks of attempt 1:", "  30 of 32 ranks: phase step of step 7"]
    assert [line.split(":")[0] for line in lines[2:]] == ["  rank 17 on node2", "  rank 3 on node0"]


def test_a_torn_heartbeat_is_no_rank(attempt: Attempt) -> None:
    beat(attempt, 0)
    (attempt.path / "beats" / "rank_1.json").write_text('{"rank": 1, "ho')
    assert list(attempt.beats()) == [0]
    assert rank_lines(None) == []


def test_status_shows_the_ranks_of_the_stage_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path / "run").create(load_recipe("quickstart", []))
    stage = run.stage("pretrain_coglm").create()
    attempt = stage.new_attempt()
    with stage.lock("rank 0"):
        assert "rank" not in table(run).partition("\n")[2]
        attempt.prepare_beats()
        attempt.write_beat(Beat(0, "node0", 17, "save", 40, 3, time.time(), time.time()))
        assert (
            "ranks of attempt 1:\n  rank 0 on node0: phase save of step 40, last progress 0 s ago"
            in table(run)
        )
    assert "rank 0" not in table(run)
