"""Memory and time of drawing and evaluating pictures with the three transformers in float16, by formula.

CogLM reads all of its weights for each of the base codes, so a batch of pictures costs little more than one; both
super-resolution models are bound by their products. Logits are made for 1024 cells at a time, in float32 and float64.
"""

from dataclasses import dataclass

from cogview2.launch.plan.timing import Assumptions
from cogview2.pipeline.config import cost
from cogview2.pipeline.config.hardware import Hardware
from cogview2.pipeline.config.stages import Recipe

_HALF = 2
_ROWS = 1024
"""Cells whose logits exist at one time (sampling/superres.py)."""


@dataclass(frozen=True)
class Sampling:
    """Drawing `batch` pictures together on one device. Bytes and seconds."""

    batch: int
    weights: dict[str, int]
    """Of each transformer in float16, and of the VQVAE in float32."""
    cache: int
    """Keys and values of CogLM."""
    activations: int
    """Of the widest super-resolution layer, with its logits."""
    peak_together: int
    """All models on the device."""
    peak_in_turn: int
    """Only the model that runs, the others in the host's memory."""
    fits: str
    """together, in turn, or no."""
    swap_seconds: float
    """To bring all models to the device once, when they take turns."""
    seconds: dict[str, float]
    """For one batch: base, direct, iterative, decode."""
    seconds_per_picture: float
    """Without and, where they must, with taking turns."""


def _weights(recipe: Recipe) -> dict[str, int]:
    units = {"coglm": cost.COGLM, "direct": cost.DIRECT, "iterative": cost.ITERATIVE}
    found = {name: _HALF * cost.unit_cost(recipe, unit).parameters for name, unit in units.items()}
    return found | {"vqvae": 4 * cost.unit_cost(recipe, cost.VQVAE).parameters}


def sampling(recipe: Recipe, hardware: Hardware, assumed: Assumptions, batch: int | None = None) -> Sampling:
    """Return what drawing takes on one device; by default `sampling.batch` pictures together."""
    batch = batch or recipe.sampling.batch
    config, length = recipe.coglm.model, cost.coglm_sequence(recipe)
    candidates = recipe.sampling.ranking.candidates
    weights = _weights(recipe)
    cache = 2 * config.layers * batch * candidates * length * config.hidden * _HALF
    tokens = batch * cost.tokens_per_sample(recipe, cost.DIRECT)
    # Residual stream, normed input, queries to values, their copies for the operator, result, feed-forward.
    numbers = 8 + 2 * config.feed_forward_multiplier
    activations = _HALF * numbers * tokens * config.hidden + 12 * _ROWS * recipe.vqvae.model.codebook_size
    largest = max(
        weights["coglm"] + cache, *(weights[name] + activations for name in ("direct", "iterative"))
    )
    together = sum(weights.values()) + max(cache, activations)
    in_turn = largest + weights["vqvae"]
    room = (hardware.memory_gb - assumed.reserve_gb) * 1e9
    fits = "together" if together <= room else "in turn" if in_turn <= room else "no"
    seconds = _seconds(recipe, hardware, assumed, batch, weights, cache)
    swap = sum(weights.values()) / (assumed.pcie_gb_s * 1e9)
    each = (sum(seconds.values()) + (swap if fits == "in turn" else 0)) / batch
    return Sampling(batch, weights, cache, activations, together, in_turn, fits, swap, seconds, each)


def _seconds(
    recipe: Recipe,
    hardware: Hardware,
    assumed: Assumptions,
    batch: int,
    weights: dict[str, int],
    cache: int,
) -> dict[str, float]:
    moving = hardware.memory_gb_s * 1e9 * assumed.memory_efficiency
    products = hardware.peak("fp16") * assumed.matrix_efficiency
    codes, candidates = recipe.data.base_grid**2, recipe.sampling.ranking.candidates
    together = batch * candidates
    # Each code: all weights and, on average, three quarters of the cache; or the products, where there are many.
    config = recipe.coglm.model
    step_flops = 2 * cost.coglm_parameters(config, cost.vocabulary_rows(recipe)) * together
    step = max((weights["coglm"] + 0.75 * cache) / moving, step_flops / products)
    passes = recipe.sampling.iterative.passes
    single = hardware.peak("fp32") * assumed.matrix_efficiency
    decode = cost.decode_flops(recipe) * batch / single
    return {
        "base": codes * step,
        "direct": cost.unit_cost(recipe, cost.DIRECT).forward * batch / products,
        "iterative": passes * cost.unit_cost(recipe, cost.ITERATIVE).forward * batch / products,
        "decode": decode,
    }


def evaluation_pictures(recipe: Recipe) -> int:
    """Return how many pictures stage evaluate draws: held-out captions in each language."""
    return recipe.evaluate.captions * len(recipe.data.languages)
