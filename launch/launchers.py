"""The launchers: what each of them knows, and the one on this machine. All of them start the same JobSpec."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, cast

from cogview2.launch import local
from cogview2.launch.job import Command, Host, JobSpec
from cogview2.pipeline.config.launch import LaunchConfig
from cogview2.pipeline.config.stages import Recipe
from cogview2.pipeline.config.units import hosts_used
from cogview2.pipeline.errors import ConfigError
from cogview2.pipeline.run_dir import RunDirectory

LOCAL_HOST = "localhost"

_CLASSES = {
    "local": ("cogview2.launch.launchers", "LocalLauncher"),
    "hostfile": ("cogview2.launch.ssh", "HostfileLauncher"),
    "slurm": ("cogview2.launch.slurm", "SlurmLauncher"),
    "mpi": ("cogview2.launch.mpi", "MpiLauncher"),
    "pdsh": ("cogview2.launch.deepspeed_backends", "BackendLauncher"),
    "openmpi": ("cogview2.launch.deepspeed_backends", "BackendLauncher"),
    "mpich": ("cogview2.launch.deepspeed_backends", "BackendLauncher"),
}
"""Name -> module and class; imported when it is used, so that a launcher costs nothing where it is not."""
NAMES = tuple(_CLASSES)


class Launcher(Protocol):
    """Knows the hosts of a job and renders its commands.

    Made by `make(name, hosts_file)`; the order of calls for a stage is hosts, uses_cpu, check, rendezvous, commands.
    """

    @property
    def name(self) -> str:
        """One of NAMES."""

    def hosts(self, recipe: Recipe) -> tuple[Host, ...]:
        """Return the hosts and their slots; the sum of the slots is the number of ranks.

        Raises:
            CogView2Error: the host list cannot be used.
        """

    def uses_cpu(self, recipe: Recipe) -> bool:
        """Return whether the ranks run on CPUs: after `check` as the hosts are, before it by what is known here."""

    def check(self, run: RunDirectory, recipe: Recipe) -> None:
        """Look at every host before anything is started; the run directory exists by now.

        Raises:
            LaunchError: one or more hosts cannot run the job; one message names all of them.
        """

    def rendezvous(self, recipe: Recipe) -> tuple[str, int]:
        """Return the address and port where the ranks meet; port 0 before `check` when only a look can tell."""

    def commands(self, spec: JobSpec) -> list[Command]:
        """Return what is started on this machine for the job; starts nothing and writes nothing."""


def make(name: str, hosts_file: Path | None = None) -> Launcher:
    """Return the launcher of this name.

    Args:
        name: one of NAMES.
        hosts_file: of `--hosts`, for the launchers that take one.

    Raises:
        ConfigError: no such launcher.
    """
    if name not in _CLASSES:
        raise ConfigError(f"--launcher {name}: there is no such launcher; use one of {', '.join(NAMES)}")
    module, maker = _CLASSES[name]
    return cast(Launcher, getattr(importlib.import_module(module), maker)(name, hosts_file))


def variables(launch: LaunchConfig, *, cpu: bool) -> dict[str, str]:
    """Return all that is set for every rank, on top of what its host gives it (`JobSpec.environment`)."""
    result = local.library_variables(launch.threads_per_rank)
    if cpu:
        result["DS_ACCELERATOR"] = "cpu"
    if launch.interface is not None:
        result |= dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), launch.interface)
    return result | launch.environment


def job_spec(launcher: Launcher, recipe: Recipe, run: Path, stage: str, attempt: int) -> JobSpec:
    """Return the description of a stage's next job, on the hosts that it uses; writes nothing."""
    address, port = launcher.rendezvous(recipe)
    hosts, cpu = launcher.hosts(recipe), launcher.uses_cpu(recipe)
    used = hosts_used(recipe, stage, [host.slots for host in hosts], cpu=cpu)
    return JobSpec(
        stage=stage,
        run=run,
        attempt=attempt,
        hosts=hosts[:used],
        master_addr=address,
        master_port=port,
        environment=variables(recipe.launch, cpu=cpu),
        grace_seconds=recipe.launch.grace_seconds,
    )


def fewer_hosts(launcher: Launcher, recipe: Recipe, spec: JobSpec) -> str:
    """Return in words that a job uses a part of the hosts only, or nothing when it uses all."""
    hosts = len(launcher.hosts(recipe))
    if len(spec.hosts) == hosts:
        return ""
    return f"uses {len(spec.hosts)} of the {hosts} hosts ({spec.ranks} ranks): its global batch has no equal share for more"


class LocalLauncher:
    """This machine: one DeepSpeed command."""

    def __init__(self, name: str = "local", _hosts_file: Path | None = None) -> None:
        self.name = name

    def hosts(self, recipe: Recipe) -> tuple[Host, ...]:
        """Return this machine with `launch.ranks` slots."""
        return (Host(LOCAL_HOST, recipe.launch.ranks),)

    def uses_cpu(self, recipe: Recipe) -> bool:
        """Return whether there are fewer GPUs here than ranks."""
        return local.uses_cpu(self._base(recipe.launch.environment), recipe.launch.ranks)

    def check(self, run: RunDirectory, recipe: Recipe) -> None:
        """Nothing: this process runs where the ranks will."""

    def rendezvous(self, recipe: Recipe) -> tuple[str, int]:
        """Return the loopback address and a port that is free now."""
        return "127.0.0.1", recipe.launch.master_port or local.free_port()

    def commands(self, spec: JobSpec) -> list[Command]:
        """Return the one command."""
        environment = local.device_variables(self._base(spec.environment))
        return [Command(tuple(local.command(spec)), environment, "local", "ranks")]

    @staticmethod
    def _base(more: Mapping[str, str]) -> dict[str, str]:
        return local.current_environment() | dict(more)
