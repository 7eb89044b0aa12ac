"""The DeepSpeed configuration of a training unit on the hosts there are, checked against the unit's own model too."""

from collections.abc import Sequence
from itertools import accumulate
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


def units_of(stage: str) -> tuple[str, ...]:
    """Return the training units of a stage; none for a stage that trains nothing with DeepSpeed."""
    return tuple(unit for unit in cost.UNITS if unit.partition("/")[0] == stage)


def hosts_used(recipe: Recipe, stage: str, slots: Sequence[int], *, cpu: bool = False) -> int:
    """Return on how many of the hosts, from the first on, a stage runs.

    All of them, where the global batch of each of its units has an equal share for every rank. A small stage of a
    large cluster (a VQVAE with 64 pictures a step on 256 ranks) takes the most hosts that have one. CogLM's
    pretraining never leaves hosts idle on its own.

    Args:
        recipe: what is trained.
        stage: a stage's name.
        slots: ranks of each host.
        cpu: the ranks run on CPUs.

    Raises:
        ConfigError: why the stage cannot run on all hosts, when it must, or when it can on no part of them either.
    """
    ranks = list(accumulate(slots))
    refusals: list[ConfigError] = []
    for hosts in range(len(ranks), 0, -1):
        try:
            for unit in units_of(stage):
                _named(recipe, unit, ranks[hosts - 1], cpu=cpu)
        except ConfigError as error:
            refusals.append(error)
            continue
        if refusals and stage == cost.COGLM:
            raise ConfigError(
                f"{refusals[0]}; or use the first {hosts} of the {len(ranks)} hosts, {ranks[hosts - 1]} ranks"
            ) from refusals[0]
        return hosts
    raise refusals[0]


def resolve_stage(
    recipe: Recipe, stage: str, slots: Sequence[int], *, cpu: bool = False
) -> dict[str, dict[str, Any]]:
    """Return the resolved configuration of each unit of a stage on the hosts that it uses; see `hosts_used`."""
    if not units_of(stage):
        return {}
    ranks = sum(slots[: hosts_used(recipe, stage, slots, cpu=cpu)])
    return {unit: _named(recipe, unit, ranks, cpu=cpu) for unit in units_of(stage)}


def _named(recipe: Recipe, unit: str, ranks: int, *, cpu: bool) -> dict[str, Any]:
    try:
        return resolve_unit(recipe, unit, ranks, cpu=cpu)
    except ConfigError as error:
        raise ConfigError(f"stage {unit}: {error}") from error
