"""Recipes are read strictly, overridden by dotted keys, and refused in sentences."""

import string
from pathlib import Path
from typing import Any

import pytest
import yaml

from cogview2.pipeline.config.loading import load_recipe, recipe_yaml, shipped_recipes
from cogview2.pipeline.config.problems import (
    Origins,
    all_keys,
    dotted,
    edits,
    keys_of,
    section_of,
    unknown_keys,
)
from cogview2.pipeline.config.stages import Recipe
from cogview2.pipeline.errors import ConfigError

TRAIN = "{steps: 10, global_batch: 8, deepspeed: debug}"
MINIMAL = f"""\
name: tiny
vqvae:
  train: {TRAIN}
coglm:
  train: {TRAIN}
direct_sr:
  train: {TRAIN}
iterative_sr:
  train: {TRAIN}
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(MINIMAL)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, list(overrides))
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("coglm.train.steps=123", "coglm.train.steps", 123),
        ("coglm.train.optimizer.learning_rate=3e-4", "coglm.train.optimizer.learning_rate", 3e-4),
        ("coglm.model.vocabulary.rows=null", "coglm.model.vocabulary.rows", None),
        ("evaluate.blur_radii=[0, 3]", "evaluate.blur_radii", (0, 3)),
        ("evaluate.allow_few=true", "evaluate.allow_few", True),
        ("data.languages=[zh]", "data.languages", ("zh",)),
        ("name=no", "name", "no"),
        ("data.source=drawings", "data.source", "drawings"),
    ],
)
def test_overrides_are_typed(minimal: Path, override: str, key: str, expected: Any) -> None:
    value: Any = load_recipe(minimal, [override])
    for name in key.split("."):
        value = getattr(value, name)
    assert value == expected


def test_the_last_override_wins(minimal: Path) -> None:
    assert load_recipe(minimal, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_a_resolved_recipe_reads_back_equal(tmp_path: Path, name: str) -> None:
    recipe = load_recipe(name, [])
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_yaml(recipe))
    assert load_recipe(path, []) == recipe


def test_paths_become_absolute(minimal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(minimal.parent)
    recipe = load_recipe(
        "./tiny.yaml",
        [
            "data.source=pictures/../photos",
            "data.text=[{path: en.txt}]",
            "vqvae.perceptual_network=vgg.pth",
            "evaluate.feature_network=/abs/net.pth",
            "evaluate.weights=runs/a@100",
            "coglm.train.deepspeed=my.json",
        ],
    )
    here = str(minimal.parent)
    assert recipe.data.source == f"{here}/photos"
    assert recipe.data.text[0].path == f"{here}/en.txt"
    assert recipe.vqvae.perceptual_network == f"{here}/vgg.pth"
    assert recipe.evaluate.feature_network == "/abs/net.pth"
    assert recipe.evaluate.weights == f"{here}/runs/a@100"
    assert recipe.coglm.train.deepspeed == f"{here}/my.json"


def typos(word: str) -> set[str]:
    """Every word one letter away: one left out, one doubled, two swapped, one replaced."""
    found = {word[:i] + word[i + 1 :] for i in range(len(word))}
    found |= {word[:i] + letter + word[i:] for i, letter in enumerate(word)}
    found |= {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(len(word) - 1)}
    found |= {word[:i] + letter + word[i + 1 :] for i in range(len(word)) for letter in "aexz_"}
    return {typo for typo in found if typo and not typo.startswith(tuple(string.digits))} - {word}


def siblings(path: tuple[str | int, ...]) -> set[str]:
    section: type | None = Recipe
    for name in path[:-1]:
        assert section is not None
        section = keys_of(section)[str(name)]
    assert section is not None
    return set(keys_of(section))


@pytest.mark.parametrize("path", list(all_keys(Recipe)), ids=dotted)
def test_every_one_letter_typo_of_every_key_is_refused_with_the_right_hint(path: tuple[str, ...]) -> None:
    for typo in typos(path[-1]) - siblings(path):
        wrong: Any = 1
        for name in reversed([*path[:-1], typo]):
            wrong = {name: wrong}
        sentences = unknown_keys(wrong, Recipe, Origins({}, "r.yaml"))
        assert len(sentences) == 1
        unknown, _, hint = sentences[0].partition("; did you mean ")
        assert unknown == f"r.yaml: unknown key {dotted((*path[:-1], typo))!r}"
        # Two keys can be one letter away: `edcoder_...` is as near to `decoder_...` as to `encoder_...`.
        assert repr(dotted(path)) in hint.rstrip("?").split(" or ") and hint.count(" or ") <= 1


@pytest.mark.parametrize("path", list(all_keys(Recipe))[::5], ids=dotted)
def test_a_typo_in_an_override_is_refused_with_the_right_hint(minimal: Path, path: tuple[str, ...]) -> None:
    wrong = dotted(path) + "x"
    expected = f"--set {wrong}=1: unknown key {wrong!r}; did you mean {dotted(path)!r}?"
    assert refusal(minimal, f"{wrong}=1") == expected


def test_a_typo_in_the_file_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL + "data:\n  drawings:\n    cuont: 3\n")
    assert (
        refusal(path) == f"{path}:12: unknown key 'data.drawings.cuont'; did you mean 'data.drawings.count'?"
    )


def test_a_typo_in_a_list_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL + "data:\n  text:\n    - path: a\n    - paht: b\n")
    assert refusal(path).startswith(
        f"{path}:13: unknown key 'data.text[1].paht'; did you mean 'data.text[1].path'"
    )


def test_a_misplaced_key_is_led_to_its_place(minimal: Path) -> None:
    assert "did you mean 'vqvae.train.steps'?" in refusal(minimal, "steps=3")
    assert "did you mean 'vqvae.train.optimizer.learning_rate'?" in refusal(
        minimal, "coglm.train.learning_rate=1"
    )


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        (
            "coglm.train.steps=0",
            ["coglm.train.steps is 0", "greater than or equal to 1", "--set coglm.train.steps=VALUE"],
        ),
        ("coglm.train.steps=many", ["coglm.train.steps is 'many'", "valid integer", "=VALUE"]),
        ("data.languages=[fr]", ["data.languages[0] is 'fr'", "'en' or 'zh'", "--set data.languages=VALUE"]),
        ("coglm=3", ["coglm is 3", "section with keys"]),
        ("name=a b", ["name is 'a b'", "pattern", "--set name=VALUE"]),
        ("data.base_size=100", ["base_size 100", "multiple of", "use 96"]),
        ("data.source=http://x/y", ["data.source 'http://x/y'", "not a local path", "copy the data"]),
        ("coglm.train.optimizer.warmup_steps=11", ["warmup_steps 11", "above steps 10"]),
        ("coglm.train.optimizer.eps=.nan", ["coglm.train.optimizer.eps is nan", "finite"]),
        ("coglm.train.steps.x=1", ["'coglm.train.steps' is a value", "'x'", "set it whole"]),
        ("coglm.train.steps", ["KEY=VALUE", "coglm.train.steps=100"]),
        ("=3", ["KEY=VALUE"]),
        ("seed=[1", ["--set seed=[1", "not valid YAML"]),
    ],
)
def test_a_refused_override_names_key_value_rule_and_remedy(
    minimal: Path, override: str, parts: list[str]
) -> None:
    message = refusal(minimal, override)
    assert f"--set {override}" in message or "tiny.yaml" in message
    for part in parts:
        assert part in message
    assert "\n" not in message


def test_a_bad_value_in_the_file_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL + "launch:\n  ranks: -1\n")
    assert refusal(path).startswith(
        f"{path}:11: launch.ranks is -1, but it must be greater than or equal to 1;"
    )


def test_every_problem_has_its_own_line(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("name: x\nseed: -1\n")
    lines = refusal(path).splitlines()
    assert len(lines) == 5
    assert sum("is missing" in line for line in lines) == 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: a\nname: b\n", ":2: key 'name' stands twice (first at "),
        ("seed: &x 1\nname: *x\n", ":2: alias *x is not allowed"),
        ("name: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("name: [\n", "not valid YAML"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ("x: " + "[" * 100 + "]" * 100, "nested deeper than 32"),
        ("- 1\n", "holds no keys"),
        ("just words\n", "holds no keys"),
        ("1: 2\n", "is not a plain word"),
        ("? [a]\n: 1\n", "is not a plain word"),
        ("name: \x01\n", "not valid YAML"),
        ("", "is missing"),
    ],
)
def test_hostile_or_broken_yaml_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    assert expected in refusal(path)


def test_an_alias_bomb_is_refused_at_once(tmp_path: Path) -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    path = tmp_path / "r.yaml"
    path.write_text("\n".join(levels))
    assert "alias *a0 is not allowed" in refusal(path)


def test_size_encoding_and_absence_are_refused(tmp_path: Path) -> None:
    big, latin = tmp_path / "big.yaml", tmp_path / "latin.yaml"
    big.write_text("# " + "x" * (1024 * 1024))
    latin.write_bytes(b"name: caf\xe9\n")
    assert "larger than 1048576 bytes" in refusal(big)
    assert "not UTF-8 at byte 9" in refusal(latin)
    assert "cannot read" in refusal(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="no recipe is named 'quikstart'; shipped are .*quickstart"):
        load_recipe("quikstart", [])


def test_yaml_booleans_of_old_do_not_surprise(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL.replace("name: tiny", "name: 2026-01-31"))
    assert load_recipe(path, []).name == "2026-01-31"


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("eps", "eps", 0),
        ("eas", "eps", 1),
        ("esp", "eps", 1),
        ("ep", "eps", 1),
        ("eas", "betas", 2),
        ("", "ab", 2),
    ],
)
def test_edits(first: str, second: str, expected: int) -> None:
    assert edits(first, second) == edits(second, first) == expected


def test_sections_are_found_inside_optional_and_tuple_annotations() -> None:
    assert section_of(Recipe.model_fields["coglm"].annotation) is not None
    assert ("data", "text", "path") in set(all_keys(Recipe))
    assert len(set(all_keys(Recipe))) > 100


def test_the_dump_is_plain_yaml() -> None:
    assert yaml.safe_load(recipe_yaml(load_recipe("quickstart", [])))["name"] == "quickstart"


def test_one_variable_of_the_ranks_is_set_and_stays_a_text() -> None:
    recipe = load_recipe("quickstart", ["launch.environment.NCCL_DEBUG=1", "launch.environment.A=b c"])
    assert recipe.launch.environment == {"NCCL_DEBUG": "1", "A": "b c"}
    with pytest.raises(ConfigError, match=r"launch\.environment\.lower"):
        load_recipe("quickstart", ["launch.environment.lower=1"])
    with pytest.raises(ConfigError, match="has no key"):
        load_recipe("quickstart", ["launch.environment.A.B=1"])
