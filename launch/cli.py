"""The commands an operator types; starts in a fraction of a second because nothing here imports torch."""

import argparse
import contextlib
import importlib
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from cogview2.launch import local
from cogview2.launch.cascade import Cascade, Options, select_stages, summary
from cogview2.launch.status import find_models, find_run, log_file, table
from cogview2.pipeline.command_line import Parser
from cogview2.pipeline.config.loading import load_recipe, shipped_recipes, stages_folder
from cogview2.pipeline.errors import CogView2Error, ExitCode
from cogview2.pipeline.run_dir import RunDirectory

_CHILD_COMMANDS = {
    "generate": "draw pictures for prompts with what a run has trained",
    "edit": "redraw a region of a picture",
    "caption": "describe pictures",
    "rank": "order pictures by how well they fit a text",
    "web": "a page in the browser: draw, edit, describe",
    "weights": "import and export weights",
    "doctor": "show versions, devices and operators, and what they lack",
}
"""Commands that need torch: a module of stages/commands/ each, started as a child process."""
_WITHOUT_RUN = ("weights", "doctor")
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
    run.add_argument(
        "recipe", metavar="RECIPE", help=f"a .yaml file, or one of: {', '.join(shipped_recipes())}"
    )
    run.add_argument("--name", help="name of the run (default: the recipe's)")
    run.add_argument("--stages", metavar="A..B", help="a range, a list a,b, or one stage (default: all)")
    run.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one key of the recipe"
    )
    run.add_argument(
        "--restart-stale",
        action="store_true",
        help="set started stages aside whose settings or inputs changed",
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


def _run(arguments: argparse.Namespace) -> int:
    overrides = list(arguments.set)
    if arguments.name is not None:
        overrides.append(f"name={json.dumps(arguments.name)}")
    recipe = load_recipe(arguments.recipe, overrides)
    run = RunDirectory(arguments.runs_dir / recipe.name)
    options = Options(select_stages(arguments.stages), arguments.restart_stale)
    ranks = recipe.launch.ranks
    where = "CPU" if local.uses_cpu(local.current_environment(), ranks) else "GPU"
    gpus = local.gpu_count(local.current_environment())
    hint = f" ({gpus} GPU here; --set launch.ranks={gpus} uses it)" if where == "CPU" and gpus else ""
    print(f"cogview2  run {recipe.name}  {ranks} ranks on {where}{hint}  {run.path}")
    code = Cascade(run, recipe, options).execute()
    if code == ExitCode.DONE:
        if _has_report():
            print(f"report: {_report(run)}")
        for line in summary(run, options.stages):
            print(line)
    return code


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
    if argv and argv[0] in child_commands():
        return _child(argv[0], argv[1:])
    arguments = _parser().parse_args(argv)
    if arguments.command == "run":
        return _run(arguments)
    if arguments.command == "status":
        print(table(find_run(arguments.run, arguments.runs_dir)))
    elif arguments.command == "report":
        print(_report(find_run(arguments.run, arguments.runs_dir)))
    elif arguments.command == "logs":
        return _logs(arguments)
    return ExitCode.DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (errors.ExitCode)."""
    try:
        return int(_dispatch(list(sys.argv[1:] if argv is None else argv)))
    except CogView2Error as error:
        print(f"cogview2: {error}", file=sys.stderr)
        return int(error.exit_code)
    except BrokenPipeError:
        return int(ExitCode.DONE)
    except KeyboardInterrupt:
        return int(ExitCode.REQUEUE)


if __name__ == "__main__":
    sys.exit(main())
