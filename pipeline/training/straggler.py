"""Says who holds a job up, soon after it begins, and once: a warning, where the meters show a figure."""

import statistics
from collections import deque
from collections.abc import Sequence

WINDOW = 16
"""So many steps are looked at ..."""
MOST = 13
"""... and in so many of them a rank must be late: one that pauses now and then (a slow file) is no straggler."""
RATIO = 1.5
"""A rank is a straggler when it needs this multiple of the others' time by itself, ..."""
SHARE = 0.2
"""... when the difference is this share of a step, ..."""
LEAST_SECONDS = 0.05
"""... and not less than this: steps of milliseconds are as even as the scheduler of the host."""


class StragglerWatch:
    """Compares the ranks over the last steps; see `add`."""

    def __init__(self, names: Sequence[str]) -> None:
        """Watch ranks that people know by `names`, in rank order."""
        self.names = names
        self._steps: deque[tuple[float, tuple[float, ...]]] = deque(maxlen=WINDOW)
        self._named: int | None = None

    def add(self, step_seconds: float, own_seconds: Sequence[float]) -> str | None:
        """Count one step; return a sentence when a rank has become a straggler, else None.

        Args:
            step_seconds: until all ranks were done.
            own_seconds: of each rank, what it needed by itself, without waiting for others.
        """
        self._steps.append((step_seconds, tuple(own_seconds)))
        if len(self.names) < 2 or len(self._steps) < WINDOW:
            return None
        of_rank = [sorted(own, reverse=True) for own in zip(*(own for _, own in self._steps), strict=True)]
        step = statistics.median(seconds for seconds, _ in self._steps)
        mostly = [own[MOST - 1] for own in of_rank]  # what it needs at least in MOST of the steps
        rank = max(range(len(mostly)), key=mostly.__getitem__)
        others = statistics.median([statistics.median(own) for own in of_rank[:rank] + of_rank[rank + 1 :]])
        slow = mostly[rank] > RATIO * others and mostly[rank] - others > max(SHARE * step, LEAST_SECONDS)
        before, self._named = self._named, rank if slow else None
        if not slow or before == rank:
            return None
        return (
            f"{self.names[rank]} holds the others up: it needs {mostly[rank]:.2g} s or more to read and compute in {MOST} of "
            f"{WINDOW} steps, where they need {others:.2g} s; look at its host"
        )
