"""Networks small enough to count every operation and tensor, and inputs for them."""

import torch

from cogview2.pipeline.config import cost
from cogview2.pipeline.config.loading import load_recipe
from cogview2.pipeline.config.stages import Recipe
from cogview2.pipeline.models.coglm.model import CogLM
from cogview2.pipeline.models.sr.direct import DirectSR
from cogview2.pipeline.models.sr.iterative import IterativeSR
from cogview2.pipeline.models.vqvae.model import VQVAE

SMALL = [
    "data.base_size=64",
    "data.compression_rate=16",
    "data.superres_ratio=2",
    "vqvae.model.base_channels=8",
    "vqvae.model.latent_channels=12",
    "vqvae.model.codebook_size=50",
    "vqvae.model.norm_groups=4",
    "coglm.model.layers=3",
    "coglm.model.hidden=16",
    "coglm.model.heads=2",
    "coglm.model.feed_forward_multiplier=3",
    "coglm.model.text_length=6",
    "coglm.model.image_position=6",
    "coglm.model.max_positions=40",
    "coglm.model.vocabulary.text_pieces=20",
    "coglm.model.vocabulary.rows=null",
    "direct_sr.model.text_length=7",
    "direct_sr.model.local_kernel=[5, 3]",
    "direct_sr.model.cross_kernel=[3, 3]",
    "iterative_sr.model.text_length=5",
]


def small_recipe(*overrides: str) -> Recipe:
    """Return cogview2_6b with tiny networks."""
    return load_recipe("cogview2_6b", [*SMALL, *overrides])


def build(recipe: Recipe, unit: str) -> torch.nn.Module:
    """Return the network of a training unit, fresh weights, in training mode."""
    rows, base, data = cost.vocabulary_rows(recipe), recipe.coglm.model, recipe.data
    if unit == cost.VQVAE:
        return VQVAE(recipe.vqvae.model)
    if unit == cost.COGLM:
        return CogLM(base, rows)
    if unit == cost.DIRECT:
        return DirectSR(base, recipe.direct_sr.model, data.base_grid, data.superres_ratio, rows)
    return IterativeSR(base, recipe.iterative_sr.model, data.superres_grid, rows)


def inputs(recipe: Recipe, unit: str, batch: int) -> tuple[torch.Tensor, ...]:
    """Return tokens, position ids and what the transformer of a unit wants of the mask."""
    length = cost.tokens_per_sample(recipe, unit)
    tokens = torch.randint(0, recipe.vqvae.model.codebook_size, (batch, length))
    positions = torch.zeros(batch, length, dtype=torch.int64)
    if unit == cost.COGLM:
        return tokens, positions, torch.ones(batch, 1, length, length, dtype=torch.bool)
    cells = cost.superres_positions(recipe)
    positions[:, -cells:] = recipe.coglm.model.max_positions + torch.arange(cells)
    if unit == cost.ITERATIVE:
        return tokens, positions, torch.ones(batch, recipe.iterative_sr.model.text_length, dtype=torch.bool)
    level0 = length - cells
    return tokens, positions, torch.ones(batch, 1, level0, level0, dtype=torch.bool)
