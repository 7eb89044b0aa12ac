"""mpirun: all ranks of a job started by Open MPI or by MPICH's hydra; the ranks find each other over MPI."""

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from cogview2.launch import local
from cogview2.launch.job import Command, Host, JobSpec
from cogview2.launch.launchers import LOCAL_HOST
from cogview2.launch.ssh import SurveyedHosts
from cogview2.pipeline.config.launch import LaunchConfig
from cogview2.pipeline.config.stages import Recipe
from cogview2.pipeline.errors import LaunchError
from cogview2.pipeline.run_dir import RunDirectory

OPEN_MPI, MPICH = "Open MPI", "MPICH"
_MARKS = {"(Open MPI)": OPEN_MPI, "HYDRA": MPICH}
_MCA_PREFIXES = ("OMPI_MCA_", "PMIX_MCA_", "PRTE_MCA_")
_SHELL_IN_QUOTES = re.compile(r"[\"$`\\\x00-\x1f\x7f]")
_ALLOW_ROOT = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")


def flavour() -> str:
    """Return whose mpirun is first on the PATH, OPEN_MPI or MPICH, from what `mpirun --version` says.

    Raises:
        LaunchError: there is none, or it is neither of them.
    """
    if shutil.which("mpirun") is None:
        raise LaunchError(
            "mpirun is not on the PATH; install Open MPI or MPICH on every host, or use --launcher hostfile"
        )
    argv = ["mpirun", "--version"]
    result = subprocess.run(argv, capture_output=True, stdin=subprocess.DEVNULL, check=False)
    said = (result.stdout + result.stderr).decode("utf-8", "replace")
    for mark, name in _MARKS.items():
        if mark in said:
            return name
    raise LaunchError(
        f"mpirun --version says {said[:80]!r}, which is neither Open MPI nor MPICH (HYDRA); put one of those first on "
        "the PATH, or use --launcher hostfile"
    )


def refuse_root(environment: Mapping[str, str]) -> None:
    """Say before Open MPI does, in one sentence, that it does not run as root unasked.

    Its guard is not switched off here: whoever runs everything as root, as in a container, says so once.

    Raises:
        LaunchError: this is root, and Open MPI's two variables are not set.
    """
    if os.geteuid() == 0 and not all(environment.get(name) == "1" for name in _ALLOW_ROOT):
        raise LaunchError(
            f"Open MPI refuses to run as root; run as another user, or in a container set {_ALLOW_ROOT[0]}=1 and "
            f"{_ALLOW_ROOT[1]}=1 in this shell"
        )


def refuse_unquoted_settings(environment: Mapping[str, str]) -> None:
    """Refuse settings of Open MPI in variables that a remote shell would execute.

    mpirun repeats each of them, between double quotes and unchanged, in the command line that starts its daemon on
    the other hosts.

    Raises:
        LaunchError: a value holds a character that means something to a shell there.
    """
    for name, value in sorted(environment.items()):
        if name.startswith(_MCA_PREFIXES) and _SHELL_IN_QUOTES.search(value):
            raise LaunchError(
                f"the variable {name} is {value!r}, and mpirun hands that to remote shells unquoted; use no quotes, $, `, "
                "backslashes or line breaks in it, or set it in Open MPI's own mca-params.conf"
            )


def _open_mpi(spec: JobSpec, launch: LaunchConfig) -> list[str]:
    """Return Open MPI's words before the program.

    `-x NAME` takes the value from mpirun's own environment and sends it in the start message. Ranks are counted host
    by host, and not bound to cores: each of them has `threads_per_rank` threads.
    """
    hosts = ",".join(f"{host.name}:{host.slots}" for host in spec.hosts)
    words = ["mpirun", "-n", str(spec.ranks), "--host", hosts, "--map-by", "slot", "--bind-to", "none"]
    words += interface_words(launch)
    if len(spec.hosts) > 1 and (reach := ssh_options(launch)):
        words += ["--mca", "plm_rsh_args", " ".join(reach)]
    for name in _names(spec):
        words += ["-x", name]
    return words


def interface_words(launch: LaunchConfig) -> list[str]:
    """Return the words that hold Open MPI's own traffic to `launch.interface`."""
    if launch.interface is None:
        return []
    return [word for part in ("oob", "btl") for word in ("--mca", f"{part}_tcp_if_include", launch.interface)]


def _mpich(spec: JobSpec, launch: LaunchConfig) -> list[str]:
    """Return hydra's words before the program; it sends the variables of `-genvlist`, and no others."""
    hosts = ",".join(f"{host.name}:{host.slots}" for host in spec.hosts)
    words = ["mpirun", "-n", str(spec.ranks), "-hosts", hosts, "-bind-to", "none"]
    if launch.interface is not None:
        words += ["-iface", launch.interface]
    return [*words, "-genvlist", ",".join(_names(spec))]


_WORDS: dict[str, Callable[[JobSpec, LaunchConfig], list[str]]] = {OPEN_MPI: _open_mpi, MPICH: _mpich}


def ssh_options(launch: LaunchConfig) -> list[str]:
    """Return the options by which a launcher's own ssh reaches the hosts as `launch.ssh` says; its words are safe."""
    words = ["-l", launch.ssh.user] if launch.ssh.user is not None else []
    return words + (["-p", str(launch.ssh.port)] if launch.ssh.port is not None else [])


def _variables(spec: JobSpec) -> dict[str, str]:
    """Return what the ranks get; a port that the recipe fixes, or the ranks agree on one when they meet."""
    fixed = {"MASTER_PORT": str(spec.master_port)} if spec.master_port else {}
    return dict(spec.environment) | fixed


def _names(spec: JobSpec) -> list[str]:
    return sorted(_variables(spec))


class MpiLauncher(SurveyedHosts):
    """One mpirun for all ranks: on the hosts of `--hosts`, or with `launch.ranks_per_node` ranks on this machine."""

    def __init__(self, name: str = "mpi", hosts_file: Path | None = None) -> None:
        self._here = hosts_file is None
        if hosts_file is None:
            self.name = name
        else:
            super().__init__(name, hosts_file)
        self._launch = LaunchConfig()

    def hosts(self, recipe: Recipe) -> tuple[Host, ...]:
        """Return the hosts of the file, or this machine."""
        self._launch = recipe.launch
        return (Host(LOCAL_HOST, recipe.launch.ranks_per_node),) if self._here else super().hosts(recipe)

    def uses_cpu(self, recipe: Recipe) -> bool:
        """Return whether the ranks run on CPUs, as the look at the hosts or at this machine says."""
        if not self._here:
            return super().uses_cpu(recipe)
        base = local.current_environment() | recipe.launch.environment
        return local.uses_cpu(base, recipe.launch.ranks_per_node)

    def check(self, run: RunDirectory, recipe: Recipe) -> None:
        """Look for mpirun and mpi4py here, then at the hosts of the file.

        Raises:
            LaunchError: one of them is missing, or a host cannot run the job.
        """
        if flavour() == OPEN_MPI:
            refuse_root(local.current_environment() | recipe.launch.environment)
        if importlib.util.find_spec("mpi4py") is None:
            raise LaunchError(
                "mpi4py is not installed, by which ranks find each other under mpirun; pip install mpi4py on every host, or "
                "use --launcher hostfile"
            )
        if not self._here:
            super().check(run, recipe)

    def rendezvous(self, recipe: Recipe) -> tuple[str, int]:
        """Return the first host and the recipe's port, or 0: rank 0 then takes a free one and tells the others."""
        return self.hosts(recipe)[0].name, recipe.launch.master_port or 0

    def commands(self, spec: JobSpec) -> list[Command]:
        """Return the one mpirun; the values of variables stand in its environment only, and it hands SIGUSR1 on."""
        kind = flavour()
        argv = [*_WORDS[kind](spec, self._launch), spec.python, "-P", *spec.stage_words()]
        argv[argv.index("--module")] = "-m"
        environment = local.current_environment() | _variables(spec)
        reach = ssh_options(self._launch)
        if kind == OPEN_MPI:
            refuse_unquoted_settings(environment)
        elif reach and len(spec.hosts) > 1:
            environment["HYDRA_LAUNCHER_EXTRA_ARGS"] = " ".join(reach)
        return [Command(tuple(argv), environment, "mpirun", "SIGUSR1")]
