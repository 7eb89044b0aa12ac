"""Judges each step by numbers that all ranks have: what is not finite, and losses far above the ones before."""

import math
import struct
from collections import deque
from dataclasses import dataclass
from typing import Literal

import torch

from cogview2.pipeline.config.training import HealthConfig

WINDOW = 100
"""Losses that a spike is compared with; before there are so many, nothing is a spike."""
_LEAST_SPREAD = 1e-3
"""Of the mean: where losses hardly differ, a change of a few thousandths is no event."""
Policy = Literal["stop", "skip", "rewind", "log"]


@dataclass(frozen=True)
class Trouble:
    """What is wrong with a step, and what to do about it."""

    what: str
    """A clause without an end: `the loss of step 12 is nan`."""
    policy: Policy


class Health:
    """The losses so far, and the judgement over each step. Equal numbers give equal judgements on every rank."""

    def __init__(self, config: HealthConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._spiking = False

    def observe(self, step: int, loss: float, finite: bool, can_rewind: bool) -> Trouble | None:
        """Judge update `step`, from 0.

        Args:
            step: its number.
            loss: mean over the ranks.
            finite: whether the gradients of all ranks were.
            can_rewind: whether there is a checkpoint; without one a spike is only logged.

        Returns:
            What is wrong, or None. Of a spike over several steps that is only logged, the first step.
        """
        if not math.isfinite(loss):
            return Trouble(f"the loss of step {step + 1} is {loss}", self._config.on_not_finite)
        if not finite:
            return Trouble(f"the gradients of step {step + 1} are not finite", self._config.on_not_finite)
        # In single precision, as a checkpoint keeps it: a resumed job judges by the same numbers.
        loss = struct.unpack("f", struct.pack("f", loss))[0]
        what = self._spike(step, loss)
        begins, self._spiking = not self._spiking, what is not None
        self._losses.append(loss)
        if what is None:
            return None
        if self._config.on_spike == "rewind" and can_rewind:
            return Trouble(what, "rewind")
        return Trouble(what, "log") if begins else None

    def _spike(self, step: int, loss: float) -> str | None:
        if not self._config.spike_sigma or len(self._losses) < WINDOW:
            return None
        # Exact sums: hosts of different kinds must not differ in the last bit.
        mean = math.fsum(self._losses) / WINDOW
        sigma = math.sqrt(math.fsum((value - mean) ** 2 for value in self._losses) / WINDOW)
        distance = (loss - mean) / max(sigma, _LEAST_SPREAD * abs(mean), math.ulp(0.0))
        if distance <= self._config.spike_sigma:
            return None
        return (
            f"the loss of step {step + 1} is {loss:.6g}, {distance:.1f} times sigma {sigma:.3g} above {mean:.6g}, the mean "
            f"of the {WINDOW} steps before"
        )

    def state(self) -> torch.Tensor:
        """Return the losses so far as float32 [2, WINDOW]: values, and 1 where there is one."""
        state = torch.zeros(2, WINDOW)
        state[0, : len(self._losses)] = torch.tensor(list(self._losses))
        state[1, : len(self._losses)] = 1
        return state

    def load(self, state: torch.Tensor) -> None:
        """Go back to what `state` returned."""
        values, there = state.tolist()
        self._losses = deque((value for value, is_one in zip(values, there, strict=True) if is_one), WINDOW)
        self._spiking = False
