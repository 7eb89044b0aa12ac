"""The table of differences is complete, the presets follow it, and a recipe's own words win."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from cogview2.pipeline.config.loading import load_recipe, recipe_yaml, shipped_recipes
from cogview2.pipeline.config.presets import DIFFERENCES, chosen, table
from cogview2.pipeline.config.problems import all_keys, dotted
from cogview2.pipeline.config.stages import Recipe
from cogview2.pipeline.config.yaml_reader import read_file
from cogview2.pipeline.errors import ConfigError

ROOT = Path(__file__).resolve().parents[4]
TRAIN = "{global_batch: 8, deepspeed: debug, steps: 10}"
SMALLEST = f"""\
name: tiny
vqvae: {{train: {TRAIN}}}
coglm: {{train: {{global_batch: 8, deepspeed: debug}}}}
direct_sr: {{train: {TRAIN}}}
iterative_sr: {{train: {TRAIN}}}
"""
DIFFERING = {each.key for each in DIFFERENCES if each.key and each.value("released") != each.value("paper")}


def leaves(recipe: Recipe) -> dict[str, Any]:
    """Every value of a recipe by its dotted key."""
    found: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(inner, f"{path}.{name}" if path else name)
        else:
            found[path] = value

    walk(recipe.model_dump(mode="json"), "")
    return found


def named_keys(data: Any, path: str = "") -> set[str]:
    if not isinstance(data, dict):
        return {path}
    return set().union(
        *(named_keys(inner, f"{path}.{name}" if path else name) for name, inner in data.items())
    )


@pytest.fixture
def smallest(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(SMALLEST)
    return path


def test_every_open_point_is_in_the_table() -> None:
    points = {each.spec for each in DIFFERENCES}
    assert {f"11.{number}" for number in range(1, 17)} | {"3.1"} <= points
    known = {dotted(path) for path in all_keys(Recipe)}
    keys = [each.key for each in DIFFERENCES if each.key is not None]
    assert set(keys) <= known and len(keys) == len(set(keys))
    for each in DIFFERENCES:
        if each.key is None:
            assert each.note.endswith(".") and each.released is None and each.paper is None
        else:
            assert (each.released, each.paper) != (None, None)
    assert {"direct_sr.model.local_kernel", "coglm.train.steps", "coglm.objectives.patch_mode"} <= DIFFERING


def test_the_page_holds_the_table() -> None:
    page = (ROOT / "docs/paper_and_release.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in page if line.startswith("|")] == list(table())


@pytest.mark.parametrize("preset", ["released", "paper"])
def test_a_preset_fills_what_the_recipe_leaves_open(smallest: Path, preset: str) -> None:
    recipe = load_recipe(smallest, [f"preset={preset}"])
    assert recipe.preset == preset
    values = leaves(recipe)
    for key, value in chosen(preset).items():  # type: ignore[arg-type]
        assert values[key] == value, key
    assert recipe.coglm.train.steps == {"released": 432_000, "paper": 300_000}[preset]


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_the_presets_differ_in_the_listed_keys_alone(name: str) -> None:
    released, paper = (leaves(load_recipe(name, [f"preset={preset}"])) for preset in ("released", "paper"))
    # Without a preset a recipe that leaves the steps to it has none.
    steps = [] if name != "cogview2_6b" else [f"coglm.train.steps={released['coglm.train.steps']}"]
    plain = leaves(load_recipe(name, ["preset=null", *steps]))
    named = named_keys(read_file(shipped_recipes()[name])[0])
    different = {key for key in released if released[key] != paper[key]}
    assert different == (DIFFERING - named) | {"preset"}
    keys = set(chosen("paper"))
    for preset in (released, paper):
        assert {key for key in plain if plain[key] != preset[key]} <= (keys - named) | {"preset"}


def test_without_a_preset_the_defaults_are_the_released_values_but_for_a_few(smallest: Path) -> None:
    values = leaves(load_recipe(smallest, ["coglm.train.steps=432000"]))
    other = {key for key, value in chosen("released").items() if values[key] != value}
    ours = {"ranking.start", "ranking.applies", "editing.second_start_of_image", "editing.candidates"}
    assert other == {f"sampling.{key}" for key in ours}


def test_what_the_recipe_or_an_override_names_wins(smallest: Path) -> None:
    text = SMALLEST.replace("name: tiny", "name: tiny\npreset: paper")
    smallest.write_text(text + "sampling: {iterative: {schedule: released}}\n")
    recipe = load_recipe(smallest, ["direct_sr.model.local_kernel=[3, 3]", "coglm.train.steps=7"])
    assert recipe.sampling.iterative.schedule == "released"
    assert recipe.direct_sr.model.local_kernel == (3, 3) and recipe.coglm.train.steps == 7
    assert recipe.iterative_sr.model.local_kernel == (9, 9)
    for order in itertools.permutations(["preset=paper", "iterative_sr.model.local_kernel=[5, 5]"]):
        assert load_recipe(smallest, list(order)).iterative_sr.model.local_kernel == (5, 5)


def test_a_resolved_recipe_keeps_its_values_and_its_preset(smallest: Path, tmp_path: Path) -> None:
    recipe = load_recipe(smallest, ["preset=paper", "coglm.train.steps=7"])
    path = tmp_path / "resolved.yaml"
    path.write_text(recipe_yaml(recipe))
    assert load_recipe(path, []) == recipe and load_recipe(path, []).preset == "paper"


@pytest.mark.parametrize("preset", ["papr", "[paper]", "{released: true}", "3"])
def test_an_unknown_preset_is_refused(smallest: Path, preset: str) -> None:
    with pytest.raises(ConfigError, match="set it to released or paper, or leave it out") as refusal:
        load_recipe(smallest, [f"preset={preset}"])
    assert str(refusal.value).startswith(f"--set preset={preset}: preset is ")


def test_a_clash_with_a_preset_names_it(smallest: Path) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_recipe(smallest, ["preset=released", "coglm.model.image_position=64"])
    assert "text_length 112 is above image_position 64" in str(refusal.value)
    with pytest.raises(ConfigError, match="coglm is 3"):
        load_recipe(smallest, ["preset=released", "coglm=3"])
