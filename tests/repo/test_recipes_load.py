"""Every shipped recipe loads, and every stage of it gets a DeepSpeed configuration."""

from pathlib import Path

import pytest

from cogview2.launch.cascade import resolve_deepspeed, train_sections
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
    resolved = resolve_deepspeed(recipe, tuple(STAGES))
    assert set(resolved) == set(train_sections(recipe))
    for unit, train in train_sections(recipe).items():
        config = resolved[unit]
        micro, accumulation = config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]
        data_parallel = recipe.launch.ranks // train.pipeline_parallel
        assert micro * accumulation * data_parallel == train.global_batch  # type: ignore[operator]


def test_the_published_sizes() -> None:
    recipe = load_recipe("cogview2_6b", [])
    assert (recipe.coglm.model.layers, recipe.coglm.model.hidden, recipe.coglm.model.heads) == (48, 3072, 48)
    assert recipe.coglm.model.vocabulary.rows == 150_010
    assert (recipe.data.base_grid, recipe.data.superres_grid) == (20, 60)
    assert recipe.vqvae.model.codebook_size == 20_000
