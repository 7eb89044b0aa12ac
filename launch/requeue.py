"""Whether a stopped stage may go back into Slurm's queue: asked by the batch script, answered by the exit code."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cogview2.pipeline import fsops
from cogview2.pipeline.attempt import Attempt
from cogview2.pipeline.command_line import Parser
from cogview2.pipeline.config.stages import STAGES
from cogview2.pipeline.errors import CogView2Error, ExitCode
from cogview2.pipeline.run_dir import RunDirectory, units
from cogview2.pipeline.training.state.manifest import MANIFEST, committed_steps, folder_name

_NO_WORK = ("attempts", "samples", "tensorboard", "checkpoints", "quarantine")
"""Folders of a stage where files appear without anything being gained."""


def progress_path(run: RunDirectory, stage: str) -> Path:
    """Return where the last seen progress of a stage is kept, RUN/submit/STAGE.progress.json."""
    return run.path / "submit" / f"{stage}.progress.json"


def progress(run: RunDirectory, stage: str) -> dict[str, Any]:
    """Return what a stage has kept so far: steps of its newest checkpoints, finished units, finished pieces of work.

    A checkpoint counts by its manifest, which is written last; a stage without checkpoints (shards, evaluation) by
    the number of files it has finished. More of any of them than before is progress.
    """
    steps: dict[str, int] = {}
    done = files = 0
    for unit in units(stage):
        directory = run.stage(unit)
        folder = directory.checkpoints
        found = [
            step for step in committed_steps(folder) if (folder / folder_name(step) / MANIFEST).is_file()
        ]
        steps[unit] = max(found, default=-1)
        done += directory.done() is not None
        if not found:
            files += _finished_files(directory.path)
    return {"steps": steps, "done": done, "files": files}


def _finished_files(folder: Path) -> int:
    """Return the number of files in the sub-folders of a stage that hold its work; unfinished ones have a dot."""
    if not folder.is_dir():
        return 0
    places = [entry for entry in folder.iterdir() if entry.is_dir() and entry.name not in _NO_WORK]
    return sum(
        1
        for place in places
        for path in place.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def is_ahead(now: dict[str, Any], before: dict[str, Any]) -> bool:
    """Return whether anything was gained between two values of `progress`."""
    steps = any(step > before["steps"].get(unit, -1) for unit, step in now["steps"].items())
    return steps or now["done"] > before["done"] or now["files"] > before["files"]


def nothing_gained(run: RunDirectory, stage: str) -> str:
    """Return one sentence when the last attempt of a stage kept nothing; else nothing.

    Called before an attempt is made: a loop around `cogview2 run` that never gets anywhere must be seen.
    """
    last = run.stage(stage).latest_attempt()
    if last is None:
        return ""
    now = progress(run, stage)
    try:
        ahead = is_ahead(now, json.loads(last.progress_path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""  # an attempt of an earlier version left no note
    if ahead:
        return ""
    return (
        f"attempt {last.number} saved nothing new (what is kept so far: {_words(now)}); should that go on, read its logs: "
        f"{last.path}"
    )


def remember_start(run: RunDirectory, stage: str, attempt: Attempt) -> None:
    """Keep with an attempt what the stage had when it began; see `nothing_gained`."""
    fsops.write_json(attempt.progress_path, progress(run, stage))


def remember(run: RunDirectory, stage: str) -> None:
    """Keep the progress of now, for the next question; called at submission and with every answer."""
    fsops.make_dirs(progress_path(run, stage).parent)
    fsops.write_json(progress_path(run, stage), progress(run, stage))


def decide(run: RunDirectory, stage: str, restarts: int, limit: int) -> tuple[bool, str]:
    """Return whether to put the job back into the queue, and one sentence that says why.

    Args:
        run: the run.
        stage: the stage that asked to be started again (exit code 75).
        restarts: how often Slurm has started this job again already.
        limit: launch.slurm.max_requeues.
    """
    now = progress(run, stage)
    try:
        before = json.loads(progress_path(run, stage).read_text(encoding="utf-8"))
        ahead = is_ahead(now, before)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        ahead = is_ahead(now, {"steps": {}, "done": 0, "files": 0})
    if restarts >= limit:
        return False, (
            f"{stage}: not requeued, it was requeued {restarts} times and launch.slurm.max_requeues is {limit}; "
            "submit it again to go on"
        )
    if not ahead:
        return False, (
            f"{stage}: not requeued, nothing was saved since it was started before (what is kept so far: "
            f"{_words(now)}); read its log, then submit it again"
        )
    remember(run, stage)
    return True, f"{stage}: requeued, it goes on from {_words(now)} (restart {restarts + 1} of {limit})"


def _words(now: dict[str, Any]) -> str:
    steps = [f"{unit} step {step}" for unit, step in now["steps"].items() if step >= 0]
    files = now["files"]
    return ", ".join(steps) or (f"{files} finished file{'s' * (files > 1)}" if files else "nothing")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the sentence; return 0 for yes and 1 for no."""
    parser = Parser(prog="cogview2.launch.requeue", description="May this stage go back into the queue?")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--stage", choices=list(STAGES), required=True)
    parser.add_argument("--restarts", type=_count, default=0, help="SLURM_RESTART_COUNT")
    parser.add_argument("--limit", type=_count, required=True, help="launch.slurm.max_requeues")
    arguments = parser.parse_args(argv)
    try:
        yes, sentence = decide(
            RunDirectory(arguments.run_dir), arguments.stage, arguments.restarts, arguments.limit
        )
    except CogView2Error as error:
        print(f"cogview2: not requeued: {error}")
        return int(ExitCode.FAILED)
    print(f"cogview2: {sentence}")
    return int(ExitCode.DONE if yes else ExitCode.FAILED)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no count")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
