"""What all commands read their arguments with."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from cogview2.pipeline.errors import CogView2Error, ExitCode


class Parser(argparse.ArgumentParser):
    """argparse with our exit code for usage errors."""

    def error(self, message: str) -> NoReturn:
        """Print usage and message, and leave with `ExitCode.USAGE`."""
        self.print_usage(sys.stderr)
        self.exit(ExitCode.USAGE, f"{self.prog}: error: {message}\n")


def run_command(name: str, work: Callable[[], ExitCode]) -> int:
    """Do the work of `cogview2 name`, and return its exit code: of an error the code, after its sentence on stderr."""
    try:
        code = work()
        sys.stdout.flush()
    except CogView2Error as error:
        print(f"cogview2 {name}: {error}", file=sys.stderr)  # noqa: T201 - this is what a command says
        return int(error.exit_code)
    except BrokenPipeError:  # the reader has seen enough; Python must not flush once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(ExitCode.DONE)
    return int(code)
