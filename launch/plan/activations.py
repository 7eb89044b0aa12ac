"""Bytes that a micro batch leaves for its backward pass, by formula from the code of each network.

Dims: S tokens of a sample, D hidden, N heads, m = feed_forward_multiplier, w bytes of an activation.

A layer of CogLM (models/transformer/block.py) keeps, in units of S D numbers: the inputs of its four norms (4); of the
query-key-value projection and of the feed-forward (2); queries, keys and values (3); the attention's result, which the
output projection reads (1); both sides of the GELU (2 m). That is 10 + 2 m, 18 at m = 4. Besides, a byte for each of
2 S D numbers that dropout may drop, and float32 for each norm's two statistics and the attention's log-sum-exps, S N.

In the backward pass of a layer the gradients of the GELU's two sides, of the feed-forward's result and of the residual
stream live at one time: 2 + 2 m. With checkpointing each layer keeps its input alone, and the layer whose backward
pass runs has everything.
"""

from dataclasses import dataclass

from cogview2.launch.plan.inventory import pipe_bounds
from cogview2.launch.plan.setup import Setup
from cogview2.pipeline.config import cost, cost_vqvae
from cogview2.pipeline.config.model import CogLMConfig
from cogview2.pipeline.config.stages import Recipe

CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 768 << 20}
"""What the logits of one chunk may take (models/coglm/chunked_cross_entropy.py)."""
_LOSS_PICTURES = 60
"""Pictures that the VQVAE's other losses keep for each reconstruction: MS-SSIM's five maps before and after both blurs
at all scales, their products, differences."""


@dataclass(frozen=True)
class Activations:
    """Bytes on one rank for its micro batches in flight."""

    kept: int
    """At the end of a forward pass."""
    recomputed: int
    """What checkpointing brings back, one segment at a time."""
    transient: int
    """Gradients between the operations of one layer."""
    loss: int
    """Logits, and the gradients that the chunked loss makes at once."""
    table: int
    """The gradient of the word embeddings on its way from the loss to the end of the backward pass."""
    exchange: int = 0
    """What pipe stages send to each other, where it is received."""


def block_bytes(config: CogLMConfig, tokens: int, width: int, *, units: float | None = None) -> int:
    """Return what one layer keeps of `tokens` tokens.

    Args:
        config: sizes.
        tokens: of all samples of a micro batch.
        width: bytes of an activation.
        units: numbers kept in units of tokens x hidden; 10 + 2 m by default.
    """
    units = 10 + 2 * config.feed_forward_multiplier if units is None else units
    dropped = 2 * config.hidden if config.dropout else 0
    per_token = width * units * config.hidden + dropped + 4 * (8 + config.heads)
    return int(tokens * per_token)


def _transient(config: CogLMConfig, tokens: int, width: int) -> int:
    return width * tokens * config.hidden * (2 + 2 * config.feed_forward_multiplier)


def chunk_rows(positions: int, bytes_per_position: int, budget: int) -> int:
    """Return how many positions have logits at one time, as models/coglm/chunked_cross_entropy.py divides them."""
    most = max(budget // max(bytes_per_position, 1), 1)
    chunks = max(-(-positions // most), 1)
    return max(-(-positions // chunks), 1)


def _loss_bytes(positions: int, rows: int, hidden: int, width: int, *, trained: bool, device: str) -> int:
    """Logits of a chunk in float32 and the working type; hidden states gathered, their gradient; the table's in float32."""
    each = rows * (4 + (width if width < 4 else 0))
    logits = chunk_rows(positions, each, CHUNK_BYTES[device]) * each if positions else 0
    return logits + 2 * width * positions * hidden + 4 * rows * hidden * trained


def in_flight(setup: Setup, pipe_stage: int) -> int:
    """Return the micro batches whose activations a pipe stage holds at one time (1F1B)."""
    return min(setup.pipe_stages - pipe_stage, setup.accumulation)


def _coglm(recipe: Recipe, setup: Setup, pipe_stage: int, device: str) -> Activations:
    config, rows = recipe.coglm.model, cost.vocabulary_rows(recipe)
    length, width = cost.coglm_sequence(recipe), setup.compute_bytes
    tokens = setup.micro_batch * length
    hidden = width * tokens * config.hidden
    bounds = pipe_bounds(recipe, setup)
    start, stop = bounds[pipe_stage], bounds[pipe_stage + 1]
    blocks = sum(2 <= layer < config.layers + 2 for layer in range(start, stop))
    first, last = start == 0, pipe_stage == setup.pipe_stages - 1
    block = block_bytes(config, tokens, width)
    segment = min(setup.checkpointing, blocks)
    kept = -(-blocks // segment) * hidden if segment else blocks * block
    kept += width * setup.micro_batch * length**2  # the mask as numbers
    kept += (
        16 * tokens + (tokens * config.hidden if config.dropout else 0)
    ) * first  # ids, dropped embeddings
    kept += (hidden + 8 * tokens) * last  # input and statistics of the final norm
    positions = setup.micro_batch * round(max(cost.coglm_loss_positions(recipe), recipe.data.base_grid**2))
    loss = _loss_bytes(positions, rows, config.hidden, width, trained=True, device=device) if last else 0
    flying = in_flight(setup, pipe_stage)
    exchange = 0
    if setup.pipe_stages > 1:
        # Received inputs with their roles, results until they are sent, a gradient each way.
        exchange = (max(2, flying) + 3) * (hidden + 8 * tokens)
    return Activations(
        kept=kept * flying,
        recomputed=segment * block,
        transient=_transient(config, tokens, width),
        loss=loss,
        table=setup.weight_bytes * rows * config.hidden * (first or last),
        exchange=exchange,
    )


def _superres(recipe: Recipe, unit: str, setup: Setup, device: str) -> Activations:
    config, width = recipe.coglm.model, setup.compute_bytes
    tokens = setup.micro_batch * cost.tokens_per_sample(recipe, unit)
    hidden, m = width * tokens * config.hidden, config.feed_forward_multiplier
    cells = setup.micro_batch * cost.superres_positions(recipe)
    frozen = unit == cost.DIRECT and recipe.direct_sr.model.freeze_base
    if unit == cost.DIRECT:
        # Frozen projections keep no input; a trained one reads a copy of its level.
        units, positions = (8 + m + cells / tokens if frozen else 10 + 2 * m), cells
        mask, ids = (
            width * (tokens - cells) ** 2 // setup.micro_batch,
            8 * (cells if frozen else 2 * tokens + cells),
        )
    else:
        # As CogLM, and a copy that joins text and cells.
        units = 11 + 2 * m
        positions = round(cells * max(recipe.iterative_sr.model.mask_ratios))
        mask, ids = (width + 4) * (tokens - cells), 8 * (2 * tokens + cells)
    block = block_bytes(config, tokens, width, units=units)
    segment = min(setup.checkpointing, config.layers)
    kept = -(-config.layers // segment) * hidden if segment else config.layers * block
    # The mask, ids, dropped embeddings, and what the final norm reads.
    kept += mask + ids + tokens * config.hidden * (config.dropout > 0) + hidden + 8 * tokens
    rows = recipe.vqvae.model.codebook_size
    table = 0 if frozen else setup.weight_bytes * cost.vocabulary_rows(recipe) * config.hidden
    return Activations(
        kept=kept,
        recomputed=segment * block,
        transient=_transient(config, tokens, width),
        loss=_loss_bytes(positions, rows, config.hidden, width, trained=not frozen, device=device),
        table=table,
    )


def _vqvae(recipe: Recipe, setup: Setup) -> Activations:
    config, side = recipe.vqvae.model, max(cost.vqvae_sides(recipe))
    layers = list(cost_vqvae.training_layers(config, side))
    picture = 3 * side**2
    losses = len(cost_vqvae.RATES) * _LOSS_PICTURES * picture
    if recipe.vqvae.perceptual_network is not None and recipe.vqvae.loss.perceptual:
        losses += len(cost_vqvae.RATES) * cost_vqvae.perceptual_kept(side)
    largest = max(layer.kept for layer in layers)
    numbers = setup.micro_batch * (sum(layer.kept for layer in layers) + losses)
    return Activations(
        kept=setup.compute_bytes * numbers,
        recomputed=0,
        transient=setup.compute_bytes * setup.micro_batch * 3 * largest,
        loss=0,
        table=0,
    )


def activations(
    recipe: Recipe, unit: str, setup: Setup, pipe_stage: int = 0, device: str = "cuda"
) -> Activations:
    """Return what the micro batches of a training unit take on a rank of a pipe stage."""
    if unit == cost.VQVAE:
        return _vqvae(recipe, setup)
    if unit == cost.COGLM:
        return _coglm(recipe, setup, pipe_stage, device)
    return _superres(recipe, unit, setup, device)
