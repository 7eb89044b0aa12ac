"""Styles as data: what is put around a prompt, and the sampling values that go with it (spec 3.1)."""

import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError, field_validator

from cogview2.pipeline.config.base import Config
from cogview2.pipeline.config.sampling import SamplingConfig
from cogview2.pipeline.config.yaml_reader import read_file
from cogview2.pipeline.errors import ConfigError

SHIPPED = Path(__file__).with_name("styles.yaml")
NO_STYLE = "none"

Section = Literal["base", "direct", "iterative"]


class Style(Config):
    """One style. Applying it makes new objects: nothing of one picture leaks into the next."""

    suffix: str = ""
    """Text that describes the style."""
    template: str | None = None
    """How {text} and {suffix} are joined; `{text} {suffix}`, or the text alone without a suffix, when left out."""
    sampling: dict[Section, dict[str, Any]] = {}
    """Values of the sections `base`, `direct` and `iterative` of SamplingConfig that the style changes."""

    @field_validator("template")
    @classmethod
    def _has_its_fields(cls, template: str | None) -> str | None:
        if template is None:
            return None
        try:
            parts = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
        except ValueError as error:
            raise ValueError(
                f"template {template!r} has a stray brace: write {{{{ for a plain one"
            ) from error
        names = [name for name, _, _ in parts]
        plain = all(not spec and not conversion for _, spec, conversion in parts)
        if names.count("text") != 1 or set(names) - {"text", "suffix"} or not plain:
            raise ValueError(
                f"template {template!r} must hold {{text}} once and may hold {{suffix}}, nothing else"
            )
        return template

    @field_validator("sampling")
    @classmethod
    def _fits(cls, sampling: dict[Section, dict[str, Any]]) -> dict[Section, dict[str, Any]]:
        _merged(SamplingConfig(), sampling)
        return sampling

    def prompt(self, text: str) -> str:
        """Return the prompt of a text in this style."""
        template = self.template or ("{text} {suffix}" if self.suffix else "{text}")
        return template.format(text=text, suffix=self.suffix)

    def sampling_for(self, sampling: SamplingConfig) -> SamplingConfig:
        """Return `sampling` with the style's values in place of its own; the given one stays as it is.

        Raises:
            ConfigError: values that do not go together with the given ones.
        """
        try:
            return _merged(sampling, self.sampling)
        except ValidationError as error:
            raise ConfigError(f"the style's sampling values do not fit: {_reason(error)}") from error


def _merged(sampling: SamplingConfig, changes: Mapping[Section, Mapping[str, Any]]) -> SamplingConfig:
    values = sampling.model_dump()
    for section, fields in changes.items():
        values[section] |= fields
    return SamplingConfig.model_validate(values)


def _reason(error: ValidationError) -> str:
    detail = error.errors()[0]
    place = ".".join(str(part) for part in detail["loc"])
    return f"{place}: {detail['msg'].removeprefix('Value error, ')}" if place else detail["msg"]


def load_styles(path: Path | None = None) -> dict[str, Style]:
    """Return styles by name: the shipped ones, and on top of them those of a person's own file.

    Args:
        path: a YAML file of the form of the shipped styles.yaml; a style of a known name takes its place.

    Raises:
        ConfigError: the file cannot be read, or a style in it breaks a rule.
    """
    styles: dict[str, Style] = {}
    for source in [SHIPPED] if path is None else [SHIPPED, path]:
        entries = read_file(source)[0]
        if not isinstance(entries, dict):
            raise ConfigError(
                f"{source} must map names of styles to their values, like the shipped {SHIPPED.name}"
            )
        for name, fields in entries.items():
            try:
                styles[name] = Style.model_validate({} if fields is None else fields)
            except ValidationError as error:
                raise ConfigError(f"style {name!r} of {source} cannot be used: {_reason(error)}") from error
    return styles


def find_style(name: str, path: Path | None = None) -> Style:
    """Return the style of a name; see `load_styles`.

    Raises:
        ConfigError: no such style, or a file that cannot be used.
    """
    styles = load_styles(path)
    if name not in styles:
        raise ConfigError(
            f"there is no style {name!r}; choose from {', '.join(sorted(styles))}, or add it with --styles"
        )
    return styles[name]
