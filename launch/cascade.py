"""The cascade: stages in order, each started, waited for, and believed only by its DONE record."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cogview2.launch import local
from cogview2.launch.changes import RESTART_FLAG, accept_recipe, set_aside, withdraw
from cogview2.launch.process import Job
from cogview2.launch.progress import ProgressLine, describe, duration, stage_label
from cogview2.pipeline import fsops
from cogview2.pipeline.attempt import Attempt
from cogview2.pipeline.config.deepspeed import resolve
from cogview2.pipeline.config.loading import stages_folder
from cogview2.pipeline.config.stages import STAGES, Recipe
from cogview2.pipeline.config.training import TrainConfig
from cogview2.pipeline.errors import ConfigError, ExitCode, LaunchError
from cogview2.pipeline.run_dir import REPEATABLE, RunDirectory, needed_stages, units

_TAIL_LINES = 20
CommandMaker = Callable[[str, Path, Attempt, int], list[str]]


@dataclass(frozen=True)
class Options:
    """How to run a cascade here."""

    stages: tuple[str, ...]
    restart_stale: bool = False
    command: CommandMaker = local.command


def built_stages() -> list[str]:
    """Return the stages whose module exists in this installation, in order."""
    folder = stages_folder()
    return [stage for stage in STAGES if (folder / f"{stage}.py").is_file()]


def select_stages(text: str | None) -> tuple[str, ...]:
    """Return the stages named by `a..b`, `a..`, `..b`, `a,b` or `a`; all of them for None.

    Raises:
        ConfigError: a name that is no stage, or a range that runs backwards.
    """
    order = list(STAGES)
    if text is None:
        return tuple(order)
    first, dots, last = text.partition("..")
    names = [name for name in (first, last) if name] if dots else text.split(",")
    for name in names:
        if name not in order:
            raise ConfigError(f"--stages {text}: {name!r} is no stage; the stages are {', '.join(order)}")
    if not dots:
        return tuple(stage for stage in order if stage in names)
    begin = order.index(first) if first else 0
    end = order.index(last) if last else len(order) - 1
    if begin > end:
        raise ConfigError(f"--stages {text}: {first} comes after {last}; write {last}..{first}")
    return tuple(order[begin : end + 1])


def train_sections(recipe: Recipe) -> dict[str, TrainConfig]:
    """Return the training section of every unit that trains with DeepSpeed."""
    return {
        "train_vqvae": recipe.vqvae.train,
        "pretrain_coglm": recipe.coglm.train,
        "finetune_superres/direct": recipe.direct_sr.train,
        "finetune_superres/iterative": recipe.iterative_sr.train,
    }


def resolve_deepspeed(recipe: Recipe, stages: tuple[str, ...]) -> dict[str, dict[str, object]]:
    """Return the DeepSpeed configuration of every selected unit; refuses contradictions before any start."""
    ranks = recipe.launch.ranks
    cpu = local.uses_cpu(local.current_environment(), ranks)
    resolved: dict[str, dict[str, object]] = {}
    for unit, train in train_sections(recipe).items():
        if unit.partition("/")[0] in stages:
            try:
                resolved[unit] = resolve(train.deepspeed, train, ranks, cpu=cpu)
            except ConfigError as error:
                raise ConfigError(f"stage {unit}: {error}") from error
    return resolved


class Cascade:
    """One `cogview2 run` of one run directory."""

    def __init__(self, run: RunDirectory, recipe: Recipe, options: Options) -> None:
        self.run = run
        self.recipe = recipe
        self.options = options
        self.built = built_stages()

    def execute(self) -> ExitCode:
        """Run or resume the selected stages; returns the exit code of `cogview2 run`.

        Raises:
            CogView2Error: refused, before or between stages, in one sentence.
        """
        resolved = resolve_deepspeed(self.recipe, self.options.stages)
        with self.run.lock("cogview2 run"):
            self._prepare(resolved)
            missing = [stage for stage in self.options.stages if stage not in self.built]
            if missing:
                print(f"stages not built yet: {', '.join(missing)}")
            selected = [stage for stage in self.options.stages if stage in self.built]
            begin = time.monotonic()
            for index, stage in enumerate(selected, start=1):
                code = self._stage(stage, stage_label(index, len(selected), stage))
                if code != ExitCode.DONE:
                    return code
        print(f"done in {duration(time.monotonic() - begin)}: {self.run.path}")
        return ExitCode.DONE

    def _prepare(self, resolved: dict[str, dict[str, object]]) -> None:
        if self.run.exists():
            for line in accept_recipe(self.run, self.recipe, restart_stale=self.options.restart_stale):
                print(line)
        else:
            self.run.create(self.recipe)
        for stage in self.options.stages:
            for unit in units(stage):
                self.run.inputs(
                    unit, self.recipe
                )  # models from elsewhere that are not there: said before any start
        for unit, config in resolved.items():
            fsops.write_json(self.run.deepspeed_path(unit), config)

    def _stage(self, stage: str, label: str) -> ExitCode:
        self._check_needs(stage)
        self._check_stale(stage)
        if self.run.is_done(stage):
            for unit in units(stage):
                record = self.run.stage(unit).done()
                assert record is not None
                self.run.stage(unit).check_outputs(record)
            print(f"{label}  skipped: done before, with the same inputs and settings")
            return ExitCode.DONE
        return self._start(stage, label)

    def _check_needs(self, stage: str) -> None:
        wanted = needed_stages(stage, self.recipe)
        needed = [name for name in wanted if name in self.built and not self.run.is_done(name)]
        if needed:
            raise LaunchError(
                f"stage {stage} reads the outputs of {', '.join(needed)}, not done in {self.run.path}; "
                f"run them first: --stages {needed[0]}..{stage}"
            )

    def _check_stale(self, stage: str) -> None:
        """A stage whose inputs changed after it was done would mix two histories; some just run again."""
        for unit in units(stage):
            if not self.run.stage(unit).is_stale(self.run.fingerprint(self.recipe, unit)):
                continue
            if stage in REPEATABLE:
                withdraw(self.run, unit)
                print(f"{unit}: its settings or inputs changed, it runs again")
                continue
            if not self.options.restart_stale:
                raise ConfigError(
                    f"stage {unit} of {self.run.path} was made from other inputs than there are now; "
                    f"set it aside and run it again with {RESTART_FLAG}"
                )
            print(f"{unit}: its inputs changed, the old one is in {set_aside(self.run, unit)}")

    def _start(self, stage: str, label: str) -> ExitCode:
        directory = self.run.stage(stage)
        with directory.lock("the launcher, looking for ranks that are still alive"):
            pass  # ranks that outlived a killed launcher hold this lock: refused here, naming their process
        attempt = directory.new_attempt()
        ranks, threads = self.recipe.launch.ranks, self.recipe.launch.threads_per_rank
        argv = self.options.command(stage, self.run.path, attempt, ranks)
        environment = local.environment(local.current_environment(), ranks, threads)
        attempt.write_command(argv, environment)
        started = time.time()

        def poll() -> None:
            beat = directory.heartbeat()
            line.update(beat if beat is not None and beat.time >= started else None)

        line = ProgressLine(label)
        job = Job(argv, environment, attempt)
        returncode = job.run(poll)
        attempt.write_result(returncode, line.elapsed)
        if self.run.is_done(stage):
            beat = directory.heartbeat()
            words = f"{describe(beat)}  " if beat is not None and beat.time >= started else ""
            line.finish(f"{words}done in {duration(line.elapsed)}")
            return ExitCode.DONE
        return self._failed(stage, attempt, line, interrupted=job.interrupted, returncode=returncode)

    def _failed(
        self, stage: str, attempt: Attempt, line: ProgressLine, *, interrupted: bool, returncode: int
    ) -> ExitCode:
        failure = attempt.first_failure()
        if failure is None and interrupted:
            line.finish(f"stopped after {duration(line.elapsed)}; the same command starts it again")
            return ExitCode.REQUEUE
        if failure is not None and failure.code == ExitCode.REQUEUE:
            line.finish(failure.message or "stopped; the same command goes on from there")
            return ExitCode.REQUEUE
        line.finish(f"failed after {duration(line.elapsed)}")
        if failure is None:
            print(f"stage {stage} ended without its DONE record (launcher exit code {returncode})")
            log = attempt.launcher_log
        else:
            step = "" if failure.step is None else f" at step {failure.step}"
            print(f"rank {failure.rank} failed first{step}: {failure.reason}: {failure.message}")
            log = attempt.rank_log(failure.rank)
            log = log if log.is_file() else attempt.launcher_log
        print(f"last lines of {log}:")
        for text in tail(log, _TAIL_LINES):
            print(f"  {text}")
        print(f"all logs: {attempt.path}")
        known = failure is not None and failure.code in ExitCode.__members__.values()
        return ExitCode(failure.code) if failure is not None and known else ExitCode.FAILED


def summary(run: RunDirectory, stages: tuple[str, ...]) -> list[str]:
    """Return what finished stages want to be said last: `summary` in the extra of their DONE records."""
    records = [run.stage(unit).done() for stage in stages for unit in units(stage)]
    found = [record.extra.get("summary") for record in records if record is not None]
    return [str(line) for lines in found if isinstance(lines, list) for line in lines]


def tail(path: Path, count: int) -> list[str]:
    """Return the last `count` lines of a text file; nothing when it does not exist."""
    if not path.is_file():
        return []
    return path.read_text(encoding="utf-8", errors="replace").splitlines()[-count:]
