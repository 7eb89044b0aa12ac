"""The cascade: stages in order, each started, waited for, and believed only by its DONE record."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from cogview2.launch.changes import RESTART_FLAG, accept_recipe, set_aside, withdraw
from cogview2.launch.eta import cascade_eta, training_flops
from cogview2.launch.failure import Losses, PeerStop, explain, record_silent_ends, was_interrupted
from cogview2.launch.interruptions import Interruptions
from cogview2.launch.job import JobSpec
from cogview2.launch.launchers import Launcher, LocalLauncher, fewer_hosts, job_spec
from cogview2.launch.process import JobGroup
from cogview2.launch.progress import ProgressLine, describe, duration, stage_label
from cogview2.launch.requeue import nothing_gained, remember_start
from cogview2.pipeline import fsops
from cogview2.pipeline.attempt import Attempt
from cogview2.pipeline.config.loading import stages_folder
from cogview2.pipeline.config.stages import STAGES, Recipe
from cogview2.pipeline.config.units import resolve_stage
from cogview2.pipeline.errors import CogView2Error, ConfigError, ExitCode, LaunchError
from cogview2.pipeline.run_dir import REPEATABLE, RunDirectory, needed_stages, units

_FRESH_SECONDS = 60.0
"""A look at the hosts is believed for this long."""
_MARGIN_SECONDS = 30.0
"""What agents get on top of the ranks' own time to save, before their connections are cut."""
_SHARED_SECONDS = 65.0
"""How late a shared file system may show a file that another host wrote."""


@dataclass(frozen=True)
class Options:
    """How to run a cascade."""

    stages: tuple[str, ...]
    restart_stale: bool = False
    launcher: Launcher = field(default_factory=LocalLauncher)


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


def resolve_deepspeed(
    recipe: Recipe, stages: tuple[str, ...], slots: Sequence[int], *, cpu: bool
) -> dict[str, dict[str, object]]:
    """Return the DeepSpeed configuration of every selected unit; refuses contradictions before any start.

    Args:
        recipe: what is trained.
        stages: those that are selected.
        slots: ranks of each host; a stage may use fewer hosts than there are, see `hosts_used`.
        cpu: the ranks run on CPUs.
    """
    resolved: dict[str, dict[str, object]] = {}
    for stage in stages:
        resolved |= resolve_stage(recipe, stage, slots, cpu=cpu)
    return resolved


def prepare(
    run: RunDirectory, recipe: Recipe, resolved: dict[str, dict[str, object]], options: Options
) -> None:
    """Create the run, or make `recipe` the recipe of an existing one; the caller holds the run's lock.

    Raises:
        CogView2Error: the recipe contradicts what was done before, or models from elsewhere are not there.
    """
    if run.exists():
        for line in accept_recipe(run, recipe, restart_stale=options.restart_stale):
            print(line)
    else:
        run.create(recipe)
    for stage in options.stages:
        for unit in units(stage):
            run.inputs(unit, recipe)  # models from elsewhere that are not there: said before any start
    for unit, config in resolved.items():
        fsops.write_json(run.deepspeed_path(unit), config)


class Cascade:
    """One `cogview2 run`, or one `cogview2 submit` that waits, of one run directory."""

    def __init__(self, run: RunDirectory, recipe: Recipe, options: Options) -> None:
        self.run = run
        self.recipe = recipe
        self.options = options
        self.launcher = options.launcher
        self.built = built_stages()
        self._looked_at = float("-inf")
        self._interruptions = Interruptions()

    def execute(self) -> ExitCode:
        """Run or resume the selected stages; returns the exit code of `cogview2 run`.

        Raises:
            CogView2Error: refused, before or between stages, in one sentence.
        """
        with self._interruptions.heeded():
            try:
                return self._execute()
            except CogView2Error as error:
                if not self._interruptions.asked:
                    raise
                # Ctrl-C reaches what we start as well, which then fails: that is no refusal.
                print(f"stopped ({error}); the same command goes on from there")
                return ExitCode.REQUEUE

    def _execute(self) -> ExitCode:
        self._resolve()  # contradictions are refused before anything is made, and before any host is asked
        with self.run.lock(f"cogview2, launcher {self.launcher.name}"):
            self._look_at_hosts()
            prepare(self.run, self.recipe, self._resolve(), self.options)
            missing = [stage for stage in self.options.stages if stage not in self.built]
            if missing:
                print(f"stages not built yet: {', '.join(missing)}")
            selected = [stage for stage in self.options.stages if stage in self.built]
            begin = time.monotonic()
            for index, stage in enumerate(selected, start=1):
                if self._interruptions.asked:
                    where = f"after {selected[index - 2]}, which is done" if index > 1 else f"before {stage}"
                    print(f"stopped {where}; the same command goes on from there")
                    return ExitCode.REQUEUE
                code = self._stage(stage, stage_label(index, len(selected), stage))
                if code != ExitCode.DONE:
                    return code
        print(f"done in {duration(time.monotonic() - begin)}: {self.run.path}")
        return ExitCode.DONE

    def _resolve(self) -> dict[str, dict[str, object]]:
        slots = [host.slots for host in self.launcher.hosts(self.recipe)]
        return resolve_deepspeed(
            self.recipe, self.options.stages, slots, cpu=self.launcher.uses_cpu(self.recipe)
        )

    def _look_at_hosts(self) -> None:
        if time.monotonic() - self._looked_at > _FRESH_SECONDS:
            self.launcher.check(self.run, self.recipe)
            self._looked_at = time.monotonic()

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
        self._look_at_hosts()
        if said := nothing_gained(self.run, stage):
            print(f"{label}  {said}", flush=True)
        attempt = directory.new_attempt()
        remember_start(self.run, stage, attempt)
        spec = job_spec(self.launcher, self.recipe, self.run.path, stage, attempt.number)
        spec.write()
        if said := fewer_hosts(self.launcher, self.recipe, spec):
            print(f"{label}  {said}", flush=True)
        commands = self.launcher.commands(spec)
        attempt.write_commands([command.argv for command in commands], commands[0].environment)
        local = all(command.stop == "ranks" for command in commands)
        limit = None if local else spec.grace_seconds + _MARGIN_SECONDS
        job = JobGroup(commands, attempt, spec.grace_seconds, limit_seconds=limit)
        losses, peers = Losses(spec, attempt, job), PeerStop(attempt, job, asks=not local)
        started = time.time()
        flops = training_flops(self.recipe, self.options.stages)

        def poll() -> None:
            if self._interruptions.asked:  # just before the job took the signals over
                job.interrupted = True
                job.stop()
            losses.look()
            peers.look()
            beat = directory.heartbeat()
            beat = beat if beat is not None and beat.time >= started else None
            line.update(beat, str(cascade_eta(beat, flops) or ""))

        line = ProgressLine(label)
        returncode = job.run(poll)
        self._interruptions.asked |= job.interrupted
        record_silent_ends(attempt, job, returncode)
        attempt.write_result(returncode, line.elapsed)
        if self._is_done(spec, attempt, patience=0.0 if local else _SHARED_SECONDS):
            beat = directory.heartbeat()
            words = f"{describe(beat)}  " if beat is not None and beat.time >= started else ""
            line.finish(f"{words}done in {duration(line.elapsed)}")
            return ExitCode.DONE
        return self._failed(attempt, line, losses, returncode)

    def _is_done(self, spec: JobSpec, attempt: Attempt, *, patience: float) -> bool:
        """Believe the record only; where every rank says that it is done, wait until it can be seen from here."""
        deadline = time.monotonic() + patience
        while not self.run.is_done(spec.stage):
            outcomes = attempt.outcomes()
            if len(outcomes) < spec.ranks or any(outcome.code for outcome in outcomes):
                return False
            if time.monotonic() >= deadline:
                return False
            time.sleep(1.0)
        return True

    @staticmethod
    def _failed(attempt: Attempt, line: ProgressLine, losses: Losses, returncode: int) -> ExitCode:
        job = losses.job
        failure = attempt.first_failure()
        lost = losses.hosts()
        if was_interrupted(attempt, job) and not lost:
            line.finish(f"stopped after {duration(line.elapsed)}; the same command starts it again")
            return ExitCode.REQUEUE
        if failure is not None and failure.code == ExitCode.REQUEUE and not lost:
            line.finish(failure.message or "stopped; the same command goes on from there")
            return ExitCode.REQUEUE
        line.finish(f"failed after {duration(line.elapsed)}")
        code, lines = explain(losses.spec, attempt, job, returncode, lost)
        for text in lines:
            print(text)
        return code


def summary(run: RunDirectory, stages: tuple[str, ...]) -> list[str]:
    """Return what finished stages want to be said last: `summary` in the extra of their DONE records."""
    records = [run.stage(unit).done() for stage in stages for unit in units(stage)]
    found = [record.extra.get("summary") for record in records if record is not None]
    return [str(line) for lines in found if isinstance(lines, list) for line in lines]
