"""Pipe stages: the best cut, found by trying all of them, and the rules of a cut."""

import itertools
import random

import pytest

from cogview2.pipeline.config.cost import coglm_layer_flops, coglm_layer_parameters, coglm_loss_positions
from cogview2.pipeline.config.loading import load_recipe
from cogview2.pipeline.config.model import CogLMConfig
from cogview2.pipeline.config.partition import Partition, balanced_bounds, coglm_bounds, pipe_stage_bounds
from cogview2.pipeline.errors import ConfigError

ROWS = 150_010
PUBLISHED = CogLMConfig()


def worst(costs: list[float], bounds: tuple[int, ...]) -> float:
    return max(sum(costs[start:stop]) for start, stop in itertools.pairwise(bounds))


def squares(costs: list[float], bounds: tuple[int, ...]) -> float:
    return sum(sum(costs[start:stop]) ** 2 for start, stop in itertools.pairwise(bounds))


def all_cuts(layers: int, parts: int) -> list[tuple[int, ...]]:
    return [(0, *inner, layers) for inner in itertools.combinations(range(1, layers), parts - 1)]


@pytest.mark.parametrize("seed", range(40))
def test_no_cut_is_better(seed: int) -> None:
    draw = random.Random(seed)
    layers = draw.randint(1, 9)
    parts = draw.randint(1, layers)
    costs = [draw.choice([0, 1, 1, 1, 2, 5]) for _ in range(layers)]
    ties = [draw.choice([1, 1, 3]) for _ in range(layers)]
    bounds = balanced_bounds(costs, parts, ties)
    assert bounds[0] == 0 and bounds[-1] == layers and len(bounds) == parts + 1
    assert all(start < stop for start, stop in itertools.pairwise(bounds))
    cuts = all_cuts(layers, parts)
    least = min(worst(costs, cut) for cut in cuts)
    assert worst(costs, bounds) == least
    best = [cut for cut in cuts if worst(costs, cut) == least]
    assert squares(ties, bounds) == min(squares(ties, cut) for cut in best)


def bounds_of(stages: int, partition: Partition, config: CogLMConfig = PUBLISHED) -> tuple[int, ...]:
    return pipe_stage_bounds(config, ROWS, stages, partition, sequence=512, loss_positions=400)


def blocks_of(bounds: tuple[int, ...], layers: int = 48) -> list[int]:
    inner = [0, *(bound - 2 for bound in bounds[1:-1]), layers]
    return [stop - start for start, stop in itertools.pairwise(inner)]


@pytest.mark.parametrize("partition", ["cost", "parameters", "uniform"])
@pytest.mark.parametrize("stages", [1, 2, 3, 4, 8, 16, 48])
def test_every_pipe_stage_has_a_block_and_the_ends_have_their_layers(
    stages: int, partition: Partition
) -> None:
    bounds = bounds_of(stages, partition)
    assert (bounds[0], bounds[-1], len(bounds)) == (0, 52, stages + 1)
    blocks = blocks_of(bounds)
    assert sum(blocks) == 48 and min(blocks) >= 1
    if partition == "uniform":
        assert max(blocks) - min(blocks) <= 1


def test_by_cost_the_head_stands_for_the_blocks_that_its_pipe_stage_lacks() -> None:
    flops = coglm_layer_flops(PUBLISHED, ROWS, 512, 400)
    assert 3 < flops[-1] / flops[2] < 3.2  # the head on 400 positions against one block on 512
    assert blocks_of(bounds_of(4, "cost")) == [13, 13, 13, 9]
    assert worst(flops, bounds_of(4, "cost")) == 13 * flops[2]
    assert worst(flops, bounds_of(4, "uniform")) > 15 * flops[2]


def test_by_parameters_the_words_stand_for_blocks_at_both_ends() -> None:
    parameters = coglm_layer_parameters(PUBLISHED, ROWS)
    assert 4 < parameters[0] / parameters[2] < 4.2
    assert blocks_of(bounds_of(4, "parameters")) == [10, 14, 14, 10]


def test_the_recipe_gives_the_loss_positions() -> None:
    recipe = load_recipe("cogview2_6b", ["coglm.train.pipeline_parallel=4"])
    positions = coglm_loss_positions(recipe)
    assert coglm_bounds(recipe, "cost") == pipe_stage_bounds(
        recipe.coglm.model, ROWS, 4, "cost", sequence=512, loss_positions=positions
    )


def test_counts_are_taken_as_they_are() -> None:
    assert bounds_of(3, (20, 20, 8)) == (0, 22, 42, 52)
    assert bounds_of(1, (48,)) == (0, 52)


@pytest.mark.parametrize("counts", [(20, 20), (20, 20, 9), (48, 0, 0), (24, 24)])
def test_counts_that_do_not_fit_are_refused(counts: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="give 3 numbers above 0 that add up to 48"):
        bounds_of(3, counts)


def test_more_pipe_stages_than_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match="pipeline_parallel 5 is more than the 4 layers.*at most 4"):
        bounds_of(5, "cost", PUBLISHED.model_copy(update={"layers": 4}))
