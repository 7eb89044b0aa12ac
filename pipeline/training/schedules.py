"""Learning rate as a pure function of the step (spec 2.7)."""

import math

from cogview2.pipeline.config.training import OptimizerConfig


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Return the learning rate of update `step` (from 0) of `steps`: linear warm-up, then the schedule."""
    peak = config.learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return peak
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    left = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return peak * (config.final_ratio + (1 - config.final_ratio) * left)
