"""What all commands read their arguments with."""

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from cogview2.pipeline.errors import CogView2Error, ConfigError, ExitCode


class Parser(argparse.ArgumentParser):
    """argparse with our exit code for usage errors."""

    def error(self, message: str) -> NoReturn:
        """Print usage and message, and leave with `ExitCode.USAGE`."""
        self.print_usage(sys.stderr)
        self.exit(ExitCode.USAGE, f"{self.prog}: error: {message}\n")


def printable(text: str) -> str:
    """Return `text` in one line, with escapes for what a terminal would obey: names in files are other people's."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def run_command(name: str, work: Callable[[], ExitCode]) -> int:
    """Do the work of `cogview2 name`, and return its exit code: of an error the code, after its sentence on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal cannot show is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    try:
        code = work()
        sys.stdout.flush()
    except CogView2Error as error:
        # A recipe may have several faults, a line each; all other refusals are one sentence.
        text = str(error) if isinstance(error, ConfigError) else printable(str(error))
        print(f"cogview2 {name}: {text}", file=sys.stderr)  # noqa: T201 - this is what a command says
        return int(error.exit_code)
    except KeyboardInterrupt:
        print(f"cogview2 {name}: interrupted", file=sys.stderr)  # noqa: T201
        return int(ExitCode.FAILED)
    except BrokenPipeError:  # the reader has seen enough; Python must not flush once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(ExitCode.DONE)
    return int(code)


def print_paths(name: str, make: Callable[[], Sequence[Path]]) -> int:
    """Do the work of `cogview2 name`, print the paths of what it made, and return the exit code; see run_command."""

    def work() -> ExitCode:
        for path in make():
            print(path)  # noqa: T201
        return ExitCode.DONE

    return run_command(name, work)
