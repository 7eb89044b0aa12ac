"""What each stage of drawing costs: seconds, memory and model runs."""

import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from cogview2.pipeline.sampling.inference import device_of


@dataclass
class StageCost:
    """The cost of one stage, summed over its batches."""

    stage: str
    """`base`, `rank`, `direct`, `iterative` or `decode`."""
    pictures: int = 0
    runs: int = 0
    """Calls of the stage's model, each of a whole batch."""
    seconds: float = 0.0
    """Wall time."""
    peak_bytes: int = 0
    """On a GPU the most memory allocated during a batch; on a CPU by how much the process grew at its highest."""


def _resident() -> int:
    """Return the resident memory of this process in bytes, 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        return 0


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _high_water() -> int:
    """Return the highest resident memory in bytes, since the last reset where there was one."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    except (OSError, IndexError, ValueError):
        pass
    unit = 1 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class _Memory:
    """The most memory taken from its making on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            return
        # A high-water mark that cannot be reset shows growth beyond all that was before, which is less.
        self._before = _resident() if _reset_high_water() else _high_water()

    def peak(self) -> int:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return torch.cuda.max_memory_allocated(self._device)
        return max(_high_water() - self._before, 0)


class Meter:
    """Adds up the cost of stages; give one to several draws to get their sum."""

    def __init__(self) -> None:
        self._costs: dict[str, StageCost] = {}

    @property
    def costs(self) -> Sequence[StageCost]:
        """The stages in the order in which they first ran."""
        return tuple(self._costs.values())

    @contextmanager
    def stage(self, name: str, model: nn.Module, pictures: int) -> Iterator[None]:
        """Count the block as one batch of a stage.

        Args:
            name: of the stage.
            model: whose calls are its runs, and on whose device memory is measured.
            pictures: in the batch.
        """
        cost = self._costs.setdefault(name, StageCost(name))

        def count(*_: object) -> None:
            cost.runs += 1

        hook = model.register_forward_hook(count)
        memory, start = _Memory(device_of(model)), time.perf_counter()
        try:
            yield
        finally:
            hook.remove()
            cost.peak_bytes = max(cost.peak_bytes, memory.peak())
            cost.seconds += time.perf_counter() - start
            cost.pictures += pictures

    def table(self) -> str:
        """Return the costs as lines of text, a line for each stage."""
        lines = [f"{'stage':<10}{'pictures':>9}{'model runs':>12}{'seconds':>10}{'peak MiB':>10}"]
        lines += [
            f"{cost.stage:<10}{cost.pictures:>9}{cost.runs:>12}{cost.seconds:>10.2f}{cost.peak_bytes / 2**20:>10.1f}"
            for cost in self.costs
        ]
        return "\n".join(lines)


def measured(
    meter: Meter | None, stage: str, model: Callable[[], nn.Module], pictures: int
) -> AbstractContextManager[None]:
    """Return `meter.stage`, or nothing to enter without a meter."""
    return nullcontext() if meter is None else meter.stage(stage, model(), pictures)
