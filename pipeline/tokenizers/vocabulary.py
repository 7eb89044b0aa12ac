"""The id layout: image codes first, then text pieces in four ranges, then special tokens (spec 1.1)."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, model_validator

from cogview2.pipeline import fsops
from cogview2.pipeline.config.base import Config
from cogview2.pipeline.config.data import Language
from cogview2.pipeline.errors import DataError

CONTROL_PIECES = ("<unk>", "<s>", "</s>", "<pad>", "<n>", "\N{LOWER ONE EIGHTH BLOCK}")
"""The first pieces of every text model, in order; the last one is SentencePiece's lone word boundary."""
UNK, BOS, EOS, PAD, NEWLINE, BOUNDARY = range(len(CONTROL_PIECES))
SPECIAL_TOKENS = ("<start_of_image>", "<start_of_english>", "<start_of_chinese>")
"""Appended after the text pieces, in this order."""
RANGE_NAMES = ("common", "english", "chinese", "rare")

IdRange = tuple[int, int]


class Vocabulary(Config):
    """Half-open ranges of model ids. A text id is the SentencePiece id + `image_codes`."""

    image_codes: Annotated[int, Field(ge=1)]
    text_pieces: Annotated[int, Field(ge=len(CONTROL_PIECES))]
    common: IdRange
    english: IdRange
    chinese: IdRange
    rare: IdRange
    rows: int = Field(
        default_factory=lambda data: data["image_codes"] + data["text_pieces"] + len(SPECIAL_TOKENS)
    )
    """Rows of the embedding; those after the special tokens are spare."""

    @model_validator(mode="after")
    def _contiguous(self) -> "Vocabulary":
        start = self.image_codes
        for name in RANGE_NAMES:
            first, end = getattr(self, name)
            if first != start or end < first:
                raise ValueError(
                    f"range {name} is [{first}, {end}); it must start at {start}, where the one before ends"
                )
            start = end
        if start != self.text_end:
            raise ValueError(f"the text ranges end at {start}; image_codes + text_pieces is {self.text_end}")
        if self.common[1] - self.common[0] < len(CONTROL_PIECES):
            raise ValueError(f"range common {self.common} must hold the {len(CONTROL_PIECES)} control pieces")
        if self.rows < self.text_end + len(SPECIAL_TOKENS):
            raise ValueError(
                f"rows {self.rows} is too few; {self.image_codes} image codes, {self.text_pieces} text "
                f"pieces and {len(SPECIAL_TOKENS)} special tokens need {self.text_end + len(SPECIAL_TOKENS)}"
            )
        return self

    @property
    def text_end(self) -> int:
        """First id after the text pieces."""
        return self.image_codes + self.text_pieces

    @property
    def unk(self) -> int:
        """Id of a character that the text model does not know."""
        return self.image_codes + UNK

    @property
    def bos(self) -> int:
        """Id of `<s>`; never produced by encoding."""
        return self.image_codes + BOS

    @property
    def eos(self) -> int:
        """Id of `</s>`; never produced by encoding."""
        return self.image_codes + EOS

    @property
    def pad(self) -> int:
        """Id that fills the text area and ends a caption (spec 2.6)."""
        return self.image_codes + PAD

    @property
    def newline(self) -> int:
        """Id of `<n>`."""
        return self.image_codes + NEWLINE

    @property
    def boundary(self) -> int:
        """Id of the lone word-boundary mark."""
        return self.image_codes + BOUNDARY

    @property
    def start_of_image(self) -> int:
        """Id that comes right before the first image code."""
        return self.text_end

    @property
    def start_of_english(self) -> int:
        """Id before an English caption that is to be predicted."""
        return self.text_end + 1

    @property
    def start_of_chinese(self) -> int:
        """Id before a Chinese caption that is to be predicted."""
        return self.text_end + 2

    def is_image(self, token: int) -> bool:
        """Return whether `token` is an image code."""
        return 0 <= token < self.image_codes

    def is_text(self, token: int) -> bool:
        """Return whether `token` is a text piece (control pieces too, special tokens not)."""
        return self.image_codes <= token < self.text_end

    def start_of(self, language: str) -> int:
        """Return the start token of captions in `language`, "en" or "zh".

        Raises:
            DataError: another language.
        """
        starts = {"en": self.start_of_english, "zh": self.start_of_chinese}
        if language not in starts:
            raise DataError(
                f"no start token for language {language!r}; the languages are {', '.join(starts)}"
            )
        return starts[language]

    def language_of(self, ids: Iterable[int]) -> Language:
        """Return "en" if every id is below the Chinese range, else "zh" (spec 2.6, understanding samples)."""
        return "en" if all(token < self.chinese[0] for token in ids) else "zh"

    def save(self, path: Path) -> None:
        """Write the layout as JSON."""
        fsops.write_json(Path(path), self.model_dump(mode="json"))

    @classmethod
    def load(cls, path: Path) -> "Vocabulary":
        """Read a layout written by `save`.

        Raises:
            DataError: missing, not JSON, or not a valid layout.
        """
        try:
            return cls.model_validate(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, ValidationError) as error:
            reason = str(error).splitlines()[-1] if str(error) else type(error).__name__
            raise DataError(f"{path} is not a vocabulary: {reason}; run train_tokenizer again") from error

    @classmethod
    def from_counts(
        cls, image_codes: int, counts: tuple[int, int, int, int], rows: int | None = None
    ) -> "Vocabulary":
        """Return the layout whose four ranges have `counts` pieces, in the order of `RANGE_NAMES`.

        Raises:
            DataError: the counts and `rows` make no valid layout.
        """
        edges = [image_codes]
        for count in counts:
            edges.append(edges[-1] + count)
        ranges = dict(zip(RANGE_NAMES, zip(edges, edges[1:], strict=False), strict=True))
        fields = {"image_codes": image_codes, "text_pieces": sum(counts), **ranges}
        if rows is not None:
            fields["rows"] = rows
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            rules = "; ".join(detail["msg"].removeprefix("Value error, ") for detail in error.errors())
            raise DataError(
                f"no id layout of {image_codes} image codes and {sum(counts)} text pieces: {rules}"
            ) from error

    @classmethod
    def icetk(cls) -> "Vocabulary":
        """Return the published layout (spec 1.1)."""
        return cls.from_counts(20_000, (100, 63_723, 61_830, 4_347), rows=150_010)

    @classmethod
    def uniform(cls, image_codes: int, text_pieces: int, rows: int | None = None) -> "Vocabulary":
        """Return a layout for tests: the pieces after the control pieces split evenly over the ranges."""
        rest = text_pieces - len(CONTROL_PIECES)
        share = max(rest, 0) // len(RANGE_NAMES)
        counts = (len(CONTROL_PIECES) + share, share, share, rest - 3 * share)
        return cls.from_counts(image_codes, counts, rows)
