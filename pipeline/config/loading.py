"""From a recipe's name or file and `--set` overrides to a checked Recipe, or to sentences of refusal."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import yaml

from cogview2.pipeline.config.base import Config
from cogview2.pipeline.config.data import GENERATED_SOURCE
from cogview2.pipeline.config.presets import apply_preset
from cogview2.pipeline.config.problems import Origins, dotted, holds_texts, keys_of, suggestion, validate
from cogview2.pipeline.config.stages import Recipe
from cogview2.pipeline.config.yaml_reader import KeyPath, read_file, read_text
from cogview2.pipeline.errors import ConfigError

_SUFFIXES = (".yaml", ".yml")
_PATH_KEYS: tuple[KeyPath, ...] = (
    ("data", "source"),
    ("tokenizer", "take_from"),
    ("vqvae", "take_from"),
    ("vqvae", "init_from"),
    ("vqvae", "perceptual_network"),
    ("coglm", "init_from"),
    ("direct_sr", "init_from"),
    ("iterative_sr", "init_from"),
    ("sampling", "cluster_labels"),
    ("evaluate", "feature_network"),
    ("evaluate", "weights"),
)


def stages_folder() -> Path:
    """Return the folder of the stages, found without importing it."""
    spec = importlib.util.find_spec("cogview2.stages")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "the package cogview2.stages is not installed; run `pip install -e .` in the checkout"
        )
    return Path(spec.submodule_search_locations[0])


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that come with the package: name -> file."""
    return {path.stem: path for path in sorted((stages_folder() / "recipes").rglob("*.yaml"))}


def find_recipe(name_or_path: str) -> Path:
    """Return the file of a recipe: a path when it looks like one, else the name of a shipped recipe."""
    if name_or_path.endswith(_SUFFIXES) or "/" in name_or_path:
        return Path(name_or_path)
    recipes = shipped_recipes()
    if name_or_path not in recipes:
        raise ConfigError(
            f"no recipe is named {name_or_path!r}; shipped are {', '.join(recipes) or 'none'}; "
            "or give the path of a .yaml file"
        )
    return recipes[name_or_path]


def _apply_override(data: dict[str, Any], override: str, origins: Origins) -> None:
    key, equals, text = override.partition("=")
    where = f"--set {override}"
    path: KeyPath = tuple(key.split("."))
    if not equals or not all(path):
        raise ConfigError(f"{where}: an override is KEY=VALUE, for example coglm.train.steps=100")
    value, _ = read_text(text, where)
    section: type[Config] | None = Recipe
    for depth, name in enumerate(path):
        if section is None:
            raise ConfigError(
                f"{where}: {dotted(path[:depth])!r} is a value, it has no key {name!r}; set it whole"
            )
        known = keys_of(section)
        if name not in known:
            here = path[: depth + 1]
            raise ConfigError(f"{where}: unknown key {dotted(here)!r}; {suggestion(here, section, Recipe)}")
        if holds_texts(section, str(name)) and depth == len(path) - 2:
            value = (
                text  # launch.environment.NAME: the operator's own name, and a text whatever YAML makes of it
            )
            break
        section = known[str(name)]
    target = data
    for depth, name in enumerate(path[:-1]):
        target = target.setdefault(str(name), {})
        if not isinstance(target, dict):
            raise ConfigError(f"{where}: {dotted(path[: depth + 1])!r} has no keys below it; set it whole")
    target[str(path[-1])] = value
    for known_path in [line for line in origins.lines if line[: len(path)] == path]:
        del origins.lines[known_path]
    origins.lines[path] = where


def _absolute(value: Any) -> Any:
    if not isinstance(value, str) or not value or value == GENERATED_SOURCE:
        return value
    if "://" in value or value.startswith("pipe:"):
        return value  # left as it is, so that the schema's refusal shows what was written
    return os.path.abspath(os.path.expanduser(value))


def _resolve_paths(data: dict[str, Any]) -> None:
    """Make every path of the recipe absolute: a run directory is used from other folders and hosts."""
    for section, key in _PATH_KEYS:
        inner = data.get(str(section))
        if isinstance(inner, dict) and key in inner:
            inner[key] = _absolute(inner[key])
    texts = data.get("data", {}).get("text", []) if isinstance(data.get("data"), dict) else []
    for text in texts if isinstance(texts, list) else []:
        if isinstance(text, dict) and "path" in text:
            text["path"] = _absolute(text["path"])
    for section in ("vqvae", "coglm", "direct_sr", "iterative_sr"):
        train = data[section].get("train") if isinstance(data.get(section), dict) else None
        if isinstance(train, dict) and str(train.get("deepspeed")).endswith(".json"):
            train["deepspeed"] = _absolute(train["deepspeed"])


def load_recipe(name_or_path: str | Path, overrides: list[str]) -> Recipe:
    """Read, override and check a recipe.

    Args:
        name_or_path: `quickstart` (a shipped recipe) or `my/recipe.yaml`.
        overrides: `a.b=c` strings, applied in order; the value is YAML (`[0, 1]`, `true`, `1e-4`, `text`).

    Returns:
        The checked recipe, filled in by its `preset`. Relative paths in it, wherever written, start at the working
        directory.

    Raises:
        ConfigError: one sentence for each problem, with `file:line` or the override, key, value and remedy.
    """
    path = find_recipe(str(name_or_path))
    data, lines = read_file(path)
    origins = Origins(lines, str(path))
    if data is None:
        data = {}
    if isinstance(data, dict):
        for override in overrides:
            _apply_override(data, override, origins)
        apply_preset(data, origins)
        _resolve_paths(data)
    return validate(Recipe, data, origins, lambda key: f"set it in {path.name} or with --set {key}=VALUE")


def recipe_yaml(recipe: Recipe) -> str:
    """Return the whole recipe as YAML, defaults included; `load_recipe` of it gives an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)
