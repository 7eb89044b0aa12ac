"""The benchmark of recoveries, on a job that is a few lines of Python: what it kills, what it measures, what it calls lost."""

import random
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[3] / "benchmarks/training"))

import bench_recovery  # noqa: E402
import killed_jobs  # noqa: E402
from bench_recovery import BARE, OURS  # noqa: E402
from killed_jobs import Kill, LostError, Side  # noqa: E402

SCRIPT = """
import json, pathlib, subprocess, sys, time
folder = pathlib.Path(sys.argv[1])
if len(sys.argv) == 2:  # the launcher of the job
    sys.exit(subprocess.run([sys.executable, "-c", (folder / "script").read_text(), str(folder), "rank"]).returncode)
if (folder / "spoilt").exists():
    sys.exit(1)
path = folder / "steps.jsonl"
(folder / "began").touch()
done = len(path.read_text().splitlines()) - 1 if path.exists() else 0
(folder / "restored").write_text("0.25")
while True:
    done += 1
    with open(path, "a") as file:
        file.write(json.dumps({"step": done}) + "\\n")
    time.sleep(0.01)
"""


class Small(Side):
    """Two processes, one below the other; the lower one trains, and goes on one step before where it was."""

    def __init__(self, folder: Path, name: str = OURS) -> None:
        super().__init__(folder, name)
        (folder / "script").write_text(SCRIPT)
        self.renewed = 0

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-c", SCRIPT, str(self.folder)]

    @property
    def steps(self) -> Path:
        return self.folder / "steps.jsonl"

    def renew(self) -> None:
        for name in ("began", "restored"):
            (self.folder / name).unlink(missing_ok=True)

    def began(self) -> bool:
        return (self.folder / "began").exists()

    def restored(self) -> float | None:
        path = self.folder / "restored"
        return float(path.read_text()) if path.exists() and path.read_text() else None

    def begin_anew(self) -> None:
        self.renewed += 1
        (self.folder / "spoilt").unlink()


def test_a_recovery_ends_with_a_step_that_is_new(tmp_path: Path) -> None:
    side = Small(tmp_path)
    side.start()
    side.until(lambda: side.step() > 0, "a step")
    assert side.process is not None
    pids = killed_jobs.family(side.process.pid)
    assert len(pids) == 2
    kill = bench_recovery.recover(side, random.Random(1))
    assert not any(killed_jobs.runs(pid) for pid in pids)
    side.kill()
    assert kill.parts["restore"] == 0.25 and kill.seconds > 0
    assert sum(kill.parts.values()) == pytest.approx(kill.seconds)
    trained = [int(line.split(":")[1].rstrip("}")) for line in side.steps.read_text().splitlines()]
    again = [step for step in trained if trained.count(step) > 1]
    assert len(set(again)) == 1, (
        "the step after which it was killed came again, and was not taken for a new one"
    )


def test_a_job_that_does_not_go_on_is_counted_and_begun_anew(tmp_path: Path) -> None:
    side = Small(tmp_path)
    start = side.start

    def spoil() -> None:
        if len(side.kills) == 1 and side.renewed == 0:
            (tmp_path / "spoilt").touch()
        start()

    side.start = spoil  # type: ignore[method-assign]
    bench_recovery.block(side, 3, random.Random(1))
    assert (len(side.kills), side.lost, side.renewed) == (2, 1, 1)
    assert side.process is None


def test_a_job_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(killed_jobs, "_LIMIT_SECONDS", 0.05)
    with pytest.raises(LostError, match="waited 0 s for a step"):
        killed_jobs.wait_for(lambda: False, "a step")


def test_a_torn_line_is_no_step(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    assert killed_jobs.last_step(path) == 0
    path.write_text('{"step": 4')
    assert killed_jobs.last_step(path) == 0
    path.write_text('{"step": 3}\n{"step": 4}\n{"st')
    assert killed_jobs.last_step(path) == 4


def test_the_table_compares_medians(tmp_path: Path) -> None:
    sides = [Small(tmp_path, BARE), Small(tmp_path, OURS)]
    parts = dict.fromkeys(bench_recovery.PARTS, 0.5)
    sides[0].kills = [Kill(seconds, parts) for seconds in (4.0, 2.0, 3.0)]
    sides[1].kills = [Kill(seconds, parts) for seconds in (6.0, 1.0, 20.0)]
    sides[0].lost = 2
    bare, ours = bench_recovery.rows(sides)
    assert bare[:6] == [BARE, 5, 2, 3.0, 4.0, "1.00x"]
    assert ours[:6] == [OURS, 3, 0, 6.0, 20.0, "2.00x"] and ours[6:] == [0.5] * 4


@pytest.mark.parametrize(("share", "found"), [(0.5, 2), (0.95, 4), (0.0, 1)])
def test_percentiles_are_values_that_were_measured(share: float, found: int) -> None:
    assert bench_recovery.percentile([4, 1, 3, 2], share) == found


def test_blocks_share_the_kills_evenly(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_recovery.main(["--kills", "10", "--blocks", "3"])
    assert "no multiple of --blocks 3" in capsys.readouterr().err
