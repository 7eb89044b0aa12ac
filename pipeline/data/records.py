"""The typed records that walk through the house."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cogview2.pipeline.errors import DataError


@dataclass(frozen=True)
class RawPair:
    """A picture as stored, with its captions by language; `metadata` keeps every further field of the source."""

    key: str
    image: bytes
    captions: dict[str, str]
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenPair:
    """A tokenized pair: text ids by language, base codes int32 [g*g], high-resolution codes int32 [G*G] or None."""

    key: str
    text_ids: dict[str, np.ndarray]
    base_codes: np.ndarray
    superres_codes: np.ndarray | None
    captions: dict[str, str]
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Refusal:
    """One record that was not accepted, and why."""

    key: str
    reason: str
    detail: str


class RefusedError(DataError):
    """One bad picture, caption or record; its neighbours are fine."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
