"""What is wrong with a configuration, one sentence each: where, key, value, rule, remedy."""

import difflib
import itertools
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from cogview2.pipeline.config.base import Config
from cogview2.pipeline.config.yaml_reader import KeyPath
from cogview2.pipeline.errors import ConfigError

_MAX_SHOWN = 20
_CLOSE_ENOUGH = 0.4
_VERY_CLOSE = 0.8
_CANDIDATES = 5
C = TypeVar("C", bound=Config)


class Origins:
    """Where each value was written: `file:line`, or the override."""

    def __init__(self, lines: dict[KeyPath, str], default: str) -> None:
        self.lines = dict(lines)
        self.default = default

    def of(self, path: KeyPath) -> str:
        """Return the origin of `path`, or of the nearest section around it."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.lines:
                return self.lines[path[:length]]
        return self.default


def dotted(path: KeyPath) -> str:
    """Return ("data", "text", 0, "path") as `data.text[0].path`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def section_of(annotation: Any) -> type[Config] | None:
    """Return the Config class inside a field's annotation (plain, optional, or in a tuple), if any."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, tuple, typing.Annotated):
        for argument in typing.get_args(annotation):
            found = section_of(argument)
            if found is not None:
                return found
    return None


def keys_of(model: type[Config]) -> dict[str, type[Config] | None]:
    """Return the keys that one section takes (the names used in files), each with the section behind it."""
    return {field.alias or name: section_of(field.annotation) for name, field in model.model_fields.items()}


def holds_texts(model: type[Config], key: str) -> bool:
    """Return whether a key of `model` is a mapping from names of the operator's own choice to texts."""
    annotation = model.model_fields[key].annotation if key in model.model_fields else None
    return typing.get_origin(annotation) is dict and typing.get_args(annotation)[1] is str


def all_keys(model: type[Config], prefix: KeyPath = ()) -> Iterator[KeyPath]:
    """Yield the path of every key of `model` and of its sections."""
    for name, section in keys_of(model).items():
        yield (*prefix, name)
        if section is not None:
            yield from all_keys(section, (*prefix, name))


def edits(first: str, second: str) -> int:
    """Return how many letters to insert, delete, replace or swap to turn one word into the other."""
    rows = [list(range(len(second) + 1))]
    for i, left in enumerate(first, start=1):
        row = [i]
        for j, right in enumerate(second, start=1):
            row.append(min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (left != right)))
            if i > 1 and j > 1 and left == second[j - 2] and first[i - 2] == right:
                row[-1] = min(row[-1], rows[-2][j - 2] + 1)
        rows.append(row)
    return rows[-1][-1]


def suggestion(path: KeyPath, section: type[Config], root: type[Config]) -> str:
    """Return the remedy for the unknown key `path` of `section`: the most similar key, there or elsewhere."""
    name = str(path[-1])
    siblings = keys_of(section)
    elsewhere = [dotted(candidate) for candidate in all_keys(root) if candidate[-1] == name]
    # A word that is a key somewhere else is more likely misplaced than misspelt.
    cutoff = _VERY_CLOSE if elsewhere else _CLOSE_ENOUGH
    close = difflib.get_close_matches(name, siblings, n=_CANDIDATES, cutoff=cutoff)
    if close:
        # The ratio alone prefers long words: of `betas` and `eps` it gives the first for `eas`.
        fewest = min(edits(name, candidate) for candidate in close)
        nearest = [candidate for candidate in close if edits(name, candidate) == fewest]
        return f"did you mean {' or '.join(repr(dotted((*path[:-1], key))) for key in nearest)}?"
    if elsewhere:
        return f"did you mean {elsewhere[0]!r}?"
    return f"the keys of {dotted(path[:-1]) or 'this file'} are: {', '.join(siblings)}"


def unknown_keys(data: Any, root: type[Config], origins: Origins) -> list[str]:
    """Return a sentence for every key of `data` that `root` does not have."""
    problems: list[str] = []

    def walk(value: Any, section: type[Config], path: KeyPath) -> None:
        if isinstance(value, list):
            for index, item in enumerate(value):
                walk(item, section, (*path, index))
        elif isinstance(value, dict):
            known = keys_of(section)
            for name, inner in value.items():
                here = (*path, name)
                if name not in known:
                    remedy = suggestion(here, section, root)
                    problems.append(f"{origins.of(here)}: unknown key {dotted(here)!r}; {remedy}")
                    continue
                deeper = known[name]
                if deeper is not None:
                    walk(inner, deeper, here)

    walk(data, root, ())
    return problems


def _sentence(error: ErrorDetails, origins: Origins, change: Callable[[str], str]) -> str:
    path: KeyPath = error["loc"]
    key = dotted(path)
    settable = dotted(tuple(itertools.takewhile(lambda part: isinstance(part, str), path)))
    where = origins.of(path)
    rule = error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if error["type"] == "missing":
        return f"{where}: key {key!r} is missing; {change(key)}"
    if error["type"] == "value_error":
        return f"{where}: {'' if not key or rule.startswith(key) else key + ': '}{rule}"
    if error["type"] in ("model_type", "dict_type"):
        rule = "it must be a section with keys of its own"
    rule = rule.replace("Input should be", "it must be").replace("String should", "the text should")
    value = repr(error["input"])
    shown = value if len(value) <= 80 else value[:77] + "..."
    return f"{where}: {key} is {shown}, but {rule}; {change(settable)}"


def validate(model: type[C], data: Any, origins: Origins, change: Callable[[str], str]) -> C:
    """Build `model` from plain values.

    Args:
        model: the class of the whole file.
        data: what the file and the overrides say.
        origins: where each value was written.
        change: from a dotted key to the remedy, for example "set it with --set KEY=VALUE".

    Raises:
        ConfigError: one sentence for each problem, one a line.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{origins.default} holds no keys but {data!r}; write `key: value` lines")
    problems = unknown_keys(data, model, origins)
    if not problems:
        try:
            return model.model_validate(data)
        except ValidationError as error:
            problems = [_sentence(detail, origins, change) for detail in error.errors()]
    hidden = len(problems) - _MAX_SHOWN
    more = [f"... and {hidden} more"] if hidden > 0 else []
    raise ConfigError("\n".join(problems[:_MAX_SHOWN] + more))
