"""`cogview2 submit`: the same cascade on other machines, or a description of what would be started there."""

import shlex
from pathlib import Path

from cogview2.launch.cascade import Cascade, Options, prepare, resolve_deepspeed
from cogview2.launch.job import JobSpec
from cogview2.launch.launchers import Launcher, fewer_hosts, job_spec
from cogview2.pipeline.attempt import redacted
from cogview2.pipeline.config.stages import Recipe
from cogview2.pipeline.errors import ConfigError, ExitCode
from cogview2.pipeline.run_dir import RunDirectory

SUBMITTED = ("hostfile", "slurm", "mpi", "pdsh", "openmpi", "mpich")
"""The launchers that `submit` offers."""


def submit(
    run: RunDirectory, recipe: Recipe, options: Options, *, hosts_file: Path | None, dry_run: bool
) -> ExitCode:
    """Start the cascade with the launcher of `options`, or print what would be started.

    Slurm takes the jobs and goes on without us; for all others this process starts one stage after the other and
    stays until the last is done.

    Raises:
        CogView2Error: refused, in one sentence (hosts: a line each).
    """
    if options.launcher.name == "slurm":
        return _submit_to_slurm(run, recipe, options, hosts_file=hosts_file, dry_run=dry_run)
    if dry_run:
        for line in describe(run, recipe, options):
            print(line)
        return ExitCode.DONE
    return Cascade(run, recipe, options).execute()


def _submit_to_slurm(
    run: RunDirectory, recipe: Recipe, options: Options, *, hosts_file: Path | None, dry_run: bool
) -> ExitCode:
    from cogview2.launch import slurm  # late, like every launcher that is not used

    if hosts_file is not None:
        raise ConfigError(
            f"--hosts {hosts_file}: Slurm chooses the nodes; leave --hosts out and set launch.slurm.nodes"
        )
    launch = recipe.launch
    resolved = resolve_deepspeed(
        recipe,
        options.stages,
        [launch.ranks_per_node] * launch.slurm.nodes,
        cpu=options.launcher.uses_cpu(recipe),
    )
    if not dry_run:
        with run.lock("cogview2 submit"):
            prepare(run, recipe, resolved, options)
    slurm.submit(run, recipe, options.stages, dry_run=dry_run)
    return ExitCode.DONE


def describe(run: RunDirectory, recipe: Recipe, options: Options) -> list[str]:
    """Return what would be started, stage by stage: every command as a shell would take it, every variable.

    Reads files of this machine only; asks no host, and writes nothing.
    """
    launcher = options.launcher
    hosts = launcher.hosts(recipe)
    slots = [host.slots for host in hosts]
    resolve_deepspeed(recipe, options.stages, slots, cpu=launcher.uses_cpu(recipe))
    lines = [
        f"run {run.path}",
        f"{sum(slots)} ranks on {', '.join(f'{host.name} ({host.slots})' for host in hosts)}",
    ]
    for stage in options.stages:
        latest = run.stage(stage).latest_attempt()
        spec = job_spec(launcher, recipe, run.path, stage, latest.number + 1 if latest else 1)
        done = "  (done before: skipped if its settings and inputs are the same)"
        lines += ["", f"stage {stage}{done if run.is_done(stage) else ''}"]
        said = fewer_hosts(launcher, recipe, spec)
        lines += [f"  {said}"] if said else []
        lines += _commands(launcher, spec)
    variables = job_spec(launcher, recipe, run.path, options.stages[0], 1).environment
    lines += ["", "variables set for every rank, on top of what its host gives it:"]
    lines += [f"  {name}={shlex.quote(value)}" for name, value in redacted(variables).items()]
    return lines


def _commands(launcher: Launcher, spec: JobSpec) -> list[str]:
    lines: list[str] = []
    for index, command in enumerate(launcher.commands(spec)):
        lines.append(f"  {command.label}: {shlex.join(command.argv)}")
        if command.stop == "stdin":  # an agent: this is what it starts over there
            lines.append(f"    there: {shlex.join(spec.runner_argv(index))}")
    return lines
