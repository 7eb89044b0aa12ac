"""When the whole cascade will be done, from what the running stage measures."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from cogview2.launch.progress import duration
from cogview2.pipeline.config import cost
from cogview2.pipeline.config.remaining import total_train_flops
from cogview2.pipeline.config.stages import STAGES, Recipe
from cogview2.pipeline.run_dir import units
from cogview2.pipeline.stage_dir import Heartbeat


@dataclass(frozen=True)
class CascadeEta:
    """Seconds until the last training is done; a lower bound where the speed of later ones cannot be guessed."""

    seconds: float
    whole: bool

    def __str__(self) -> str:
        return f"cascade eta {'~' if self.whole else '>= '}{duration(self.seconds)}"


def training_flops(recipe: Recipe, stages: Collection[str]) -> dict[str, float]:
    """Return the model FLOPs of all steps of every unit of `stages` that trains, in the order in which they run."""
    names = [unit for stage in STAGES if stage in stages for unit in units(stage) if unit in cost.UNITS]
    return {unit: flops for unit in names if (flops := total_train_flops(recipe, unit))}


def cascade_eta(beat: Heartbeat | None, flops: Mapping[str, float]) -> CascadeEta | None:
    """Return when the units of `flops` will have trained.

    The one that runs says its own time; those after it take their model FLOPs over the FLOP/s of this one. Stages
    without training (tokenizer, shards, evaluation) are not counted: it is a guess for the long part of a run.

    Args:
        beat: the newest of the running unit.
        flops: see `training_flops`; without the units that are done.

    Returns:
        None while nothing is measured, or when no other training follows.
    """
    if beat is None or beat.eta_seconds is None or beat.stage not in flops:
        return None
    names = list(flops)
    later = sum(flops[name] for name in names[names.index(beat.stage) + 1 :])
    if not later:
        return None
    rate = beat.meters.get("model_tflops", 0.0) * 1e12
    return CascadeEta(beat.eta_seconds + (later / rate if rate > 0 else 0.0), whole=rate > 0)
