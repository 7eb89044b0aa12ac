"""The state of a run, read from its files only: no server, no lock taken."""

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

from cogview2.launch.cascade import built_stages
from cogview2.launch.eta import cascade_eta, training_flops
from cogview2.launch.progress import duration, meter_words, rate
from cogview2.launch.ranks import rank_lines
from cogview2.pipeline.attempt import Outcome
from cogview2.pipeline.config.stages import STAGES
from cogview2.pipeline.errors import CogView2Error, ExitCode, RunDirectoryError
from cogview2.pipeline.run_dir import RunDirectory, named_run, units
from cogview2.pipeline.stage_dir import Heartbeat
from cogview2.pipeline.weights_manifest import is_weights_folder

_COLUMNS = ("stage", "state", "step", "loss", "speed", "eta", "wall")


@dataclass(frozen=True)
class StageStatus:
    """One row of `cogview2 status`."""

    stage: str
    state: str
    step: str = ""
    loss: str = ""
    speed: str = ""
    eta: str = ""
    wall: str = ""


def find_run(name: str | None, runs: Path) -> RunDirectory:
    """Return a run by path, by name below `runs`, or the newest one below `runs`."""
    if name is not None:
        return named_run(name, runs)
    found = [RunDirectory(path) for path in runs.iterdir()] if runs.is_dir() else []
    found = [run for run in found if run.exists()]
    if not found:
        raise RunDirectoryError(f"there is no run in {runs}; start one with `cogview2 run quickstart`")
    return max(found, key=_last_change)


def find_models(name: str, runs: Path) -> Path:
    """Return the path of a run (see `find_run`) or of a weights folder.

    Raises:
        RunDirectoryError: neither.
    """
    return Path(name).absolute() if is_weights_folder(Path(name)) else find_run(name, runs).path


def _last_change(run: RunDirectory) -> float:
    paths = [
        run.recipe_path,
        *run.path.glob("stages/*/heartbeat.json"),
        *run.path.glob("stages/*/attempts/*"),
    ]
    return max(path.stat().st_mtime for path in paths)


def stage_status(run: RunDirectory, stage: str, *, run_locked: bool, built: bool) -> StageStatus:
    """Return the row of one stage."""
    directory = run.stage(stage)
    attempts = directory.attempts()
    beat = directory.heartbeat()
    seconds = sum(attempt.seconds() or 0.0 for attempt in attempts)
    unfinished = bool(attempts) and attempts[-1].seconds() is None
    running = directory.is_running() or (run_locked and unfinished)
    if running and unfinished:
        seconds += max(0.0, time.time() - attempts[-1].path.stat().st_ctime)
    if running:
        state = "running"
    elif run.is_done(stage):
        state = "done"
    elif attempts:
        state = "interrupted" if _failure(run, stage) is None else "failed"
    else:
        return StageStatus(stage, "not started" if built else "not built yet")
    return StageStatus(
        stage,
        state,
        f"{beat.step}/{beat.steps}" if beat is not None else "",
        f"{beat.loss:.4g}" if beat is not None and beat.loss is not None else "",
        speed(beat),
        duration(beat.eta_seconds) if running and beat is not None and beat.eta_seconds else "",
        duration(seconds) if seconds else "",
    )


def _failure(run: RunDirectory, stage: str) -> Outcome | None:
    """Return why the newest attempt of a stage failed; None when it did not, or was told to stop."""
    attempt = run.stage(stage).latest_attempt()
    outcome = None if attempt is None else attempt.first_failure()
    return None if outcome is None or outcome.code == ExitCode.REQUEUE else outcome


def _failure_lines(run: RunDirectory, rows: list[StageStatus]) -> list[str]:
    lines = []
    for row in rows:
        outcome, attempt = _failure(run, row.stage), run.stage(row.stage).latest_attempt()
        if row.state == "failed" and outcome is not None and attempt is not None:
            step = "" if outcome.step is None else f" at step {outcome.step}"
            said = f"rank {outcome.rank}{step}: {outcome.reason}: {outcome.message}"
            lines.append(f"{row.stage}: {said}; logs: {attempt.path}")
    return lines


def speed(beat: Heartbeat | None) -> str:
    """Return the rates of a heartbeat in words: `12k tokens/s, 24 images/s, 410 TFLOP/s, 41% MFU`."""
    if beat is None or beat.throughput is None:
        return ""
    return ", ".join([f"{rate(beat.throughput)} {beat.unit}", *meter_words(beat)])


def table(run: RunDirectory) -> str:
    """Return the stages of a run as aligned text, and the ranks of the one that runs."""
    built, locked = built_stages(), run.is_locked()
    rows = [stage_status(run, stage, run_locked=locked, built=stage in built) for stage in STAGES]
    cells = [_COLUMNS, *[(r.stage, r.state, r.step, r.loss, r.speed, r.eta, r.wall) for r in rows]]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_COLUMNS))]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
    running = [row.stage for row in rows if row.state == "running"]
    ranks = rank_lines(run.stage(running[-1]).latest_attempt()) if running else []
    return "\n".join(
        [f"run {run.path}", *lines, *ranks, *_failure_lines(run, rows), *_cascade_line(run, rows)]
    )


def _cascade_line(run: RunDirectory, rows: list[StageStatus]) -> list[str]:
    """Return when all training will be done, as a line; none where nobody knows."""
    running = [row.stage for row in rows if row.state == "running"]
    if not running:
        return []
    with contextlib.suppress(
        CogView2Error
    ):  # a status is shown even where the recipe is from another version
        undone = [unit for stage in STAGES for unit in units(stage) if not run.is_done(stage)]
        flops = training_flops(run.load_recipe(), STAGES)
        left = {unit: flops[unit] for unit in undone if unit in flops}
        eta = cascade_eta(run.stage(running[-1]).heartbeat(), left)
        return [] if eta is None else [str(eta)]
    return []


def log_file(run: RunDirectory, stage: str | None, rank: int) -> Path:
    """Return the newest log of a rank, of the named stage or of the one that was started last.

    Raises:
        RunDirectoryError: nothing was started, or the rank has no log; the message names those that exist.
    """
    names = [stage] if stage is not None else list(STAGES)
    attempts = [attempt for name in names if (attempt := run.stage(name).latest_attempt()) is not None]
    if not attempts:
        what = f"stage {stage}" if stage is not None else "no stage"
        raise RunDirectoryError(
            f"{what} of {run.path} {'was never' if stage else 'was'} started; see `cogview2 status`"
        )
    attempt = max(attempts, key=lambda attempt: attempt.path.stat().st_ctime)
    path = attempt.rank_log(rank)
    if path.is_file():
        return path
    existing = ", ".join(str(number) for number in attempt.rank_logs())
    if existing:
        raise RunDirectoryError(f"{attempt.path} has no log of rank {rank}; there are ranks {existing}")
    hosts = attempt.host_logs()  # of a job on several hosts whose ranks never began
    return hosts[0] if hosts else attempt.launcher_log
