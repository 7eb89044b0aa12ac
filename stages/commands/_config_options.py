"""Sections of a recipe as options of a command: one option for each field, with its documentation as help."""

import argparse
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import ValidationError

from cogview2.pipeline.config.base import Config
from cogview2.pipeline.errors import ConfigError

C = TypeVar("C", bound=Config)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_options(
    parser: argparse.ArgumentParser, section: type[Config], *, skip: tuple[str, ...] = ()
) -> None:
    """Add an option for each field; one that is not given leaves the recipe's value.

    Args:
        parser: gets the options.
        section: its fields are choices, switches or numbers.
        skip: names of fields that the command does not offer.
    """
    group = parser.add_argument_group("options of the recipe, which gives the defaults")
    for name, field in section.model_fields.items():
        if name in skip:
            continue
        text = " ".join((field.description or "").split()).replace("%", "%%")
        if field.annotation is bool:
            group.add_argument(_flag(name), action=argparse.BooleanOptionalAction, default=None, help=text)
        elif get_origin(field.annotation) is Literal:
            group.add_argument(_flag(name), choices=get_args(field.annotation), help=text)
        else:
            assert field.annotation in (int, float), f"{name} is no option"
            kind = int if field.annotation is int else float
            group.add_argument(_flag(name), type=kind, metavar="N" if kind is int else "X", help=text)


def changed(config: C, arguments: argparse.Namespace) -> C:
    """Return `config` with the values of the options that were given.

    Raises:
        ConfigError: a value that the section refuses.
    """
    given: dict[str, Any] = {
        name: value
        for name in type(config).model_fields
        if (value := getattr(arguments, name, None)) is not None
    }
    try:
        return type(config).model_validate(config.model_dump() | given)
    except ValidationError as error:
        first = error.errors()[0]
        option = _flag(str(first["loc"][0])) if first["loc"] else "the options"
        raise ConfigError(f"{option} {first.get('input')!r}: {first['msg'].lower()}; change it") from error
