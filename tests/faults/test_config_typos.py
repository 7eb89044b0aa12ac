"""Every one-letter typo of every key of recipes and DeepSpeed JSONs is refused, with a hint that holds the right key.

Typos are generated: a letter left out, put in, replaced by any other, two neighbours swapped. The gate tries a share of them,
evenly; `slow` tries them all.
"""

import json
import random
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cogview2 import ds_configs
from cogview2.pipeline.config import problems
from cogview2.pipeline.config.deepspeed import read_json
from cogview2.pipeline.config.deepspeed_schema import DeepSpeedJson
from cogview2.pipeline.config.loading import load_recipe, shipped_recipes
from cogview2.pipeline.config.problems import Origins, all_keys, dotted, holds_texts, keys_of, unknown_keys
from cogview2.pipeline.config.stages import Recipe
from cogview2.pipeline.config.yaml_reader import KeyPath, read_file
from cogview2.pipeline.errors import ConfigError

SEED = 20260104
LETTERS = string.ascii_lowercase + string.digits + "_"
GATE_SHARE = 80
ROOTS: dict[str, type[Any]] = {"recipe": Recipe, "deepspeed": DeepSpeedJson}


def typos(word: str) -> set[str]:
    """Return every word that is one letter away."""
    cuts = [(word[:at], word[at:]) for at in range(len(word) + 1)]
    found = {head + tail[1:] for head, tail in cuts if tail}
    found |= {head + letter + tail for head, tail in cuts for letter in LETTERS}
    found |= {head + letter + tail[1:] for head, tail in cuts if tail for letter in LETTERS}
    found |= {head + tail[1] + tail[0] + tail[2:] for head, tail in cuts if len(tail) > 1}
    return {typo for typo in found if typo} - {word}


def section(root: type[Any], path: KeyPath) -> type[Any]:
    """Return the section in which the key `path` stands."""
    for name in path[:-1]:
        inner = keys_of(root)[str(name)]
        assert inner is not None
        root = inner
    return root


def cases(root: type[Any], share: int) -> Iterator[tuple[KeyPath, str]]:
    """Yield (key, typo) for every key, one of `share` typos of each."""
    rng = random.Random(SEED)
    for path in all_keys(root):
        known = set(keys_of(section(root, path)))
        wrong = sorted(typos(str(path[-1])) - known)
        yield from ((path, typo) for typo in rng.sample(wrong, -(-len(wrong) // share)))


def nested(path: KeyPath, value: Any) -> Any:
    for name in reversed(path):
        value = {name: value}
    return value


def unhinted(root: type[Any], path: KeyPath, typo: str) -> str | None:
    """Return what is wrong with the refusal of a typo, or None."""
    key = dotted((*path[:-1], typo))
    sentences = unknown_keys(nested((*path[:-1], typo), 1), root, Origins({}, "file"))
    if len(sentences) != 1 or not sentences[0].startswith(f"file: unknown key {key!r}; "):
        return f"{key}: {sentences}"
    if repr(dotted(path)) not in sentences[0].partition("did you mean ")[2]:
        return f"{key}: no word of {dotted(path)}: {sentences[0]}"
    return None


@pytest.mark.parametrize("name", sorted(ROOTS))
@pytest.mark.parametrize("share", [GATE_SHARE, pytest.param(1, marks=pytest.mark.slow)])
def test_every_typo_is_refused_with_the_right_hint(name: str, share: int) -> None:
    tried = [(path, typo, unhinted(ROOTS[name], path, typo)) for path, typo in cases(ROOTS[name], share)]
    wrong = [problem for _, _, problem in tried if problem is not None]
    keys = len({path for path, _, _ in tried})
    print(f"{name}: {len(tried)} typos of {keys} keys, seed {SEED}: {len(wrong)} without the right hint")
    assert keys == len(set(all_keys(ROOTS[name])))
    assert not wrong, wrong[:10]


def file_typos(value: Any, root: type[Any], rng: random.Random) -> Iterator[tuple[KeyPath, Any]]:
    """Yield the right key and the whole content with one typo, for every key that a file really has."""

    def walk(inner: Any, model: type[Any] | None, path: KeyPath) -> Iterator[tuple[KeyPath, list[Any]]]:
        if not isinstance(inner, dict) or model is None:
            return
        for key, below in inner.items():
            if holds_texts(model, key):
                yield (*path, key), [inner, key, set(keys_of(model))]
                continue
            yield (*path, key), [inner, key, set(keys_of(model))]
            yield from walk(below, keys_of(model)[key], (*path, key))

    for path, (_, key, known) in list(walk(value, root, ())):
        copy = json.loads(json.dumps(value))
        holder = copy
        for name in path[:-1]:
            holder = holder[name]
        typo = rng.choice(sorted(typos(key) - known))
        content = {typo if name == key else name: below for name, below in list(holder.items())}
        holder.clear()
        holder.update(content)
        yield path, copy


def refused(load: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as caught:
        load()
    assert caught.value.exit_code == 78
    return str(caught.value)


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_in_shipped_recipes(tmp_path: Path, name: str) -> None:
    """One typo for every key that stands in the file: the whole file is refused, with the line of the key."""
    content, _ = read_file(shipped_recipes()[name])
    path = tmp_path / "r.yaml"
    count = 0
    for key, wrong in file_typos(content, Recipe, random.Random(SEED)):
        path.write_text(json.dumps(wrong, indent=1))  # YAML takes JSON
        message = refused(lambda: load_recipe(path, []))
        assert "unknown key" in message and repr(dotted(key)) in message and f"{path}:" in message
        count += 1
    assert count > 10


@pytest.mark.parametrize("name", ds_configs.names())
def test_in_shipped_deepspeed_files(tmp_path: Path, name: str) -> None:
    content = json.loads(ds_configs.path(name).read_text())
    path = tmp_path / "d.json"
    count = 0
    for key, wrong in file_typos(content, DeepSpeedJson, random.Random(SEED)):
        path.write_text(json.dumps(wrong))
        message = refused(lambda: read_json(str(path)))
        assert "unknown key" in message and repr(dotted(key)) in message and str(path) in message
        count += 1
    assert count >= 3


def test_in_overrides() -> None:
    rng = random.Random(SEED)
    for path in list(all_keys(Recipe))[::3]:
        wrong = rng.choice(sorted(typos(str(path[-1])) - set(keys_of(section(Recipe, path)))))
        key = dotted((*path[:-1], wrong))
        message = refused(lambda: load_recipe("quickstart", [f"{key}=1"]))  # noqa: B023 - called at once
        assert f"--set {key}=1: unknown key {key!r}" in message and repr(dotted(path)) in message


def test_the_mark_of_overriding_is_a_plain_word() -> None:
    """A typo of a section's name in a dotted key is refused where it stands."""
    for path in ("colgm.train.steps", "coglm.trai.steps", "Coglm.train.steps", "coglm.Train.steps"):
        assert "did you mean" in refused(lambda: load_recipe("quickstart", [f"{path}=1"]))  # noqa: B023


@pytest.mark.parametrize("name", sorted(ROOTS))
def test_mutant_unknown_keys_that_are_let_through(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, typo = next(cases(ROOTS[name], GATE_SHARE))
    monkeypatch.setattr(problems, "keys_of", lambda _: _Anything())
    assert unhinted(ROOTS[name], path, typo) is not None


def test_mutant_hints_by_the_first_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problems, "suggestion", lambda path, section, root: f"did you mean {path[-1][0]!r}?")
    assert all(unhinted(DeepSpeedJson, path, typo) for path, typo in cases(DeepSpeedJson, 400))


class _Anything(dict[str, None]):
    """Has every key."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> None:
        return None
