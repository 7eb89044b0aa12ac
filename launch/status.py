"""The state of a run, read from its files only: no server, no lock taken."""

import time
from dataclasses import dataclass
from pathlib import Path

from cogview2.launch.cascade import built_stages
from cogview2.launch.progress import duration
from cogview2.pipeline.config.stages import STAGES
from cogview2.pipeline.errors import RunDirectoryError
from cogview2.pipeline.run_dir import RunDirectory
from cogview2.pipeline.weights_manifest import is_weights_folder

_COLUMNS = ("stage", "state", "step", "loss", "wall")


@dataclass(frozen=True)
class StageStatus:
    """One row of `cogview2 status`."""

    stage: str
    state: str
    step: str = ""
    loss: str = ""
    wall: str = ""


def find_run(name: str | None, runs: Path) -> RunDirectory:
    """Return a run by path, by name below `runs`, or the newest one below `runs`."""
    if name is not None:
        for path in (Path(name), runs / name):
            if RunDirectory(path).exists():
                return RunDirectory(path)
        raise RunDirectoryError(
            f"no run {name!r}: neither a run directory nor a name in {runs}; check --runs-dir"
        )
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
        state = "interrupted"
    else:
        return StageStatus(stage, "not started" if built else "not built yet")
    return StageStatus(
        stage,
        state,
        f"{beat.step}/{beat.steps}" if beat is not None else "",
        f"{beat.loss:.4g}" if beat is not None and beat.loss is not None else "",
        duration(seconds) if seconds else "",
    )


def table(run: RunDirectory) -> str:
    """Return the stages of a run as aligned text."""
    built, locked = built_stages(), run.is_locked()
    rows = [stage_status(run, stage, run_locked=locked, built=stage in built) for stage in STAGES]
    cells = [_COLUMNS, *[(row.stage, row.state, row.step, row.loss, row.wall) for row in rows]]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_COLUMNS))]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
    return "\n".join([f"run {run.path}", *lines])


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
    return attempt.launcher_log
