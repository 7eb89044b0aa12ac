"""Formulas of sizes and operations against the real networks: counted parameters, counted operations, counted pairs."""

import math

import numpy as np
import pytest
import torch
from small_networks import build, inputs, small_recipe
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cogview2.ops.local_attention import local_attention_2d
from cogview2.pipeline.config import cost, cost_vqvae
from cogview2.pipeline.config.loading import load_recipe
from cogview2.pipeline.config.stages import Recipe
from cogview2.pipeline.data.objectives import compose_row, text_image_sample
from cogview2.pipeline.errors import ConfigError
from cogview2.pipeline.models.coglm.model import CogLM
from cogview2.pipeline.models.vqvae.losses import VGG_CHANNELS
from cogview2.pipeline.models.vqvae.model import RATES, VQVAE
from cogview2.pipeline.tokenizers.vocabulary import Vocabulary


@pytest.mark.parametrize("name", ["cogview2_6b", "quickstart", "small"])
@pytest.mark.parametrize("unit", cost.UNITS)
def test_parameters_are_those_of_the_built_networks(name: str, unit: str) -> None:
    recipe = small_recipe() if name == "small" else load_recipe(name, [])
    with torch.device("meta"):
        model = build(recipe, unit)
    found = cost.unit_cost(recipe, unit)
    codebook = recipe.vqvae.model.codebook_size * recipe.vqvae.model.latent_channels
    assert found.parameters == sum(p.numel() for p in model.parameters()) + codebook * (unit == cost.VQVAE)
    assert found.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_the_published_sizes() -> None:
    recipe = load_recipe("cogview2_6b", [])
    sizes = {unit: cost.unit_cost(recipe, unit).parameters for unit in cost.UNITS}
    assert list(sizes.values()) == [97_439_497, 5_902_307_328, 7_725_895_680, 5_913_366_528]
    assert cost.unit_cost(recipe, cost.DIRECT).trained == 7_725_895_680 - 5_902_307_328
    assert [cost.tokens_per_sample(recipe, unit) for unit in cost.UNITS] == [0, 512, 4096, 3616]
    assert [cost.samples_per_step(recipe, unit) for unit in cost.UNITS] == [64, 4096, 256, 256]


def test_layers_of_the_pipeline_add_up() -> None:
    config = small_recipe().coglm.model
    with torch.device("meta"):
        model = CogLM(config, 77)
    layers = cost.coglm_layer_parameters(config, 77)
    block = sum(p.numel() for p in model.transformer.layers[0].parameters())
    assert layers == [77 * 16, 40 * 16, block, block, block, 32, 0]
    assert len(cost.coglm_layer_flops(config, 77, 22, 9)) == len(layers)


def _flops(loss_of: object) -> int:
    # Only the plain attention is made of operators that the counter knows.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss_of().backward()  # type: ignore[operator]
    return counter.get_total_flops()


def _count(recipe: Recipe, unit: str, checkpointing: bool) -> tuple[int, float]:
    """Operations counted by torch for two samples, and those of the formula."""
    torch.manual_seed(0)
    model, batch = build(recipe, unit).train(), 2
    model.transformer.activation_checkpointing = checkpointing
    length = cost.tokens_per_sample(recipe, unit)
    loss_mask = torch.zeros(batch, length, dtype=torch.bool)
    if unit == cost.COGLM:
        rows, positions = cost.vocabulary_rows(recipe), round(cost.coglm_loss_positions(recipe))
    else:
        ratio = np.mean(recipe.iterative_sr.model.mask_ratios) if unit == cost.ITERATIVE else 1
        rows = recipe.vqvae.model.codebook_size
        positions = round(ratio * cost.superres_positions(recipe))
    loss_mask[:, length - positions :] = True
    arguments = inputs(recipe, unit, batch)
    words = model.transformer.word_embeddings.weight[:rows]

    def loss_of() -> torch.Tensor:
        return (model(*arguments)[loss_mask] @ words.T).logsumexp(-1).mean()

    found = _flops(loss_of)
    return found, batch * cost.hardware_flops_per_sample(recipe, unit, checkpointing=checkpointing)


def _local_flops(recipe: Recipe, unit: str, checkpointing: bool) -> int:
    """What the formula counts of the local attention operator, which torch's counter does not know; two samples."""
    grid, base = recipe.data.superres_grid, recipe.data.base_grid
    direct, iterative = recipe.direct_sr.model, recipe.iterative_sr.model
    if unit == cost.DIRECT:
        pairs = cost.window_pairs(grid, grid, direct.local_kernel)
        pairs += cost.window_pairs(grid, base, direct.cross_kernel)
    else:
        pairs = cost.window_pairs(grid, grid, iterative.local_kernel) + grid**2 * iterative.text_length
    config = recipe.coglm.model
    return 2 * (3 + checkpointing) * 4 * pairs * config.hidden * config.layers


@pytest.mark.parametrize("checkpointing", [False, True])
def test_coglm_runs_as_many_operations_as_the_formula_says(checkpointing: bool) -> None:
    # Without captioning the number of loss positions is whole, so both must be equal.
    recipe = small_recipe("coglm.objectives.caption_ratio=0")
    found, formula = _count(recipe, cost.COGLM, checkpointing)
    assert found == formula


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("frozen", [True, False])
def test_direct_superres_runs_as_many_operations_as_the_formula_says(
    frozen: bool, checkpointing: bool
) -> None:
    recipe = small_recipe(f"direct_sr.model.freeze_base={str(frozen).lower()}")
    found, formula = _count(recipe, cost.DIRECT, checkpointing)
    assert found + _local_flops(recipe, cost.DIRECT, checkpointing) == formula


@pytest.mark.parametrize("checkpointing", [False, True])
def test_iterative_superres_runs_as_many_operations_as_the_formula_says(checkpointing: bool) -> None:
    recipe = small_recipe("iterative_sr.model.mask_ratios=[0.5]")
    found, formula = _count(recipe, cost.ITERATIVE, checkpointing)
    assert found + _local_flops(recipe, cost.ITERATIVE, checkpointing) == formula


def test_a_frozen_base_needs_fewer_model_operations_than_run() -> None:
    """Written out once more, term by term: what the mathematics needs of direct SR on a frozen base."""
    recipe = small_recipe()
    config, direct, n = recipe.coglm.model, recipe.direct_sr.model, recipe.data.superres_grid**2
    level0 = direct.text_length + recipe.data.base_grid**2
    inner, hidden = config.feed_forward_multiplier * config.hidden, config.hidden
    per_layer = level0 * (8 * hidden**2 + 4 * hidden * inner) + 4 * level0**2 * hidden  # forward only
    per_layer += 3 * 8 * n * hidden**2  # trained projections of the cells
    per_layer += 2 * 4 * n * hidden * inner  # frozen feed-forward: forward, gradient of the input
    grid = recipe.data.superres_grid
    per_layer += 3 * 4 * hidden * cost.window_pairs(grid, grid, direct.local_kernel)
    per_layer += 2 * 4 * hidden * cost.window_pairs(grid, recipe.data.base_grid, direct.cross_kernel)
    head = 2 * 2 * n * recipe.vqvae.model.codebook_size * hidden
    expected = config.layers * per_layer + head
    assert cost.train_flops_per_sample(recipe, cost.DIRECT) == expected
    executed = cost.hardware_flops_per_sample(recipe, cost.DIRECT, checkpointing=False)
    assert expected < executed < 3 * cost.unit_cost(recipe, cost.DIRECT).forward


@pytest.mark.parametrize(
    ("grid", "keys", "kernel"), [(6, 6, (3, 3)), (6, 3, (3, 5)), (8, 4, (4, 2)), (5, 5, (9, 5))]
)
def test_window_pairs_are_those_that_the_operator_sees(grid: int, keys: int, kernel: tuple[int, int]) -> None:
    """With equal scores, the output's first channel is the mean of the visible keys: 1 / count where one key is 1."""
    query = torch.zeros(1, grid, grid, 1, 1, dtype=torch.float64)
    value = torch.zeros(keys**2, keys, keys, 1, 1, dtype=torch.float64)
    value.view(keys**2, keys**2).fill_diagonal_(1)
    queries = query.expand(keys**2, -1, -1, -1, -1)
    weights = local_attention_2d(queries, torch.zeros_like(value), value, kernel, backend="reference")
    assert cost.window_pairs(grid, keys, kernel) == int((weights > 1e-9).sum())


def test_vqvae_runs_as_many_operations_as_the_formula_says() -> None:
    recipe = small_recipe()
    config = recipe.vqvae.model
    model = VQVAE(config)
    for rates in (RATES, (8,), (4, 16)):
        pixels = torch.rand(2, 3, 64, 64)

        def loss_of(pixels: torch.Tensor = pixels, rates: tuple[int, ...] = rates) -> torch.Tensor:
            output = model(pixels, rates=rates)
            return sum(picture.mean() for picture in output.normalised.values()) + output.commitment

        assert _flops(loss_of) == 2 * cost_vqvae.pass_cost(config, 64, rates, perceptual=False).train


def test_steps_of_the_vqvae_are_averaged_over_their_round() -> None:
    both = small_recipe(
        "vqvae.image_sizes=[base, superres]",
        "vqvae.other_rates_every=3",
        "data.compression_rate=8",
        "coglm.model.max_positions=80",
    )
    config = both.vqvae.model
    steps = [((64, 128)[k % 2], RATES if k % 3 == 0 else (8,)) for k in range(6)]
    expected = [cost_vqvae.pass_cost(config, *step, perceptual=False).train for step in steps]
    assert cost.train_flops_per_sample(both, cost.VQVAE) == pytest.approx(np.mean(expected))


def test_perceptual_network_counts_where_it_is_used(tmp_path: object) -> None:
    plain, with_network = small_recipe(), small_recipe(f"vqvae.perceptual_network={tmp_path}/vgg16.pth")
    difference = cost.train_flops_per_sample(with_network, cost.VQVAE) - cost.train_flops_per_sample(
        plain, cost.VQVAE
    )
    trunk, before, layers = 0, 3, []
    for block, widths in enumerate(VGG_CHANNELS):
        for width in widths:
            layers.append(torch.nn.Conv2d(before, width, 3, padding=1, device="meta"))
            trunk += 2 * layers[-1].weight.numel() * (64 // 2**block) ** 2
            before = width
    assert difference == 3 * 3 * trunk  # three rates; target, prediction, gradient
    assert with_network.vqvae.loss.perceptual > 0
    assert cost.train_flops_per_sample(
        small_recipe(f"vqvae.perceptual_network={tmp_path}/x.pth", "vqvae.loss.perceptual=0"), cost.VQVAE
    ) == cost.train_flops_per_sample(plain, cost.VQVAE)


@pytest.mark.parametrize("mode", ["released", "paper"])
@pytest.mark.parametrize("grid", [4, 20])
def test_average_loss_positions_are_those_of_the_samples(mode: str, grid: int) -> None:
    recipe = small_recipe(
        f"data.base_size={16 * grid}",
        "coglm.model.max_positions=1024",
        f"coglm.objectives.patch_mode={mode}",
        "coglm.objectives.caption_ratio=0.6",
    )
    vocabulary = Vocabulary.uniform(recipe.vqvae.model.codebook_size, 20)
    config, rng = recipe.coglm.model, np.random.default_rng(0)
    row = compose_row([[]], np.zeros(grid**2), config.text_length, vocabulary)
    counts = [
        text_image_sample(
            row, rng, objectives=recipe.coglm.objectives, config=config, vocabulary=vocabulary
        ).loss_mask.sum()
        for _ in range(800)
    ]
    error = np.std(counts) / math.sqrt(len(counts))
    # Paper mode stops each sample at 75 %; the formula takes the number of patches that reaches it on average.
    assert np.mean(counts) == pytest.approx(
        cost.coglm_loss_positions(recipe), abs=4 * error + 0.03 * grid**2 * (mode == "paper")
    )


def test_text_samples_have_no_picture_and_few_loss_positions() -> None:
    recipe = small_recipe("data.text=[{path: words.txt}]", "coglm.objectives.text_weight=0.25")
    assert cost.images_per_sample(recipe, cost.COGLM) == 0.75
    assert cost.images_per_sample(recipe, cost.DIRECT) == 1
    assert cost.coglm_loss_positions(recipe) < cost.coglm_loss_positions(small_recipe())


def test_unknown_units_are_refused() -> None:
    with pytest.raises(ConfigError, match="evaluate.*trains no network; use one of train_vqvae"):
        cost.train_flops_per_sample(small_recipe(), "evaluate")
