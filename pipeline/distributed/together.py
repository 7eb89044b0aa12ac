"""Actions that all ranks do, or one does for all: whoever fails, all ranks learn of it, and none waits for another."""

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from cogview2.pipeline.distributed.process import gather_objects
from cogview2.pipeline.errors import CheckpointError, CogView2Error, RunDirectoryError

T = TypeVar("T")
logger = logging.getLogger(__name__)


def together(action: Callable[[], T], what: str) -> list[T]:
    """Run `action` on all ranks, and return on all of them what each gave; it must not communicate.

    Args:
        action: returns a plain value.
        what: in words, for the message.

    Raises:
        CogView2Error: on every rank, the first rank's that failed, with its number: of the class that was raised there,
            RunDirectoryError for the operating system's errors, CheckpointError for others.
    """
    return _values(_attempt(action, f"rank {_rank()} could not {what}: "))


def on_first(action: Callable[[], T], what: str) -> T:
    """Run `action` on rank 0, and return what it gave, or raise what it raised, on all ranks; see `together`."""
    answers = _attempt(action if _rank() == 0 else _nothing, "")
    try:
        return _values(answers)[0]
    except CogView2Error:
        logger.error("rank 0 could not %s", what)
        raise


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _nothing() -> Any:
    return None


Problem = tuple[type[CogView2Error], str]


def _attempt(action: Callable[[], T], prefix: str) -> list[tuple[Any, Problem | None]]:
    value, problem = None, None
    try:
        value = action()
    except CogView2Error as error:
        problem = type(error), f"{prefix}{error}"
    except Exception as error:  # reported on all ranks by the caller
        logger.exception("%sunexpected error", prefix)
        kind: type[CogView2Error] = RunDirectoryError if isinstance(error, OSError) else CheckpointError
        problem = kind, f"{prefix}{error}"
    return gather_objects((value, problem))


def _values(answers: list[tuple[Any, Problem | None]]) -> list[Any]:
    for _, problem in answers:
        if problem is not None:
            kind, words = problem
            raise kind(words)
    return [value for value, _ in answers]
