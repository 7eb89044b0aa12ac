"""How the loops of stages heed a stop: at once, and all ranks together."""

import contextlib
from collections.abc import Iterator

from torch import nn

from cogview2.pipeline.distributed import watchdog
from cogview2.pipeline.distributed.process import gather_objects
from cogview2.pipeline.errors import Preempted
from cogview2.pipeline.training.preemption import StopFlag


class Interrupted(Exception):  # noqa: N818 - no fault
    """A stop was asked for in the middle of a piece of work, which is given up; caught by its loop, seen by nobody."""


def look(stop: StopFlag) -> None:
    """Note progress; raise Interrupted when this process was asked to stop."""
    watchdog.progress()
    if stop.is_set:
        raise Interrupted


@contextlib.contextmanager
def heeding(stop: StopFlag, *models: nn.Module | None) -> Iterator[None]:
    """Leave the block, unfinished, soon after a stop was asked for: at the next run of one of `models`, or `look`.

    Drawing a batch of pictures takes minutes, and thousands of runs.
    """
    handles = [
        model.register_forward_pre_hook(lambda *_: look(stop)) for model in models if model is not None
    ]
    try:
        with contextlib.suppress(Interrupted):
            yield
    finally:
        for handle in handles:
            handle.remove()


def meet(stop: StopFlag, words: str) -> None:
    """Wait for all ranks, in place of a barrier; leave together when any of them was asked to stop. Collective.

    Args:
        stop: of this rank.
        words: when it was asked, and what is kept: `between two shards; ...`.

    Raises:
        Preempted: on every rank.
    """
    watchdog.enter(watchdog.WAIT)
    asked = gather_objects(stop.reason if stop.is_set else None)
    watchdog.enter("work")
    reason = next((reason for reason in asked if reason is not None), None)
    if reason is not None:
        raise Preempted(f"stopped by {reason} {words}")
