"""How fast training is, and who holds it up: pure functions of measured seconds, and the clocks behind them.

Nothing here feeds back into training: the same weights come out whether anyone looks or not.
"""

import resource
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from cogview2.pipeline.training.straggler import StragglerWatch

EVEN_RATIO = 1.2
"""A rank is called slow from this multiple of the others' time on ..."""
EVEN_SHARE = 0.05
"""... and when the difference is at least this share of a step; below it nobody would gain anything."""

TIMED = frozenset(
    (
        *("samples_per_second", "tokens_per_second", "images_per_second", "seconds_per_step"),
        *("eta_seconds", "cascade_eta_seconds"),
        *("model_tflops", "model_tflops_per_rank", "mfu", "data_wait", "peak_memory_gib"),
        *("slowest", "slowest_rank", "slowest_ratio"),
    )
)
"""The fields of metrics.jsonl that are measured: a resumed run cannot repeat them."""


@dataclass(frozen=True)
class Work:
    """What one sample of a training run is, by formula; None: not known, so not shown."""

    flops_per_sample: float | None = None
    """Model FLOPs, forward and backward: what recomputation adds does not count."""
    tokens_per_sample: float | None = None
    images_per_sample: float | None = None
    """Below 1 when some samples are pure text."""
    peak_flops_per_rank: float | None = None
    """FLOP/s of one device on paper, in the precision of the training run."""
    later_flops: float | None = None
    """Model FLOPs of all training runs of the cascade after this one."""


@dataclass(frozen=True)
class Straggler:
    """The rank that the others wait for."""

    rank: int
    ratio: float
    """Its own time over the median of the others'."""
    name: str
    """`rank 3`, or `rank 3 on node2` in a job of several hosts."""


def utilisation(flops_per_second: float, peak_flops: float | None) -> float | None:
    """Return the share of the peak that is reached (MFU), or None without a known peak."""
    return flops_per_second / peak_flops if peak_flops else None


def wait_share(waited_seconds: float, step_seconds: float) -> float:
    """Return which share of the steps was waiting, in [0, 1]."""
    return min(max(waited_seconds / step_seconds, 0.0), 1.0) if step_seconds > 0 else 0.0


def remaining_seconds(steps_left: int, seconds_per_step: float, wall: float, in_steps: float) -> float:
    """Return the seconds to the end.

    Args:
        steps_left: steps to come.
        seconds_per_step: as measured lately.
        wall: seconds since training began, with saving and drawing.
        in_steps: how many of them were steps; the same share is expected of the time to come.
    """
    around = max(wall / in_steps, 1.0) if in_steps > 0 else 1.0
    return steps_left * seconds_per_step * around


def slowest_rank(own_seconds: Sequence[float], step_seconds: float) -> tuple[int, float] | None:
    """Return the rank with the most time of its own and its ratio to the median of the others, or None in an even job.

    Args:
        own_seconds: of each rank, what it needed by itself, without waiting for others.
        step_seconds: how long the same steps took all together.
    """
    if len(own_seconds) < 2:
        return None
    rank = max(range(len(own_seconds)), key=lambda number: own_seconds[number])
    others = statistics.median([*own_seconds[:rank], *own_seconds[rank + 1 :]])
    ratio = own_seconds[rank] / max(others, 1e-6)
    even = ratio < EVEN_RATIO or own_seconds[rank] - others < EVEN_SHARE * step_seconds
    return None if even else (rank, ratio)


def rank_name(rank: int, hosts: Sequence[str]) -> str:
    """Return `rank 3`, with its host where there are several."""
    return f"rank {rank} on {hosts[rank]}" if len(set(hosts)) > 1 else f"rank {rank}"


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory held so far: of the allocator on a GPU, else resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class ForwardClock:
    """Time of this rank's forward passes: what can be timed without what it waits for others.

    Collectives make all ranks equally late, so their time says nothing about who is. Forward passes have none under
    ZeRO 0 to 2, and in pipelines those of one pipe stage (without the loss) do not wait for its neighbours.
    ZeRO-3 gathers weights in them; there, only ranks that are slow at reading stand out. The backward pass reduces
    gradients on its way and is not counted: a slow device is as slow in both. On a GPU events are recorded and
    read after the step, so that nothing waits for the clock.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        """Time every forward pass of `module`, whose parameters live on `device`."""
        self._on_gpu = device.type == "cuda"
        self._began: float | torch.cuda.Event = 0.0
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._handles = (
            module.register_forward_pre_hook(lambda *_: self._begin()),
            module.register_forward_hook(lambda *_: self._end()),
        )

    def _begin(self) -> None:
        self._began = self._event() if self._on_gpu else time.monotonic()

    def _end(self) -> None:
        if isinstance(self._began, float):
            self._seconds += time.monotonic() - self._began
        else:
            self._events.append((self._began, self._event()))

    @staticmethod
    def _event() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> float:
        """Return the seconds since the last call; after the step's loss was read, so that the events are complete."""
        seconds, self._seconds = self._seconds, 0.0
        for begin, end in self._events:
            end.synchronize()
            seconds += begin.elapsed_time(end) / 1000
        self._events.clear()
        return seconds

    def close(self) -> None:
        """Leave the module alone."""
        for handle in self._handles:
            handle.remove()


class StepMeter:
    """The seconds of all ranks between two lines of metrics.jsonl."""

    def __init__(self, work: Work, samples_per_step: int, hosts: Sequence[str]) -> None:
        """Measure steps of `samples_per_step` samples over all ranks, which run on `hosts`, one name a rank."""
        self.work, self.samples_per_step, self.hosts = work, samples_per_step, hosts
        self._begin: float | None = None
        self._in_steps = 0.0
        self._peak_bytes = 0.0
        self._stragglers = StragglerWatch([rank_name(rank, hosts) for rank in range(len(hosts))])
        self.warning: str | None = None
        """Says that a rank has just become a straggler, after the step for which it did."""
        self.restart()

    def restart(self) -> None:
        """Begin the next window."""
        self._steps, self._seconds, self._reading = 0, 0.0, 0.0
        self._own = [0.0] * len(self.hosts)

    def add(
        self,
        step_seconds: float,
        reading_seconds: Sequence[float],
        forward_seconds: Sequence[float],
        peak_bytes: float,
    ) -> None:
        """Count one step.

        Args:
            step_seconds: from its begin until all ranks agreed on its end.
            reading_seconds: of each rank, until it had its micro batches.
            forward_seconds: of each rank, see `ForwardClock`.
            peak_bytes: of the rank that holds most.
        """
        if self._begin is None:
            self._begin = time.monotonic() - step_seconds
        step_seconds = max(step_seconds, 1e-9)
        self._steps += 1
        self._seconds += step_seconds
        self._in_steps += step_seconds
        # All wait for the one that reads longest.
        self._reading += max(reading_seconds)
        own = [sum(parts) for parts in zip(reading_seconds, forward_seconds, strict=True)]
        self._own = [so_far + seconds for so_far, seconds in zip(self._own, own, strict=True)]
        self.warning = self._stragglers.add(step_seconds, own)
        self._peak_bytes = max(self._peak_bytes, peak_bytes)

    def slowest(self) -> Straggler | None:
        """Return the rank that was slower than the others since `restart`, if any was."""
        found = slowest_rank(self._own, self._seconds)
        return None if found is None else Straggler(*found, rank_name(found[0], self.hosts))

    def values(self, steps_left: int) -> dict[str, float]:
        """Return the measured fields of metrics.jsonl (`TIMED`) that are known; nothing before the first step."""
        if self._begin is None or not self._steps:
            return {}
        work, per_step = self.work, self._seconds / self._steps
        samples = self.samples_per_step / per_step
        found: dict[str, float | None] = {"samples_per_second": samples}
        for name, of_one in (("tokens", work.tokens_per_sample), ("images", work.images_per_sample)):
            found[f"{name}_per_second"] = of_one and samples * of_one
        if work.flops_per_sample:
            flops = samples * work.flops_per_sample
            of_rank = flops / len(self.hosts)
            found |= {"model_tflops": flops / 1e12, "model_tflops_per_rank": of_rank / 1e12}
            found["mfu"] = utilisation(of_rank, work.peak_flops_per_rank)
        found["seconds_per_step"] = per_step
        found["data_wait"] = wait_share(self._reading, self._seconds)
        found["peak_memory_gib"] = self._peak_bytes / 2**30
        slow = self.slowest()
        if slow is not None:
            found |= {"slowest_rank": slow.rank, "slowest_ratio": slow.ratio}
        wall = time.monotonic() - self._begin
        left = remaining_seconds(steps_left, per_step, wall, self._in_steps)
        found["eta_seconds"] = left
        if work.flops_per_sample and work.later_flops is not None:
            found["cascade_eta_seconds"] = left + work.later_flops / (samples * work.flops_per_sample)
        return {name: float(value) for name, value in found.items() if value is not None}

    def rate(self, values: dict[str, float]) -> tuple[float | None, str]:
        """Return the one rate that says most, and its unit: tokens, else pictures, else samples."""
        for name in ("tokens", "images"):
            if f"{name}_per_second" in values:
                return values[f"{name}_per_second"], f"{name}/s"
        return values.get("samples_per_second"), "samples/s"
