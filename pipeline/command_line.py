"""What all commands read their arguments with."""

import argparse
import sys
from typing import NoReturn

from cogview2.pipeline.errors import ExitCode


class Parser(argparse.ArgumentParser):
    """argparse with our exit code for usage errors."""

    def error(self, message: str) -> NoReturn:
        """Print usage and message, and leave with `ExitCode.USAGE`."""
        self.print_usage(sys.stderr)
        self.exit(ExitCode.USAGE, f"{self.prog}: error: {message}\n")
