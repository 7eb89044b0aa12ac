"""The parameters of each network in the order in which DeepSpeed packs them, by formula (training/optimizers.py)."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from cogview2.launch.plan.setup import Setup
from cogview2.pipeline.config import cost, cost_vqvae
from cogview2.pipeline.config.model import CogLMConfig
from cogview2.pipeline.config.partition import pipe_stage_bounds
from cogview2.pipeline.config.stages import Recipe

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Inventory:
    """Numbers of each parameter of one rank's model."""

    matrices: Sizes
    """Trained, with weight decay."""
    others: Sizes
    """Trained, without: biases, norms, embeddings."""
    frozen: Sizes = ()
    buffer_bytes: int = 0
    """Buffers of the modules; they keep float32."""
    table: int = 0
    """Of the word embeddings, where they are trained here; 0 elsewhere."""

    @property
    def groups(self) -> tuple[Sizes, ...]:
        """The optimizer's parameter groups; an empty one is left out."""
        return tuple(group for group in (self.matrices, self.others) if group)

    @property
    def trained(self) -> int:
        """All numbers with a gradient."""
        return sum(map(sum, self.groups))

    @property
    def total(self) -> int:
        """All parameters."""
        return self.trained + sum(self.frozen)


def _block(config: CogLMConfig) -> tuple[Sizes, Sizes]:
    """Return the matrices and the vectors of one layer, in order."""
    hidden, inner = config.hidden, config.feed_forward_multiplier * config.hidden
    matrices = (3 * hidden**2, hidden**2, hidden * inner, inner * hidden)
    norm = (hidden, hidden)
    # input norm; query_key_value and dense; third and post-attention norm; feed-forward; fourth norm
    return matrices, (*norm, 3 * hidden, hidden, *norm, *norm, inner, hidden, *norm)


def _trunk(config: CogLMConfig, rows: int) -> tuple[Sizes, Sizes]:
    matrices, vectors = _block(config)
    tables = (rows * config.hidden, config.max_positions * config.hidden)
    return matrices * config.layers, (*tables, *vectors * config.layers, config.hidden, config.hidden)


def coglm(config: CogLMConfig, rows: int) -> Inventory:
    """Return the parameters of the whole CogLM."""
    return Inventory(*_trunk(config, rows), table=rows * config.hidden)


def coglm_pipe_stage(config: CogLMConfig, rows: int, start: int, stop: int) -> Inventory:
    """Return the parameters of pipeline layers [start, stop): words, positions, blocks, final norm, head.

    The tied words come first, wherever they are used.
    """
    matrices, vectors = _block(config)
    head = config.layers + 3
    blocks = sum(2 <= layer < config.layers + 2 for layer in range(start, stop))
    table = rows * config.hidden * (start == 0 or stop > head)
    others: Sizes = (table,) if table else ()
    others += (config.max_positions * config.hidden,) if start <= 1 < stop else ()
    others += vectors * blocks
    others += (config.hidden, config.hidden) if start <= config.layers + 2 < stop else ()
    return Inventory(matrices * blocks, others, table=table)


def _direct(recipe: Recipe) -> Inventory:
    base, rows = recipe.coglm.model, cost.vocabulary_rows(recipe)
    hidden = base.hidden
    new_matrices = (3 * hidden**2,) * base.layers + (hidden**2,) * base.layers
    # A module list per projection: all of one, then all of the other; positions before both.
    vectors = (3 * hidden,) * base.layers + (hidden,) * base.layers
    new_others = (cost.superres_positions(recipe) * hidden, *vectors)
    matrices, others = _trunk(base, rows)
    if recipe.direct_sr.model.freeze_base:
        return Inventory(new_matrices, new_others, matrices + others)
    return Inventory(matrices + new_matrices, others + new_others, table=rows * hidden)


def _iterative(recipe: Recipe) -> Inventory:
    base, rows = recipe.coglm.model, cost.vocabulary_rows(recipe)
    matrices, others = _trunk(base, rows)
    positions = cost.superres_positions(recipe) * base.hidden
    return Inventory(matrices, (*others, positions), table=rows * base.hidden)


def _vqvae(recipe: Recipe) -> Inventory:
    """Return the VQVAE's parameters; their order, which only moves a partition's border, is not kept."""
    config, side = recipe.vqvae.model, cost_vqvae.RATES[-1]

    def sizes() -> Iterator[tuple[int, int]]:
        shared = set()
        for layer in cost_vqvae.training_layers(config, side):
            if layer.shared in shared:
                continue
            shared |= {layer.shared} - {None}
            if layer.outputs:
                yield layer.parameters - layer.outputs, layer.outputs
            elif layer.parameters:
                yield 0, layer.parameters

    pairs = list(sizes())
    return Inventory(
        tuple(weight for weight, _ in pairs if weight),
        tuple(vector for _, vector in pairs),
        buffer_bytes=4 * cost_vqvae.buffer_numbers(config),
    )


_bounds = cache(pipe_stage_bounds)  # a plan asks for the same cuts many times


def pipe_bounds(recipe: Recipe, setup: Setup) -> tuple[int, ...]:
    """Return where each pipe stage begins; see pipeline/config/partition.py."""
    partition: Any = setup.partition if isinstance(setup.partition, str) else tuple(setup.partition)
    return _bounds(
        recipe.coglm.model,
        cost.vocabulary_rows(recipe),
        setup.pipe_stages,
        partition,
        sequence=cost.coglm_sequence(recipe),
        loss_positions=cost.coglm_loss_positions(recipe),
    )


def inventory(recipe: Recipe, unit: str, setup: Setup, pipe_stage: int = 0) -> Inventory:
    """Return the parameters of one rank's model of a training unit."""
    if unit == cost.COGLM:
        config, rows = recipe.coglm.model, cost.vocabulary_rows(recipe)
        if setup.pipe_stages == 1:
            return coglm(config, rows)
        bounds = pipe_bounds(recipe, setup)
        return coglm_pipe_stage(config, rows, bounds[pipe_stage], bounds[pipe_stage + 1])
    return {cost.VQVAE: _vqvae, cost.DIRECT: _direct, cost.ITERATIVE: _iterative}[unit](recipe)
