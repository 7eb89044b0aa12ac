"""Every shipped recipe loads, and every stage of it gets a DeepSpeed configuration."""

from pathlib import Path

import pytest

from cogview2.launch.cascade import resolve_deepspeed
from cogview2.pipeline.config.cost import UNITS, train_section
from cogview2.pipeline.config.loading import load_recipe, shipped_recipes
from cogview2.pipeline.config.stages import STAGES

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "stages").rglob("*.yaml"))


def test_all_recipes_are_shipped() -> None:
    assert {path.stem for path in RECIPES} == set(shipped_recipes())
    assert {"quickstart", "emoji", "cogview2_6b"} <= set(shipped_recipes())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_and_resolves(path: Path) -> None:
    recipe = load_recipe(path, [])
    assert recipe.name == path.stem
    resolved = resolve_deepspeed(recipe, tuple(STAGES), [recipe.launch.ranks], cpu=False)
    assert set(resolved) == set(UNITS)
    for unit, config in resolved.items():
        train = train_section(recipe, unit)
        micro, accumulation = config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]
        data_parallel = recipe.launch.ranks // train.pipeline_parallel
        assert micro * accumulation * data_parallel == train.global_batch  # type: ignore[operator]


def test_the_published_sizes() -> None:
    recipe = load_recipe("cogview2_6b", [])
    assert (recipe.coglm.model.layers, recipe.coglm.model.hidden, recipe.coglm.model.heads) == (48, 3072, 48)
    assert recipe.coglm.model.vocabulary.rows == 150_010
    assert (recipe.data.base_grid, recipe.data.superres_grid) == (20, 60)
    assert recipe.vqvae.model.codebook_size == 20_000


def test_cogview2_6b_has_the_published_parameter_counts() -> None:
    import torch

    from cogview2.pipeline.models.coglm.model import CogLM
    from cogview2.pipeline.models.vqvae.model import VQVAE
    from cogview2.stages._loading import build_direct, build_iterative

    recipe = load_recipe("cogview2_6b", [])
    rows = recipe.coglm.model.vocabulary.rows
    assert rows is not None
    with torch.device("meta"):
        models = (
            CogLM(recipe.coglm.model, rows),
            build_direct(recipe, rows),
            build_iterative(recipe, rows),
            VQVAE(recipe.vqvae.model),
        )
    quantizer = models[3].state_dict()
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in models[:3]]
    # The published count of the VQVAE takes the codebook in, which is a buffer here.
    counts.append(
        sum(
            t.numel()
            for name, t in quantizer.items()
            if "cluster_size" not in name and "embed_avg" not in name
        )
    )
    assert counts == [5_902_307_328, 7_725_895_680, 5_913_366_528, 97_439_497]
