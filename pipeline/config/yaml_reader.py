"""Strict YAML: plain values only, no duplicate keys, no aliases, bounded size, and the line of every key."""

import re
from pathlib import Path
from typing import Any

import yaml

from cogview2.pipeline.errors import ConfigError

MAX_BYTES = 1024 * 1024
MAX_DEPTH = 32
KeyPath = tuple[str | int, ...]
_PLAIN_TAGS: dict[type[yaml.Node], str] = {
    yaml.SequenceNode: "tag:yaml.org,2002:seq",
    yaml.MappingNode: "tag:yaml.org,2002:map",
}


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalar rules of YAML 1.2: `no` and `12:30` are strings, `1e-4` is a number."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:null|~|)$"), ["n", "~", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|nan)$"),
    list("-+.0123456789"),
)


def _line(mark: Any) -> int:
    return mark.line + 1 if mark is not None else 0


def _refuse_tricks(text: str, source: str) -> None:
    """Refuse aliases (a few bytes can mean gigabytes) and deep nesting, before anything is built."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            line = _line(event.start_mark)
            raise ConfigError(f"{source}:{line}: alias *{event.anchor} is not allowed; write the value out")
        if isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                line = _line(event.start_mark)
                raise ConfigError(f"{source}:{line}: nested deeper than {MAX_DEPTH} levels; flatten it")
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            depth -= 1


def _build(node: yaml.Node, loader: _Loader, path: KeyPath, source: str, lines: dict[KeyPath, str]) -> Any:
    lines.setdefault(path, f"{source}:{_line(node.start_mark)}")
    plain = _PLAIN_TAGS.get(type(node))
    if plain is not None and node.tag != plain:
        raise ConfigError(f"{lines[path]}: not valid YAML here (tag {node.tag!r}); write plain values")
    if isinstance(node, yaml.SequenceNode):
        return [_build(item, loader, (*path, index), source, lines) for index, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node) if isinstance(key_node, yaml.ScalarNode) else None
        here = f"{source}:{_line(key_node.start_mark)}"
        if not isinstance(key, str):
            raise ConfigError(f"{here}: key {key_node.value!r} is not a plain word; quote it or correct it")
        if key in mapping:
            raise ConfigError(
                f"{here}: key {key!r} stands twice (first at {lines[(*path, key)]}); delete one of them"
            )
        lines[(*path, key)] = here
        mapping[key] = _build(value_node, loader, (*path, key), source, lines)
    return mapping


def read_text(text: str, source: str) -> tuple[Any, dict[KeyPath, str]]:
    """Parse one YAML document.

    Args:
        text: the document.
        source: what to call it in messages, for example the file name.

    Returns:
        The plain value (dict, list, str, int, float, bool, None), and for every key path its `source:line`.

    Raises:
        ConfigError: not YAML, more than one document, a duplicate key, an alias, a tag, too big or too deep.
    """
    if len(text.encode("utf-8", errors="surrogatepass")) > MAX_BYTES:
        raise ConfigError(f"{source} is larger than {MAX_BYTES} bytes; a recipe is a few kilobytes")
    lines: dict[KeyPath, str] = {}
    try:
        _refuse_tricks(text, source)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            return (None if node is None else _build(node, loader, (), source, lines)), lines
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}" if mark else source
        raise ConfigError(
            f"{where}: not valid YAML ({error.problem or error.context}); correct it"
        ) from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{source}: not valid YAML ({str(error).splitlines()[0]}); correct it") from error


def read_file(path: Path) -> tuple[Any, dict[KeyPath, str]]:
    """Parse the YAML file `path`, see `read_text`; missing, too big or not UTF-8 is a ConfigError."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; name a YAML file") from error
    try:
        text = data.decode("utf-8") if len(data) <= MAX_BYTES else "x" * (MAX_BYTES + 1)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8") from error
    return read_text(text, str(path))
