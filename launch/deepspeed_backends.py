"""DeepSpeed's own launchers over several hosts (pdsh, Open MPI, MPICH), for whoever asks for them by name.

They put every value into command lines, unquoted where a shell reads them: what is not plain is refused here.
"""

import shlex
import shutil

from cogview2.launch import local, mpi
from cogview2.launch.job import Command, JobSpec
from cogview2.launch.quoting import require_plain
from cogview2.launch.ssh import SurveyedHosts
from cogview2.pipeline.attempt import redacted
from cogview2.pipeline.config.launch import LaunchConfig
from cogview2.pipeline.config.stages import Recipe
from cogview2.pipeline.errors import LaunchError
from cogview2.pipeline.run_dir import RunDirectory

PDSH, OPENMPI, MPICH = "pdsh", "openmpi", "mpich"
RUNNER = "cogview2.stages.commands.deepspeed_runner"
_FLAVOURS = {OPENMPI: mpi.OPEN_MPI, MPICH: mpi.MPICH}


def refuse_unsafe(spec: JobSpec, backend: str) -> None:
    """Refuse what DeepSpeed would give to a shell, to pdsh or to mpirun without quoting it, and secrets.

    Raises:
        LaunchError: a path or a value that is not plain, or a variable whose name says that it is a secret.
    """
    reader = f"DeepSpeed's {backend} launcher"
    require_plain(str(spec.run), "the run directory", reader)
    require_plain(spec.python, "Python", reader)
    ours = local.library_variables(1)
    for name, value in sorted(spec.environment.items()):
        if name not in ours and redacted({name: value})[name] != value:
            raise LaunchError(
                f"launch.environment.{name} looks like a secret, and {reader} shows values in command lines; use "
                "--launcher hostfile, which does not"
            )
        require_plain(value, f"the variable {name}", reader)
    if backend == MPICH and len({host.slots for host in spec.hosts}) > 1:
        counts = ", ".join(f"{host.name} {host.slots}" for host in spec.hosts)
        raise LaunchError(f"{reader} needs the same slots on every host, not {counts}; use --launcher mpi")


def launcher_arguments(backend: str, launch: LaunchConfig) -> str:
    """Return DeepSpeed's `--launcher_args`: further words for pdsh or mpirun, which DeepSpeed splits as a shell does."""
    words: list[str] = []
    reach = mpi.ssh_options(launch)
    if backend == OPENMPI:
        words += ["--map-by", "slot", "--bind-to", "none"]
        words += ["--mca", "plm_rsh_args", " ".join(reach)] if reach else []
        words += mpi.interface_words(launch)
    elif backend == MPICH:
        words += ["-bind-to", "none"]
        words += ["-iface", launch.interface] if launch.interface is not None else []
    return shlex.join(words)


class BackendLauncher(SurveyedHosts):
    """One DeepSpeed runner here, which starts the ranks of all hosts of `--hosts` in its own way."""

    def check(self, run: RunDirectory, recipe: Recipe) -> None:
        """Look for the backend's program here, then at the hosts.

        Raises:
            LaunchError: the program is missing or another one, or a host cannot run the job.
        """
        if self.name == PDSH:
            if shutil.which("pdsh") is None:
                raise LaunchError("pdsh is not on the PATH; install it, or use --launcher hostfile")
        elif mpi.flavour() != _FLAVOURS[self.name]:
            raise LaunchError(
                f"the mpirun on the PATH is {mpi.flavour()}'s, not that of --launcher {self.name}; use --launcher mpi, "
                "which takes either"
            )
        if self.name == OPENMPI:
            mpi.refuse_root(local.current_environment() | recipe.launch.environment)
        super().check(run, recipe)

    def commands(self, spec: JobSpec) -> list[Command]:
        """Return the one runner; SIGUSR1 makes it ask the ranks to save and leave (stages/commands/deepspeed_runner.py).

        Raises:
            LaunchError: the job cannot be given to this backend, see `refuse_unsafe`.
        """
        refuse_unsafe(spec, self.name)
        argv = [
            *(spec.python, "-P", "-m", RUNNER, "--export", ",".join(sorted(spec.environment))),
            *("--launcher", self.name, "--hostfile", str(spec.hostfile), "--force_multi", "--no_ssh_check"),
            *("--master_addr", spec.master_addr, "--master_port", spec.port_text, "--no_local_rank"),
        ]
        words = launcher_arguments(self.name, self._launch)
        if words:
            argv.append(f"--launcher_args={words}")
        environment = local.current_environment() | dict(spec.environment)
        reach = mpi.ssh_options(self._launch)
        if self.name == PDSH:
            before = environment.get("PDSH_SSH_ARGS_APPEND", "")
            environment["PDSH_SSH_ARGS_APPEND"] = " ".join([before, "-o BatchMode=yes", *reach]).strip()
        elif self.name == OPENMPI:
            mpi.refuse_unquoted_settings(environment)
        elif reach:
            environment["HYDRA_LAUNCHER_EXTRA_ARGS"] = " ".join(reach)
        return [Command((*argv, *spec.stage_words()), environment, self.name, "SIGUSR1")]
