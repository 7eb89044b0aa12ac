"""One logger setup for every process: one line format, with the rank, to a file and to stderr."""

import contextlib
import logging
import sys
import time
from pathlib import Path

_NOISY = ("DeepSpeed", "deepspeed", "torch", "webdataset", "PIL", "matplotlib", "filelock", "asyncio")
_OURS = "_cogview2_handler"


class _LogFile(logging.FileHandler):
    """A log that says once, on stderr, that it cannot be written, and no traceback for each line; work goes on."""

    _said = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        if not self._said:
            self._said = True
            line = f"cogview2: cannot write {self.baseFilename} ({error.strerror}); lines will be missing; free space\n"
            with contextlib.suppress(OSError):  # stderr may lie on the same disk
                sys.stderr.write(line)


class _Formatter(logging.Formatter):
    """`2026-01-31T12:00:00Z rank 3 INFO cogview2.pipeline.x: message`, in UTC."""

    def __init__(self, rank: int) -> None:
        super().__init__(
            f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s", datefmt="%Y-%m-%dT%H:%M:%SZ"
        )
        self.converter = time.gmtime


def setup(level: int | str = logging.INFO, rank: int = 0, file: Path | None = None) -> None:
    """Configure the root logger of this process; a second call replaces the first.

    Args:
        level: lowest level that is written for our own loggers.
        rank: global rank, part of each line.
        file: log of this rank; appended to, one flush a line. Without it lines go to stderr only, and with it
            only warnings do, so that the launcher's log holds what matters of all ranks.
    """
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if getattr(handler, _OURS, False)]:
        root.removeHandler(handler)
        handler.close()
    console = logging.StreamHandler(sys.stderr)
    console.setLevel(level if file is None else logging.WARNING)
    handlers: list[logging.Handler] = [console]
    if file is not None:
        handlers.append(_LogFile(file, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(_Formatter(rank))
        setattr(handler, _OURS, True)
        root.addHandler(handler)
    root.setLevel(logging.WARNING)
    for name in ("cogview2", "__main__"):  # a stage's own module runs as __main__
        logging.getLogger(name).setLevel(level)
    quiet_libraries()
    logging.captureWarnings(True)


def quiet_libraries() -> None:
    """Let libraries speak from WARNING up, through our handlers; call again after importing deepspeed."""
    for name in _NOISY:
        logger = logging.getLogger(name)
        logger.setLevel(logging.WARNING)
        logger.handlers.clear()
        logger.propagate = True
