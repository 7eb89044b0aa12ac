"""What every kind of source lists: entries (captions at hand, picture bytes still on disk) and refusals."""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, get_args

from cogview2.pipeline.config.data import DataConfig, Language
from cogview2.pipeline.data.captions import clean_caption, guess_language
from cogview2.pipeline.data.open_files import OpenFiles
from cogview2.pipeline.data.records import Refusal, RefusedError

MAX_RECORD_BYTES = 4 * 1024 * 1024
"""Longest JSON record or caption file that is read at all."""
PICTURE_EXTENSIONS = frozenset("jpg jpeg jpe jfif png apng webp gif bmp tif tiff".split())
# Listed so that they are refused by name when read, instead of being overlooked.
UNSUPPORTED_EXTENSIONS = frozenset("svg heic heif avif eps ps ico psd jp2 j2k jxl".split())
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")
# What turns the reading direction around makes a name look like another one.
_UNSAFE_CHARACTER = re.compile("[\x00-\x1f\x7f-\x9f\\\\\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_LANGUAGES: tuple[Language, ...] = get_args(Language)


@dataclass(frozen=True)
class Location:
    """A byte range of a file."""

    path: Path
    offset: int
    size: int


@dataclass(frozen=True)
class Entry:
    """One listed pair. `name` is what people call it, for example the path without extension."""

    name: str
    image: Location
    captions: dict[str, str]
    metadata: dict[str, Any]


@dataclass
class Listing:
    """All entries of a source in a stable order, and what was refused on the way."""

    kind: str
    entries: list[Entry] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)

    def refuse(self, key: str, reason: str, detail: str) -> None:
        """Note one refused record, sample or file."""
        self.refused.append(Refusal(key, reason, detail))


def key_of(name: str) -> str:
    """Return a key `[A-Za-z0-9_-]{1,64}` for `name`; different names get different keys.

    Plain path names keep their letters (`a/b` -> `a__b`); any other gets what is legible and a hash.
    """
    unambiguous = "__" not in name and "_/" not in name and "/_" not in name
    flat = name.replace("/", "__")
    if unambiguous and _PLAIN_KEY.fullmatch(flat):
        return flat
    legible = re.sub(r"[^A-Za-z0-9_-]+", "_", flat).strip("_")[-40:].strip("_")
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{legible}-{digest}" if legible else digest


def unsafe_name(name: str) -> str | None:
    """Return why `name` must not be used as a relative path, or None."""
    if not name:
        return "is empty"
    if name.startswith("/"):
        return "is absolute"
    if ".." in name.split("/"):
        return "leaves the folder by '..'"
    if _UNSAFE_CHARACTER.search(name):
        return "holds a control character, a turn of the reading direction, a backslash or bytes that are not UTF-8"
    return None


def is_junk(name: str) -> bool:
    """Whether `name` is what archivers and desktops leave behind: hidden files, __MACOSX, Thumbs.db..."""
    parts = name.split("/")
    hidden = any(part.startswith(".") and part not in (".", "..") for part in parts)
    return hidden or "__MACOSX" in parts or parts[-1].lower() in ("thumbs.db", "desktop.ini")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RefusedError("record_duplicate_key", f"field {twice!r} stands twice; delete one")
    return record


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def parse_json(text: str) -> Any:
    """Parse JSON; NaN and infinite numbers become None, a field that stands twice in an object is refused."""
    return json.loads(
        text, object_pairs_hook=_unique_keys, parse_constant=lambda _: None, parse_float=_finite
    )


def parse_record(text: str) -> dict[str, Any]:
    """Parse one JSON object; see `parse_json`.

    Raises:
        RefusedError: reason record_bad_json, record_duplicate_key or record_wrong_type.
    """
    try:
        value = parse_json(text)
    except RecursionError as error:
        raise RefusedError("record_bad_json", "nested too deeply") from error
    except ValueError as error:
        raise RefusedError("record_bad_json", str(error)[:200]) from error
    if not isinstance(value, dict):
        raise RefusedError("record_wrong_type", f"a JSON object is needed, got {type(value).__name__}")
    return value


def _caption_fields(record: dict[str, Any]) -> dict[str, str | None]:
    """The caption fields of `record`, the named languages first; other fields are left alone."""
    names = [f"caption_{language}" for language in _LANGUAGES] + ["caption"]
    fields = {name: record[name] for name in names if name in record}
    for name, value in fields.items():
        if value is not None and not isinstance(value, str):
            raise RefusedError("record_wrong_type", f"{name} is {type(value).__name__}; text is needed")
    return fields


def _no_caption(problem: RefusedError | None, unwanted: Sequence[str], config: DataConfig) -> NoReturn:
    if problem is not None:
        raise problem
    wanted = ", ".join(config.languages)
    raise RefusedError("caption_language", f"caption in {', '.join(unwanted)}; data.languages is {wanted}")


def take_captions(
    record: dict[str, Any], config: DataConfig, missing_reason: str
) -> tuple[dict[str, str], dict[str, Any]]:
    """Split `record` into its clean captions and all its other fields.

    `caption_<language>` wins over `caption`, whose language is guessed. An empty or null caption counts as
    absent when another language is there; any other bad caption refuses the whole record.

    Args:
        record: parsed JSON fields.
        config: wanted languages and caption rules.
        missing_reason: reason code when there is no caption field at all.

    Raises:
        RefusedError: no caption is left, or one is bad.
    """
    fields = _caption_fields(record)
    if not fields:
        raise RefusedError(missing_reason, "no caption; add caption, or caption_<language>")
    captions: dict[str, str] = {}
    unwanted: list[str] = []
    problem: RefusedError | None = None
    for name, value in fields.items():
        language = name.removeprefix("caption_") if name != "caption" else None
        if language is not None and language not in config.languages:
            unwanted.append(language)
            continue
        if value is None:
            problem = problem or RefusedError("record_wrong_type", f"{name} is null; text is needed")
            continue
        try:
            text = clean_caption(value, config.captions)
        except RefusedError as error:
            if error.reason != "caption_empty":
                raise
            problem = problem or error
            continue
        language = language or guess_language(text)
        if language in config.languages:
            captions.setdefault(language, text)
        else:
            unwanted.append(language)
    if not captions:
        _no_caption(problem, unwanted, config)
    return captions, {name: value for name, value in record.items() if name not in fields}


def read_text(location: Location, files: OpenFiles, too_long_reason: str) -> bytes:
    """Read a small text file whole.

    Raises:
        RefusedError: longer than MAX_RECORD_BYTES, or unreadable.
    """
    if location.size > MAX_RECORD_BYTES:
        raise RefusedError(too_long_reason, f"{location.size} bytes; at most {MAX_RECORD_BYTES} are read")
    try:
        return files.read(location.path, location.offset, location.size)
    except OSError as error:
        raise RefusedError("file_unreadable", f"{location.path}: {error.strerror}") from error


def assemble(name: str, parts: dict[str, Location], config: DataConfig, files: OpenFiles) -> Entry:
    """Make an entry of the files of one sample: a picture, <name>.txt and/or <name>.json.

    Args:
        name: what the files have in common.
        parts: lower-case extension -> where its bytes are.
        config: wanted languages and caption rules.
        files: for reading the text parts.

    Raises:
        RefusedError: no picture, several pictures, no caption, or a bad caption.
    """
    pictures = [extension for extension in parts if extension in PICTURE_EXTENSIONS | UNSUPPORTED_EXTENSIONS]
    if not pictures:
        raise RefusedError("sample_missing_image", f"only {', '.join(sorted(parts))}")
    if len(pictures) > 1:
        raise RefusedError("sample_ambiguous_image", f"{', '.join(pictures)}; keep one picture for a caption")
    record: dict[str, Any] = {}
    if "json" in parts:
        raw = read_text(parts["json"], files, "record_too_long")
        try:
            record = parse_record(raw.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise RefusedError("caption_invalid_utf8", f"json, byte {error.start}") from error
    if "txt" in parts:
        # img2dataset writes the same caption into both; the .txt is the one that people edit.
        record["caption"] = clean_caption(read_text(parts["txt"], files, "caption_too_long"), config.captions)
    captions, metadata = take_captions(record, config, "sample_missing_caption")
    return Entry(name, parts[pictures[0]], captions, {**metadata, "source_name": name})
