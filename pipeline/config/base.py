"""The frozen, strict base of every configuration class."""

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Immutable; an unknown key is an error; the string under a field is its documentation."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )


def flat(value: Any, key: str) -> dict[str, Any]:
    """Return the plain values of a section, or one value, by dotted key."""
    if isinstance(value, Config):
        value = value.model_dump(mode="json")
    if not isinstance(value, dict):
        return {key: value}
    found: dict[str, Any] = {}
    for name, inner in value.items():
        found |= flat(inner, f"{key}.{name}")
    return found


def fingerprint(*parts: Config | dict[str, Any] | str | int | None) -> str:
    """Return a sha256 over the canonical JSON of `parts`: equal exactly when every value is equal."""
    plain = [part.model_dump(mode="json") if isinstance(part, Config) else part for part in parts]
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
