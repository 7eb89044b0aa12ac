"""What every rank of a stage is doing, read from the files of its newest attempt only."""

import time
from dataclasses import dataclass

from cogview2.launch.progress import duration
from cogview2.pipeline.attempt import Attempt, Beat

SHOWN = 8
"""Up to so many ranks get a line each; of larger jobs only those that are different from most."""
SILENT_SECONDS = 10.0
"""A heartbeat is at most two seconds old while a rank lives; clocks of hosts and network file systems are not exact."""


@dataclass(frozen=True)
class RankState:
    """One rank, as its heartbeat and its outcome show it."""

    rank: int
    host: str
    state: str
    """`phase step of step 7`, or how it ended."""
    detail: str
    """How old its last progress is, and whether it has gone silent."""
    silent: bool

    def __str__(self) -> str:
        return f"  rank {self.rank} on {self.host}: {self.state}{self.detail}"


def rank_states(attempt: Attempt, now: float | None = None) -> list[RankState]:
    """Return the ranks of an attempt that ever gave a sign of life, in order.

    Args:
        attempt: of a stage.
        now: seconds since 1970; by default the clock's.
    """
    now = time.time() if now is None else now
    ends = {outcome.rank: outcome for outcome in attempt.outcomes()}
    states = []
    for rank, beat in attempt.beats().items():
        if rank in ends:
            step = "" if ends[rank].step is None else f" at step {ends[rank].step}"
            states.append(RankState(rank, beat.host, f"ended: {ends[rank].reason}{step}", "", False))
        else:
            states.append(_living(beat, now))
    return states


def _living(beat: Beat, now: float) -> RankState:
    silent = now - beat.time > SILENT_SECONDS
    detail = f", last progress {duration(max(0.0, now - beat.since))} ago"
    if silent:
        detail += f", SILENT for {duration(now - beat.time)} (stopped, killed, or its host hangs)"
    return RankState(beat.rank, beat.host, beat.place, detail, silent)


def rank_lines(attempt: Attempt | None) -> list[str]:
    """Return the lines of `cogview2 status` about the ranks of a running stage; none before the first heartbeat."""
    states = [] if attempt is None else rank_states(attempt)
    if not states:
        return []
    assert attempt is not None
    lines = [f"ranks of attempt {attempt.number}:"]
    if len(states) <= SHOWN:
        return lines + [str(state) for state in states]
    usual = max({state.state for state in states}, key=[state.state for state in states].count)
    odd = [state for state in states if state.silent or state.state != usual]
    lines.append(f"  {len(states) - len(odd)} of {len(states)} ranks: {usual}")
    more = [f"  and {len(odd) - SHOWN} more"] if len(odd) > SHOWN else []
    return lines + [str(state) for state in sorted(odd, key=lambda state: not state.silent)[:SHOWN]] + more
