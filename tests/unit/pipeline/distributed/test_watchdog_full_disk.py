"""Whom a rank judges that cannot write its own heartbeat, and when it judges the others again."""

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from cogview2.pipeline.attempt import Attempt, Beat
from cogview2.pipeline.config.launch import WatchdogConfig
from cogview2.pipeline.distributed.watchdog import Watchdog
from cogview2.pipeline.stage_dir import StageDirectory

CONFIG = WatchdogConfig(step_seconds=10, save_seconds=20, start_seconds=30, work_seconds=40)
PEER = Beat(1, "b", 7, "step", 5, 3, 1000.0, 1000.0)


class _Disk:
    """Full or not; a watchdog of rank 0 of two that writes there, and time as it is told."""

    def __init__(self, attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full, write = False, Attempt.write_beat

        def write_beat(attempt: Attempt, beat: Beat) -> None:
            if self.full and beat.rank == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            write(attempt, beat)

        monkeypatch.setattr(Attempt, "write_beat", write_beat)
        self.attempt, self.dog = attempt, Watchdog(attempt, 0, 2, CONFIG)
        self.begin = self.dog._mark.at
        for step in (1, 2):
            self.dog.mark("step", step)
        attempt.write_beat(PEER)

    def reason(self, at: float, *, moves: bool = True) -> str:
        """Write a heartbeat and look, as if it were `at` seconds after the beginning."""
        now = self.begin + at
        if moves:
            self.dog._mark = self.dog._mark._replace(at=now)
        self.dog._beat(self.dog._mark, 0.0, now)
        self.dog._observe(now)
        return self.dog._reason(now, self.dog._mark, 0.0)

    def said(self) -> list[str]:
        log = self.attempt.rank_log(0)
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Disk]:
    found = _Disk(StageDirectory(tmp_path / "stage", "pretrain_coglm").new_attempt(), monkeypatch)
    yield found
    found.dog.end()


def test_others_are_judged_only_while_the_own_heartbeat_can_be_written(disk: _Disk) -> None:
    assert not disk.reason(0) and not disk.said()
    disk.full = True
    for at in (2, 12, 50, 99):
        assert not disk.reason(at)
    (line,) = disk.said()
    assert "heartbeats cannot be written below" in line and "(No space left on device)" in line
    assert "no rank is called silent; free space there" in line
    disk.full = False
    assert not disk.reason(100)  # the other one may not have written yet
    assert [line.partition(": ")[2] for line in disk.said()[1:]] == ["heartbeats can be written again"]
    assert not disk.reason(107)  # the 98 s from 2 to 100 do not count
    assert disk.reason(109).startswith("rank 1 (host b, process 7) is silent since")
    disk.full = True
    disk.reason(112)
    assert len(disk.said()) == 3


def test_a_disk_that_is_full_now_and_then_does_not_hide_a_stopped_rank(disk: _Disk) -> None:
    for at in range(0, 12):
        disk.full = at % 5 == 4
        said = disk.reason(float(at))
        assert not said
    assert "is silent since" in disk.reason(13.0)  # 10 s and the 2 s in which nobody could know


def test_mutant_no_fresh_start(disk: _Disk) -> None:
    assert not disk.reason(0)
    disk.full = True
    assert not disk.reason(50)
    disk.full, disk.dog._mute_since = False, None  # as if it had never been
    assert disk.reason(51).startswith("rank 1 (host b, process 7) is silent since")


def test_its_own_lack_of_progress_is_judged_and_nobody_is_named(disk: _Disk) -> None:
    disk.reason(0)
    disk.full = True
    assert not disk.reason(9.5, moves=False)
    said = disk.reason(10.5, moves=False)
    assert said.startswith(
        "this rank has made no progress for 10 s (launch.watchdog.step_seconds) in phase step of step 2"
    )
    assert "heartbeats cannot be written" in said and "rank 1" not in said


def test_whoever_left_is_still_named(disk: _Disk) -> None:
    disk.reason(0)
    disk.full = True
    disk.attempt.write_outcome(1, "RunDirectoryError", 73, 5, "the disk is full")
    assert "left with RunDirectoryError: the disk is full" in disk.reason(10.5, moves=False)


def test_whoever_waits_for_the_others_waits_on(disk: _Disk) -> None:
    disk.dog.mark("wait", None)
    disk.reason(0)
    disk.full = True
    assert not any(disk.reason(at, moves=False) for at in (2, 41, 79))
    disk.full = False
    assert not disk.reason(80, moves=False) and not disk.reason(86, moves=False)
    assert disk.reason(90, moves=False).startswith("rank 1 (host b, process 7) is silent")


def test_nobody_waits_for_ever(disk: _Disk) -> None:
    """Longer than any rank would work without progress and leave by itself."""
    disk.dog.mark("wait", None)
    disk.reason(0)
    disk.full = True
    assert not disk.reason(79, moves=False)
    assert disk.reason(81, moves=False).startswith("this rank has made no progress for 80 s")
