"""How much training a recipe still has before it after a unit, in model FLOPs: what a cascade's time left is guessed from."""

from cogview2.pipeline.config import cost
from cogview2.pipeline.config.stages import Recipe


def total_train_flops(recipe: Recipe, unit: str) -> float:
    """Return the model FLOPs of all steps of a training unit; 0 for a VQVAE that is taken from elsewhere.

    Raises:
        ConfigError: nothing is trained under that name.
    """
    if unit == cost.VQVAE and recipe.vqvae.take_from is not None:
        return 0.0
    steps = cost.train_section(recipe, unit).steps
    return cost.train_flops_per_sample(recipe, unit) * cost.samples_per_step(recipe, unit) * steps


def later_train_flops(recipe: Recipe, unit: str) -> float:
    """Return the model FLOPs of all training units after `unit`."""
    return sum(total_train_flops(recipe, name) for name in cost.UNITS[cost.UNITS.index(unit) + 1 :])
