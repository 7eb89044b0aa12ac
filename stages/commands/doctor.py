"""`cogview2 doctor`: show versions, devices and operators of this machine, and what is missing."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from cogview2.pipeline import logging as our_logging
from cogview2.pipeline.command_line import Parser
from cogview2.pipeline.errors import ExitCode


def _unusable() -> list[str]:
    """Say in one sentence for each library without which nothing trains why it cannot be used."""
    problems = []
    for name in ("torch", "deepspeed"):
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken installation can fail in any way
            problems.append(
                f"{name} cannot be imported ({type(error).__name__}: {error}); install cogview2 with its dependencies"
            )
    return problems


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="cogview2 doctor", description="Show versions, devices and operators, and what they lack."
    )
    parser.add_argument("--build", action="store_true", help="compile the local-attention kernels now")
    parser.add_argument(
        "--hosts", metavar="FILE", help="look at the hosts of a host list instead (with --runs-dir DIR)"
    )
    arguments = parser.parse_args(argv)
    if arguments.hosts is not None:  # asks over ssh, for which nothing here is needed
        parser.error("--hosts belongs to the command itself; write `cogview2 doctor --hosts FILE`")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; the exit code is 0 if stages can run here and, with --build, the kernels were built."""
    arguments = _parse(argv)
    our_logging.setup()
    if problems := _unusable():
        for problem in problems:
            print(f"cogview2 doctor: {problem}", file=sys.stderr)
        return int(ExitCode.FAILED)
    from cogview2.stages.commands import _machine_report  # late: it needs what was just looked at

    failures = _machine_report.build_kernels() if arguments.build else []
    try:
        _machine_report.show_versions()
        _machine_report.show_operators()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough; Python must not flush once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    for failure in failures:
        print(f"cogview2 doctor: {failure}", file=sys.stderr)
    return int(ExitCode.FAILED if failures else ExitCode.DONE)


if __name__ == "__main__":
    sys.exit(main())
