"""The project's exceptions. Each message states the rule, the offending value and the remedy."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Process exit codes (docs/operations.md)."""

    DONE = 0
    FAILED = 1
    USAGE = 64
    NUMERIC = 70
    CANNOT_WRITE = 73
    REQUEUE = 75
    HANG = 76
    REFUSED = 78


class CogView2Error(Exception):
    """Base of all errors that are reported to people in one sentence, without a traceback."""

    exit_code = ExitCode.FAILED


class ConfigError(CogView2Error):
    """A recipe, an override or a DeepSpeed JSON that cannot be used."""

    exit_code = ExitCode.REFUSED


class DataError(CogView2Error):
    """Input data that cannot be used."""

    exit_code = ExitCode.REFUSED


class CheckpointError(CogView2Error):
    """A checkpoint or weights file that cannot be used."""

    exit_code = ExitCode.REFUSED


class RunDirectoryError(CogView2Error):
    """A run directory that cannot be used (read-only, foreign, incomplete)."""

    exit_code = ExitCode.CANNOT_WRITE


class LockedError(CogView2Error):
    """Another job works in this run directory."""

    exit_code = ExitCode.REQUEUE


class Preempted(CogView2Error):  # noqa: N818 - an orderly stop, not a fault
    """The stage was asked to stop, committed its state and asks to be started again."""

    exit_code = ExitCode.REQUEUE


class NumericError(CogView2Error):
    """Training produced non-finite numbers and stopped."""

    exit_code = ExitCode.NUMERIC


class LaunchError(CogView2Error):
    """A job could not be started, or ended without its DONE record."""
