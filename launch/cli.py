"""The commands an operator types; starts in a fraction of a second because nothing here imports torch."""

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from cogview2.launch import launchers, local
from cogview2.launch.cascade import Cascade, Options, select_stages, summary
from cogview2.launch.hostfile import read_hostfile
from cogview2.launch.plan import command as plan_command
from cogview2.launch.signals import taken_over
from cogview2.launch.status import find_models, find_run, log_file, table
from cogview2.launch.submit import SUBMITTED, submit
from cogview2.pipeline import fsops
from cogview2.pipeline.command_line import Parser
from cogview2.pipeline.config.loading import load_recipe, shipped_recipes, stages_folder
from cogview2.pipeline.config.stages import Recipe
from cogview2.pipeline.errors import CogView2Error, ExitCode
from cogview2.pipeline.run_dir import RunDirectory

_CHILD_COMMANDS = {
    "generate": "draw pictures for prompts with what a run has trained",
    "edit": "redraw a region of a picture",
    "caption": "describe pictures",
    "rank": "order pictures by how well they fit a text",
    "web": "a page in the browser: draw, edit, describe",
    "weights": "import and export weights",
    "checkpoint": "list, verify and compare checkpoints",
    "doctor": "show versions, devices and operators, and what they lack",
}
"""Commands that need torch: a module of stages/commands/ each, started as a child process."""
_WITHOUT_RUN = ("weights", "checkpoint", "doctor")
"""Those of them whose first argument is not a run or a weights folder."""


def child_commands() -> dict[str, str]:
    """Return the commands of stages/commands/ that this installation has: name -> one line of help."""
    folder = stages_folder() / "commands"
    return {name: text for name, text in _CHILD_COMMANDS.items() if (folder / f"{name}.py").is_file()}


def _has_report() -> bool:
    return importlib.util.find_spec("cogview2.launch.report") is not None


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="cogview2", description="The training cascade of CogView2 on DeepSpeed.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "--runs-dir", type=Path, default=Path("runs"), help="where runs live (default: ./runs)"
        )
        return command

    run = add("run", "run or resume a recipe's cascade on this machine")
    _add_cascade_arguments(run)
    run.add_argument(
        "--launcher",
        choices=("local", "slurm"),
        default="local",
        help="local: this machine; slurm: the nodes of the allocation that this command runs in",
    )
    submit = add("submit", "run or resume a recipe's cascade on other machines")
    _add_cascade_arguments(submit)
    submit.add_argument("--launcher", choices=SUBMITTED, required=True, help="how to reach them")
    submit.add_argument("--hosts", type=Path, metavar="FILE", help="a line `NAME slots=N` for each host")
    submit.add_argument(
        "--dry-run", action="store_true", help="print what would be started, and touch nothing"
    )
    plan_command.add_arguments(
        commands.add_parser("plan", help=plan_command.SUMMARY, description=plan_command.SUMMARY)
    )
    status = add("status", "show the stages of a run")
    status.add_argument("run", metavar="RUN", nargs="?", help="path or name (default: the newest)")
    logs = add("logs", "print the log of a rank")
    logs.add_argument("run", metavar="RUN", help="path or name")
    logs.add_argument("--rank", type=int, default=0)
    logs.add_argument("--stage", help="default: the one started last")
    if _has_report():
        report = add("report", "write report.html, one self-contained page")
        report.add_argument("run", metavar="RUN", nargs="?", help="path or name (default: the newest)")
    for name, text in child_commands().items():
        commands.add_parser(name, help=text, add_help=False)
    return parser


def _add_cascade_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "recipe", metavar="RECIPE", help=f"a .yaml file, or one of: {', '.join(shipped_recipes())}"
    )
    command.add_argument("--name", help="name of the run (default: the recipe's)")
    command.add_argument("--stages", metavar="A..B", help="a range, a list a,b, or one stage (default: all)")
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one key of the recipe"
    )
    command.add_argument(
        "--restart-stale",
        action="store_true",
        help="set started stages aside whose settings or inputs changed",
    )


def _load(arguments: argparse.Namespace) -> tuple[Recipe, RunDirectory]:
    overrides = list(arguments.set)
    if arguments.name is not None:
        overrides.append(f"name={json.dumps(arguments.name)}")
    recipe = load_recipe(arguments.recipe, overrides)
    return recipe, RunDirectory(arguments.runs_dir / recipe.name)


def _run(arguments: argparse.Namespace) -> int:
    recipe, run = _load(arguments)
    options = Options(
        select_stages(arguments.stages), arguments.restart_stale, launchers.make(arguments.launcher)
    )
    if arguments.launcher == "local":
        ranks = recipe.launch.ranks
        where = "CPU" if options.launcher.uses_cpu(recipe) else "GPU"
        gpus = local.gpu_count(local.current_environment())
        hint = f" ({gpus} GPU here; --set launch.ranks={gpus} uses it)" if where == "CPU" and gpus else ""
        print(f"cogview2  run {recipe.name}  {ranks} ranks on {where}{hint}  {run.path}")
    else:
        print(f"cogview2  run {recipe.name}  launcher {arguments.launcher}  {run.path}", flush=True)
    with _stopped_between_jobs():
        code = Cascade(run, recipe, options).execute()
    if code == ExitCode.DONE:
        _last_words(run, options)
    return code


def _submit(arguments: argparse.Namespace) -> int:
    recipe, run = _load(arguments)
    launcher = launchers.make(arguments.launcher, arguments.hosts)
    options = Options(select_stages(arguments.stages), arguments.restart_stale, launcher)
    if launcher.name != "slurm" and not arguments.dry_run:
        hosts = ", ".join(f"{host.name} ({host.slots})" for host in launcher.hosts(recipe))
        print(f"cogview2  submit {recipe.name}  {launcher.name}: {hosts}  {run.path}", flush=True)
    with _stopped_between_jobs():
        code = submit(run, recipe, options, hosts_file=arguments.hosts, dry_run=arguments.dry_run)
    if code == ExitCode.DONE and launcher.name != "slurm" and not arguments.dry_run:
        _last_words(run, options)
    return code


def _last_words(run: RunDirectory, options: Options) -> None:
    if _has_report():
        print(f"report: {_report(run)}")
    for line in summary(run, options.stages):
        print(line)


@contextlib.contextmanager
def _stopped_between_jobs() -> Iterator[None]:
    """Let a scheduler's signal end us, between two jobs, like Ctrl-C does: start the same command again."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP)
    with taken_over(stop, [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]):
        yield


def _look_at_hosts(argv: Sequence[str]) -> int:
    """`cogview2 doctor --hosts FILE`."""
    parser = Parser(prog="cogview2 doctor", description="Show what every host of a list has and lacks.")
    parser.add_argument("--hosts", type=Path, metavar="FILE", required=True)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="must be seen by all hosts")
    arguments = parser.parse_args(argv)
    preflight = importlib.import_module("cogview2.launch.preflight")  # late: only this command needs it
    text, good = preflight.doctor(read_hostfile(arguments.hosts), arguments.runs_dir.absolute())
    print(text)
    return ExitCode.DONE if good else ExitCode.FAILED


def _report(run: RunDirectory) -> Path:
    report = importlib.import_module("cogview2.launch.report")  # late: only this command needs jinja2
    return Path(report.write_report(run.path))


def _logs(arguments: argparse.Namespace) -> int:
    run = find_run(arguments.run, arguments.runs_dir)
    path = log_file(run, arguments.stage, arguments.rank)
    if path.is_file():
        with open(path, encoding="utf-8", errors="replace") as file:
            shutil.copyfileobj(file, sys.stdout)
    return ExitCode.DONE


def _child(name: str, arguments: Sequence[str]) -> int:
    """Start a command of stages/commands/ with our environment; a run's name in front becomes its path."""
    rest = list(arguments)
    if rest and not rest[0].startswith("-") and name not in _WITHOUT_RUN:
        rest[0] = str(find_models(rest[0], Path("runs")))
    base = local.current_environment()
    environment = dict(base)
    if local.uses_cpu(base, 1):
        environment["DS_ACCELERATOR"] = "cpu"
    argv = [sys.executable, "-P", "-m", f"cogview2.stages.commands.{name}", *rest]
    with subprocess.Popen(argv, env=environment) as child:
        # Ctrl-C reaches the child too, and it may have an orderly end of its own; SIGTERM reaches us alone.
        before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        try:
            while True:
                with contextlib.suppress(KeyboardInterrupt):
                    return child.wait()
        finally:
            signal.signal(signal.SIGTERM, before)


def _dispatch(argv: list[str]) -> int:
    if argv[:1] == ["doctor"] and any(word.partition("=")[0] == "--hosts" for word in argv):
        return _look_at_hosts(argv[1:])
    if argv and argv[0] in child_commands():
        return _child(argv[0], argv[1:])
    arguments = _parser().parse_args(argv)
    if arguments.command == "run":
        return _run(arguments)
    if arguments.command == "submit":
        return _submit(arguments)
    if arguments.command == "plan":
        return plan_command.run(arguments)
    if arguments.command == "status":
        print(table(find_run(arguments.run, arguments.runs_dir)))
    elif arguments.command == "report":
        print(_report(find_run(arguments.run, arguments.runs_dir)))
    elif arguments.command == "logs":
        return _logs(arguments)
    return ExitCode.DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (errors.ExitCode)."""
    before = fsops.restrict_umask()
    try:
        return int(_dispatch(list(sys.argv[1:] if argv is None else argv)))
    except CogView2Error as error:
        print(f"cogview2: {error}", file=sys.stderr)
        return int(error.exit_code)
    except BrokenPipeError:
        return int(ExitCode.DONE)
    except KeyboardInterrupt:
        return int(ExitCode.REQUEUE)
    finally:
        os.umask(before)


if __name__ == "__main__":
    sys.exit(main())
