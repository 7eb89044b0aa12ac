"""Parameters and floating-point operations of every network, by formula: no network is built (spec 2.1, 4, 5).

One multiply-add counts as two operations; only matrix products, convolutions and attention count. *Model* FLOPs are
what the mathematics needs once: a recomputed activation counts nothing, so that utilisation of different settings can
be compared. *Hardware* FLOPs are what is executed.
"""

import math
from dataclasses import dataclass
from functools import cache

from cogview2.pipeline.config import cost_vqvae
from cogview2.pipeline.config.model import CogLMConfig
from cogview2.pipeline.config.stages import Recipe
from cogview2.pipeline.config.training import TrainConfig
from cogview2.pipeline.errors import ConfigError

SPECIAL_TOKENS = 3
"""<start_of_image>, <start_of_english>, <start_of_chinese>, behind the text pieces (spec 1.1)."""
VQVAE, COGLM = "train_vqvae", "pretrain_coglm"
DIRECT, ITERATIVE = "finetune_superres/direct", "finetune_superres/iterative"
UNITS = (VQVAE, COGLM, DIRECT, ITERATIVE)
"""What is trained, in order: stages, and the parts of finetune_superres."""
_PATCH_SIDE, _PATCH_SHARE, _PATCH_COVERAGE, _TEXT_SHARE = 4, 0.8, 0.75, 0.15
"""Of pipeline/data/objectives.py."""


def vocabulary_rows(recipe: Recipe) -> int:
    """Return the rows of the word embeddings; of a recipe that leaves them open, as many as its sizes need."""
    sizes = recipe.coglm.model.vocabulary
    return sizes.rows or recipe.vqvae.model.codebook_size + sizes.text_pieces + SPECIAL_TOKENS


def attention_parameters(config: CogLMConfig) -> int:
    """Return the parameters of one attention set: queries, keys, values and the output projection."""
    return 4 * config.hidden**2 + 4 * config.hidden


def block_parameters(config: CogLMConfig) -> int:
    """Return the parameters of one layer: attention, feed-forward, four layer norms."""
    hidden, inner = config.hidden, config.feed_forward_multiplier * config.hidden
    return attention_parameters(config) + 2 * hidden * inner + inner + hidden + 8 * hidden


def coglm_layer_parameters(config: CogLMConfig, rows: int) -> list[int]:
    """Return the parameters of each layer of the pipeline: words, positions, blocks, final norm, head.

    The head shares the words' table and counts 0 here; the pipe stage that holds it has a copy when it is another
    one than that of the words.
    """
    ends = [rows * config.hidden, config.max_positions * config.hidden]
    return [*ends, *[block_parameters(config)] * config.layers, 2 * config.hidden, 0]


def coglm_parameters(config: CogLMConfig, rows: int) -> int:
    """Return the parameters of CogLM."""
    return sum(coglm_layer_parameters(config, rows))


def _linear_flops(config: CogLMConfig, tokens: int) -> tuple[int, int]:
    """Return the forward FLOPs of the projections of one attention set, and of one feed-forward."""
    hidden, inner = config.hidden, config.feed_forward_multiplier * config.hidden
    return 8 * tokens * hidden**2, 4 * tokens * hidden * inner


def block_flops(config: CogLMConfig, sequence: int) -> int:
    """Return the forward FLOPs of one layer on one sample of `sequence` tokens, every token attending to every other."""
    return sum(_linear_flops(config, sequence)) + 4 * sequence**2 * config.hidden


def coglm_layer_flops(config: CogLMConfig, rows: int, sequence: int, loss_positions: float) -> list[float]:
    """Return the forward FLOPs of each layer of the pipeline on one sample, in the order of `coglm_layer_parameters`.

    Args:
        config: sizes.
        rows: of the head.
        sequence: tokens of a sample.
        loss_positions: how many of them have logits.
    """
    head = 2 * loss_positions * rows * config.hidden
    return [0, 0, *[block_flops(config, sequence)] * config.layers, 0, head]


def coglm_sequence(recipe: Recipe) -> int:
    """Return the tokens of one CogLM sample: text slots and base codes (512 at the published sizes)."""
    return recipe.coglm.model.text_length + recipe.data.base_grid**2


def _covered(grid: int, corners: int, count: int, rows: int, columns: int) -> float:
    """Return how many cells of a grid `count` patches of rows x columns cover, on average (corners without repetition)."""
    total = corners**2

    def reaching(cell: int, length: int) -> int:
        return max(0, min(cell, corners - 1) - max(0, cell - length + 1) + 1)

    missed = [math.comb(total - n, count) / math.comb(total, count) for n in range(total + 1)]
    return sum(
        1 - missed[reaching(row, rows) * reaching(column, columns)]
        for row in range(grid)
        for column in range(grid)
    )


@cache
def _patch_positions(grid: int, mode: str) -> float:
    """Return the average number of loss positions of the masked patches of one sample (objectives.draw_patches)."""
    side = max(1, min(_PATCH_SIDE, grid // 2))
    if mode == "released":
        corners, count = max(1, grid - side), max(1, int(_PATCH_SHARE * grid**2 / side**2))
    else:
        corners = grid - side + 1
        count = next(
            (
                n
                for n in range(1, corners**2)
                if _covered(grid, corners, n, side, side) >= _PATCH_COVERAGE * grid**2
            ),
            corners**2,
        )
    return _covered(grid, corners, min(count, corners**2), side, side - 1)


def coglm_loss_positions(recipe: Recipe) -> float:
    """Return the average number of positions of one sample that have logits.

    Generation predicts every code, captioning those of the masked patches; captions themselves, whose length is the
    data's business, are not counted (below 1 % of a step).
    """
    objectives, grid = recipe.coglm.objectives, recipe.data.base_grid
    captioning = objectives.caption_ratio
    pairs = (1 - captioning) * grid**2
    if captioning:
        pairs += captioning * _patch_positions(grid, objectives.patch_mode)
    text = _TEXT_SHARE * coglm_sequence(recipe)
    return (1 - objectives.text_weight) * pairs + objectives.text_weight * text


def superres_positions(recipe: Recipe) -> int:
    """Return the rows of the position table of either super-resolution model."""
    return recipe.data.superres_grid**2


@cache
def window_pairs(grid: int, key_grid: int, kernel: tuple[int, int]) -> int:
    """Return how many (query, key) pairs a window makes on a square grid, clipped at its border.

    Args:
        grid: side of the queries' grid.
        key_grid: side of the keys' grid, a divisor of `grid`; the window is centred on the key under the query.
        kernel: rows and columns of the window, in keys.
    """

    def reached(length: int) -> int:
        before = length // 2
        after = length - 1 - before
        centres = (cell * key_grid // grid for cell in range(grid))
        return sum(min(key_grid - 1, c + after) - max(0, c - before) + 1 for c in centres)

    return reached(kernel[0]) * reached(kernel[1])


@dataclass(frozen=True)
class UnitCost:
    """What one training unit has and what one of its samples needs."""

    parameters: int
    """All weights as exported (of the VQVAE with its codebook)."""
    trained: int
    """Those with a gradient."""
    forward: float
    """FLOPs of the forward pass."""
    train: float
    """Model FLOPs of forward and backward pass."""
    executed: float
    """FLOPs that run without activation checkpointing; above `train` where frozen parts pass gradients on."""
    recomputed: float
    """FLOPs that activation checkpointing adds: the forward pass of the layers."""
    tokens: int
    """Of the sequence; 0 for the VQVAE."""
    images: float = 1.0
    """Share of samples that have a picture."""


def _coglm(recipe: Recipe) -> UnitCost:
    config, rows = recipe.coglm.model, vocabulary_rows(recipe)
    sequence = coglm_sequence(recipe)
    flops = coglm_layer_flops(config, rows, sequence, coglm_loss_positions(recipe))
    forward, size = sum(flops), coglm_parameters(config, rows)
    images = 1 - recipe.coglm.objectives.text_weight
    return UnitCost(size, size, forward, 3 * forward, 3 * forward, sum(flops[:-1]), sequence, images)


def _direct(recipe: Recipe) -> UnitCost:
    base, config, rows = recipe.coglm.model, recipe.direct_sr.model, vocabulary_rows(recipe)
    grid, base_grid = recipe.data.superres_grid, recipe.data.base_grid
    level0, level1 = config.text_length + base_grid**2, grid**2
    coglm = coglm_parameters(base, rows)
    new = base.layers * attention_parameters(base) + superres_positions(recipe) * base.hidden
    lower = base.layers * block_flops(base, level0)
    projections, feed_forward = (base.layers * part for part in _linear_flops(base, level1))
    pair = 4 * base.hidden * base.layers
    window = pair * window_pairs(grid, grid, config.local_kernel)
    cross = pair * window_pairs(grid, base_grid, config.cross_kernel)
    head = 2 * level1 * recipe.vqvae.model.codebook_size * base.hidden
    layers = lower + projections + feed_forward + window + cross
    forward = layers + head
    size, tokens = coglm + new, level0 + level1
    if not config.freeze_base:
        return UnitCost(size, size, forward, 3 * forward, 3 * forward, layers, tokens)
    # Gradients are needed of the cells alone; of the frozen weights none are computed.
    train = lower + 3 * (projections + window) + 2 * (feed_forward + cross + head)
    # But both levels share one tensor, so the gradients of level 0 are computed too.
    scores = 4 * level0**2 * base.hidden * base.layers
    executed = 2 * lower + scores + 3 * (projections + window + cross) + 2 * (feed_forward + head)
    return UnitCost(size, new, forward, train, executed, layers, tokens)


def _iterative(recipe: Recipe) -> UnitCost:
    base, config = recipe.coglm.model, recipe.iterative_sr.model
    grid, text = recipe.data.superres_grid, config.text_length
    cells, ratios = grid**2, config.mask_ratios
    size = coglm_parameters(base, vocabulary_rows(recipe)) + superres_positions(recipe) * base.hidden
    pairs = text**2 + cells * text + window_pairs(grid, grid, config.local_kernel)
    layers = base.layers * (sum(_linear_flops(base, text + cells)) + 4 * base.hidden * pairs)
    masked = sum(max(1, round(ratio * cells)) for ratio in ratios) / len(ratios)
    forward = layers + 2 * masked * recipe.vqvae.model.codebook_size * base.hidden
    return UnitCost(size, size, forward, 3 * forward, 3 * forward, layers, text + cells)


def vqvae_sides(recipe: Recipe) -> list[int]:
    """Return the sides of the pictures of one round of steps (`vqvae.image_sizes`)."""
    data = recipe.data
    return [data.superres_size if kind == "superres" else data.base_size for kind in recipe.vqvae.image_sizes]


def _vqvae(recipe: Recipe) -> UnitCost:
    stage, sides = recipe.vqvae, vqvae_sides(recipe)
    model = stage.model
    costs = []
    for step in range(math.lcm(len(sides), stage.other_rates_every)):
        own = (recipe.data.compression_rate,)
        rates = own if step % stage.other_rates_every else cost_vqvae.RATES
        perceptual = stage.perceptual_network is not None and stage.loss.perceptual > 0
        costs.append(cost_vqvae.pass_cost(model, sides[step % len(sides)], rates, perceptual=perceptual))
    forward = sum(cost.forward for cost in costs) / len(costs)
    train = sum(cost.train for cost in costs) / len(costs)
    trained = cost_vqvae.trained_parameters(model)
    return UnitCost(cost_vqvae.parameters(model), trained, forward, train, train, 0, 0)


_COSTS = {VQVAE: _vqvae, COGLM: _coglm, DIRECT: _direct, ITERATIVE: _iterative}


def unit_cost(recipe: Recipe, unit: str) -> UnitCost:
    """Return the sizes and operations of a training unit (`UNITS`).

    Raises:
        ConfigError: nothing is trained under that name.
    """
    if unit not in _COSTS:
        raise ConfigError(f"{unit!r} trains no network; use one of {', '.join(UNITS)}")
    return _COSTS[unit](recipe)


def train_flops_per_sample(recipe: Recipe, unit: str) -> float:
    """Return the model FLOPs of forward and backward pass of one sample of a training unit.

    Three times the forward pass where everything is trained. Of direct super-resolution on a frozen base: level 0 forward
    only; level 1 forward, gradients of inputs, and gradients of the trained weights.
    """
    return unit_cost(recipe, unit).train


def hardware_flops_per_sample(recipe: Recipe, unit: str, *, checkpointing: bool) -> float:
    """Return the FLOPs that are executed for one sample, recomputed layers included."""
    cost = unit_cost(recipe, unit)
    return cost.executed + (cost.recomputed if checkpointing else 0)


def tokens_per_sample(recipe: Recipe, unit: str) -> int:
    """Return the tokens of one sample's sequence; 0 for the VQVAE, which has none."""
    return unit_cost(recipe, unit).tokens


def images_per_sample(recipe: Recipe, unit: str) -> float:
    """Return how many pictures one sample has, on average: below 1 where CogLM also learns from pure text."""
    return unit_cost(recipe, unit).images


def train_section(recipe: Recipe, unit: str) -> TrainConfig:
    """Return the training section of a unit."""
    sections = (recipe.vqvae.train, recipe.coglm.train, recipe.direct_sr.train, recipe.iterative_sr.train)
    return dict(zip(UNITS, sections, strict=True))[unit]


def samples_per_step(recipe: Recipe, unit: str) -> int:
    """Return the samples of one step over all ranks."""
    return train_section(recipe, unit).global_batch


def decode_flops(recipe: Recipe) -> int:
    """Return the FLOPs of decoding one picture of the final size from its codes."""
    layers = cost_vqvae.decoder_layers(
        recipe.vqvae.model, recipe.data.compression_rate, recipe.data.superres_size
    )
    return sum(layer.flops for layer in layers)
