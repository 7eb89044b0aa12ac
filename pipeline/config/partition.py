"""Which layers each pipe stage of CogLM gets: the cut into contiguous parts whose most expensive part is cheapest.

Layers, in order: words, positions, the blocks, final norm, head. Bounds (b0, ..., bP) give pipe stage p the layers
[bp, bp+1). Every pipe stage has at least one block, the first one words and positions besides, the last one norm and head:
DeepSpeed adds up gradient norms group by group over the pipe stages, and hangs where one lacks the group of the matrices.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal

from cogview2.pipeline.config.cost import (
    coglm_layer_flops,
    coglm_layer_parameters,
    coglm_loss_positions,
    coglm_sequence,
    vocabulary_rows,
)
from cogview2.pipeline.config.model import CogLMConfig
from cogview2.pipeline.config.stages import Recipe
from cogview2.pipeline.errors import ConfigError

Partition = Literal["cost", "parameters", "uniform"] | Sequence[int]
"""cost: equal work in every pipe stage; parameters: equal memory for weights; uniform: equally many blocks; or how many
blocks each pipe stage gets, for a balance that was measured."""
_ROUNDING = 1 + 1e-12


def balanced_bounds(
    costs: Sequence[float], parts: int, tie_costs: Sequence[float] | None = None
) -> tuple[int, ...]:
    """Return the bounds of the cut into `parts` non-empty parts whose largest cost is least.

    Args:
        costs: of each layer, 0 or more.
        parts: at most as many as there are layers.
        tie_costs: of several such cuts, the one that shares these out most evenly (least sum of squares); by default
            the costs themselves.
    """
    assert 0 < parts <= len(costs)
    totals = list(itertools.accumulate(costs, initial=0.0))
    bounds = _best_cut(len(costs), parts, lambda worst, start, stop: max(worst, totals[stop] - totals[start]))
    limit = max(totals[stop] - totals[start] for start, stop in itertools.pairwise(bounds)) * _ROUNDING
    ties = list(itertools.accumulate(costs if tie_costs is None else tie_costs, initial=0.0))

    def unevenness(before: float, start: int, stop: int) -> float:
        above = totals[stop] - totals[start] > limit
        return math.inf if above else before + (ties[stop] - ties[start]) ** 2

    return _best_cut(len(costs), parts, unevenness)


def _best_cut(layers: int, parts: int, add: Callable[[float, int, int], float]) -> tuple[int, ...]:
    """Return the bounds with the least score; add(score of what is before, start, stop) is the score with one more part."""
    least = [0.0] + [math.inf] * layers
    starts: list[list[int]] = []
    for part in range(1, parts + 1):
        before, least, chosen = least, [math.inf] * (layers + 1), [0] * (layers + 1)
        for stop in range(part, layers + 1):
            for start in range(part - 1, stop):
                score = add(before[start], start, stop)
                if score < least[stop]:
                    least[stop], chosen[stop] = score, start
        starts.append(chosen)
    bounds = [layers]
    for chosen in reversed(starts):
        bounds.append(chosen[bounds[-1]])
    return tuple(reversed(bounds))


def pipe_stage_bounds(
    config: CogLMConfig,
    rows: int,
    stages: int,
    partition: Partition,
    *,
    sequence: int,
    loss_positions: float,
) -> tuple[int, ...]:
    """Return the bounds of `stages` pipe stages, stages + 1 numbers from 0 to layers + 4.

    Args:
        config: sizes.
        rows: of the word embeddings, which are also the head.
        stages: how many pipe stages.
        partition: how to share out.
        sequence: tokens of a sample.
        loss_positions: how many of them have logits, on average.

    Raises:
        ConfigError: more pipe stages than blocks, or counts that do not add up to the blocks.
    """
    if stages > config.layers:
        raise ConfigError(
            f"train.pipeline_parallel {stages} is more than the {config.layers} layers of coglm.model; "
            f"use at most {config.layers}"
        )
    if stages == 1:
        return _with_ends((0, config.layers))  # a list is for those who also train with pipe stages
    if not isinstance(partition, str):
        counts = tuple(partition)
        if len(counts) != stages or sum(counts) != config.layers or min(counts) < 1:
            raise ConfigError(
                f"pipeline.partition {list(counts)} does not share out the {config.layers} layers of coglm.model among "
                f"{stages} pipe stages; give {stages} numbers above 0 that add up to {config.layers}"
            )
        return _with_ends(tuple(itertools.accumulate(counts, initial=0)))
    parameters = coglm_layer_parameters(config, rows)
    if stages > 1:
        parameters[-1] = parameters[0]  # the head's own copy of the words
    memory = _blocks(parameters)
    time = _blocks(coglm_layer_flops(config, rows, sequence, loss_positions))
    if partition == "uniform":
        return _with_ends(balanced_bounds([1] * config.layers, stages, time))
    if partition == "parameters":
        return _with_ends(balanced_bounds(memory, stages, time))
    return _with_ends(balanced_bounds(time, stages, memory))


def _blocks(layers: Sequence[float]) -> list[float]:
    """Return the costs of the blocks, with those of the layers before and after them added to the outermost."""
    costs = list(layers[2:-2])
    costs[0] += sum(layers[:2])
    costs[-1] += sum(layers[-2:])
    return costs


def _with_ends(bounds: tuple[int, ...]) -> tuple[int, ...]:
    """Turn bounds of blocks into bounds of layers."""
    return 0, *(bound + 2 for bound in bounds[1:-1]), bounds[-1] + 4


def coglm_bounds(recipe: Recipe, partition: Partition, rows: int | None = None) -> tuple[int, ...]:
    """Return the bounds of the pipe stages of a recipe's CogLM; see `pipe_stage_bounds`.

    Args:
        recipe: gives sizes, objectives and train.pipeline_parallel.
        partition: `pipeline.partition` of the DeepSpeed JSON.
        rows: of the word embeddings; by default as many as the recipe's sizes need.
    """
    return pipe_stage_bounds(
        recipe.coglm.model,
        rows or vocabulary_rows(recipe),
        recipe.coglm.train.pipeline_parallel,
        partition,
        sequence=coglm_sequence(recipe),
        loss_positions=coglm_loss_positions(recipe),
    )
