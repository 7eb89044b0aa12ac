"""The DeepSpeed configuration of a training unit, checked against the unit's own model too."""

from typing import Any

from cogview2.pipeline.config import cost
from cogview2.pipeline.config.deepspeed import resolve
from cogview2.pipeline.config.partition import coglm_bounds
from cogview2.pipeline.config.stages import Recipe
from cogview2.pipeline.errors import ConfigError


def resolve_unit(recipe: Recipe, unit: str, ranks: int, *, cpu: bool = False) -> dict[str, Any]:
    """Return the resolved configuration of a unit (cost.UNITS) on `ranks` ranks; see `resolve`.

    Raises:
        ConfigError: the JSON cannot be used, or contradicts the recipe or the unit's model.
    """
    train = cost.train_section(recipe, unit)
    resolved = resolve(train.deepspeed, train, ranks, cpu=cpu)
    if unit == cost.COGLM:
        coglm_bounds(recipe, resolved["pipeline"]["partition"])
    every, zero = recipe.vqvae.other_rates_every, resolved["zero_optimization"]["stage"]
    if unit == cost.VQVAE and every > 1 and zero > 0:
        raise ConfigError(
            f"vqvae.other_rates_every {every} needs zero_optimization.stage 0, not {zero}: ZeRO moves weights that have no "
            "gradient; change one of them"
        )
    return resolved
