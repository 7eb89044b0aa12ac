"""DeepSpeed's multi-host runner with what is dangerous in it taken out; started by launch/deepspeed_backends.py.

What is changed, for this process only:

* No `.deepspeed_env` is read, and of the environment exactly the variables of `--export` go to the ranks.
* Its abort path ends every DeepSpeed job of the user on every host (`pkill -f`); here it ends the ranks of this attempt.
* SIGUSR1 asks the ranks to save and leave; DeepSpeed itself has no such path.
* Open MPI is not bound to an interface named eth0, and MPICH's ranks are our module itself: the helper in between breaks
  on `--module`, hides exit codes and dies of signals that are meant for the rank.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from deepspeed.launcher import multinode_runner, runner

from cogview2.pipeline.errors import CogView2Error, ExitCode, LaunchError

_OWN_EXPORTS = ("UCX_TLS",)
"""What DeepSpeed's Open MPI backend sets itself."""
_ETH0 = ["--mca", "btl_tcp_if_include", "eth0"]


class _Stopper:
    """Signal handler: SIGUSR1 asks the ranks of a started job to leave; SIGINT and SIGTERM go to mpirun, which ends them."""

    def __init__(self) -> None:
        self.command: list[str] | None = None
        """Asks through pdsh; None hands the signal on to mpirun."""
        self.environment: dict[str, str] = {}
        self.started = False

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        if not self.started:
            os._exit(int(ExitCode.REQUEUE))
        elif self.command is not None:
            subprocess.Popen(self.command, env=self.environment)
        else:
            own = os.getpid()
            for child in Path(f"/proc/{own}/task/{own}/children").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(child), number)


def _checked_exports(names: Sequence[str]) -> Callable[[Any, str, str], None]:
    def add_export(self: Any, key: str, var: str) -> None:
        if key not in names and key not in _OWN_EXPORTS:
            return
        if "%" in var or (var and shlex.quote(var) != var):
            raise LaunchError(
                f"the variable {key} is {var!r}, which DeepSpeed would hand to a shell unquoted; use --launcher hostfile"
            )
        self.exports[key] = var

    return add_export


def _pdsh(original: Callable[..., Any], stop: _Stopper) -> Callable[..., Any]:
    def get_cmd(self: Any, environment: dict[str, str], active: dict[str, Any]) -> Any:
        command, _pkill, environment = original(self, environment, active)
        pdsh = command[: command.index(_first_remote(self))]
        words = [sys.executable, "-P", "-m", "cogview2.launch.stop_ranks", *_attempt_words(self.args)]
        stop.command, stop.environment, stop.started = [*pdsh, shlex.join(words)], dict(environment), True
        return command, [*pdsh, shlex.join([*words, "--kill"])], environment

    return get_cmd


def _first_remote(backend: Any) -> str:
    """Return the first word of a pdsh command that is for the hosts: DeepSpeed's exports in one string."""
    return "".join(f"export {key}={value}; " for key, value in backend.exports.items())


def _attempt_words(arguments: Any) -> list[str]:
    """Return the options of `stop_ranks`, from what DeepSpeed is told to start."""
    _, run, _, attempt = arguments.user_args
    stage = str(arguments.user_script).rpartition(".")[2]
    return ["--run-dir", run, "--stage", stage, "--attempt", attempt]


def _openmpi(original: Callable[..., Any], stop: _Stopper) -> Callable[..., Any]:
    def get_cmd(self: Any, environment: dict[str, str], active: dict[str, Any]) -> Any:
        command: list[str] = original(self, environment, active)
        at = [k for k in range(len(command)) if command[k : k + len(_ETH0)] == _ETH0]
        stop.started = True
        if at and shlex.join(_ETH0) not in self.args.launcher_args:
            return command[: at[0]] + command[at[0] + len(_ETH0) :]
        return command

    return get_cmd


def _mpich(original: Callable[..., Any], stop: _Stopper) -> Callable[..., Any]:
    def get_cmd(self: Any, environment: dict[str, str], active: dict[str, Any]) -> Any:
        command: list[str] = original(self, environment, active)
        helper = next(k for k in range(len(command)) if command[k].endswith("/launcher_helper.py"))
        stop.started = True
        return [*command[:helper], self.user_script, *self.user_arguments]

    return get_cmd


def disarm(names: Sequence[str]) -> None:
    """Change DeepSpeed's runner as the module says.

    Args:
        names: the variables of our environment that go to the ranks.
    """
    stop = _Stopper()
    backends = multinode_runner
    runner.DEEPSPEED_ENVIRONMENT_PATHS = []
    runner.EXPORT_ENVS = list(names)
    backends.MultiNodeRunner.add_export = _checked_exports(names)
    backends.PDSHRunner.get_cmd = _pdsh(backends.PDSHRunner.get_cmd, stop)
    backends.OpenMPIRunner.get_cmd = _openmpi(backends.OpenMPIRunner.get_cmd, stop)
    backends.MPICHRunner.get_cmd = _mpich(backends.MPICHRunner.get_cmd, stop)
    for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)  # with pdsh, DeepSpeed replaces the last two by its abort path


def main(argv: Sequence[str] | None = None) -> int:
    """Run DeepSpeed's runner: `--export NAME,NAME,...` first, then its own options, the module and its options."""
    words = list(sys.argv[1:] if argv is None else argv)
    option, names, *rest = words
    assert option == "--export", "started by launch/deepspeed_backends.py only"
    try:
        disarm(names.split(","))
        arguments = runner.parse_args(rest)
        # The hosts change into this folder too, and DeepSpeed puts it on PYTHONPATH: it must exist and hold no module.
        os.chdir(Path(arguments.hostfile).parent)
        runner.main(rest)
    except CogView2Error as error:
        print(f"cogview2: {error}", file=sys.stderr)
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
