"""Folders of pictures: listed in captions.jsonl, with <name>.txt beside each one, or in COCO-style JSON."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from cogview2.pipeline.config.data import DataConfig
from cogview2.pipeline.data.listing import (
    MAX_RECORD_BYTES,
    PICTURE_EXTENSIONS,
    UNSUPPORTED_EXTENSIONS,
    Entry,
    Listing,
    Location,
    assemble,
    is_junk,
    parse_json,
    parse_record,
    take_captions,
    unsafe_name,
)
from cogview2.pipeline.data.open_files import OpenFiles
from cogview2.pipeline.data.records import RefusedError
from cogview2.pipeline.errors import DataError

_BOM = b"\xef\xbb\xbf"
_SIDECARS = frozenset({"txt", "json"})


def locate(root: Path, name: str) -> Location:
    """Return the whole file `name` below `root`, which must be a real path.

    Raises:
        RefusedError: reason path_unsafe (leaves `root`, also through links), image_missing or
            image_not_regular.
    """
    problem = unsafe_name(name)
    if problem:
        raise RefusedError("path_unsafe", f"{name!r} {problem}; use a path below the data folder")
    try:
        real = os.path.realpath(root / name, strict=True)
        if not real.startswith(str(root).rstrip(os.sep) + os.sep):
            raise RefusedError(
                "path_unsafe", f"{name!r} is a link that leaves the data folder; copy the file into it"
            )
        status = os.stat(real)
    except OSError as error:
        raise RefusedError("image_missing", f"{name!r}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise RefusedError("image_not_regular", f"{name!r} is not a plain file")
    return Location(Path(real), 0, status.st_size)


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Yield (line number from 1, line), None for a line that is too long; memory stays bounded."""
    number = 0
    while line := file.readline(MAX_RECORD_BYTES + 1):
        number += 1
        if len(line) <= MAX_RECORD_BYTES:
            yield number, line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_RECORD_BYTES)
        yield number, None


def _jsonl_entry(line: bytes | None, root: Path, config: DataConfig) -> Entry:
    if line is None:
        raise RefusedError("record_too_long", f"a line is longer than {MAX_RECORD_BYTES} bytes")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RefusedError("caption_invalid_utf8", f"byte {error.start} of the line") from error
    record = parse_record(text)
    image = record.pop("image", None)
    if image is None:
        raise RefusedError("record_missing_field", "no image; add the path of the picture")
    if not isinstance(image, str):
        raise RefusedError("record_wrong_type", f"image is {type(image).__name__}; a path is needed")
    captions, metadata = take_captions(record, config, "record_missing_field")
    location = locate(root, image)
    name = os.path.splitext(os.path.normpath(image))[0]
    return Entry(name, location, captions, {**metadata, "source_name": image})


def list_jsonl(path: Path, config: DataConfig) -> Listing:
    """List a file with one JSON object a line: `image` and `caption` or `caption_<language>`.

    `image` is a path below the file's folder; other fields are kept as metadata. A picture may be
    listed several times, with other captions.

    Raises:
        DataError: the file cannot be read.
    """
    listing = Listing("jsonl")
    root = path.parent.resolve()
    try:
        with open(path, "rb") as file:
            for number, line in _lines(file):
                if number == 1 and line is not None:
                    line = line.removeprefix(_BOM)
                if line is not None and not line.strip():
                    continue
                try:
                    listing.entries.append(_jsonl_entry(line, root, config))
                except RefusedError as error:
                    listing.refuse(f"{path.name}:{number}", error.reason, error.detail)
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}; check the path and its permissions"
        ) from error
    return listing


def list_text_beside(folder: Path, config: DataConfig) -> Listing:
    """List pictures with a <name>.txt (or .json) beside them, in all sub-folders; hidden files ignored."""
    listing = Listing("folder")
    root = folder.resolve()
    samples: dict[str, dict[str, str]] = {}
    clashes: set[str] = set()

    def unreadable(error: OSError) -> None:
        listing.refuse(str(error.filename), "folder_unreadable", str(error.strerror))

    for current, folders, names in os.walk(root, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not is_junk(name))
        for file_name in sorted(name for name in names if not is_junk(name)):
            relative = os.path.relpath(os.path.join(current, file_name), root)
            stem, dotted = os.path.splitext(relative)
            extension = dotted[1:].lower()
            if extension in PICTURE_EXTENSIONS | UNSUPPORTED_EXTENSIONS | _SIDECARS:
                if extension in samples.setdefault(stem, {}):
                    clashes.add(stem)
                samples[stem][extension] = relative
    with OpenFiles() as files:
        for stem in sorted(samples):
            parts = samples[stem]
            if set(parts) == {"json"}:
                continue  # some other tool's settings or statistics, not a caption
            try:
                if stem in clashes:
                    raise RefusedError(
                        "duplicate_key", "one extension in upper and lower case; keep one file"
                    )
                located = {extension: locate(root, name) for extension, name in parts.items()}
                listing.entries.append(assemble(stem, located, config, files))
            except RefusedError as error:
                listing.refuse(stem, error.reason, error.detail)
    return listing


def find_coco(folder: Path) -> list[Path]:
    """Return the COCO caption files of `folder`: coco_captions*.json in it, or annotations/captions*.json."""
    return sorted(folder.glob("coco_captions*.json")) or sorted(folder.glob("annotations/captions*.json"))


def _load_coco(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    try:
        document = parse_json(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check its permissions") from error
    except (ValueError, RecursionError, RefusedError) as error:
        raise DataError(f"{path} is not JSON ({str(error)[:100]}); fetch it again") from error
    lists = [document.get(name) if isinstance(document, dict) else None for name in ("images", "annotations")]
    for name, rows in zip(("images", "annotations"), lists, strict=True):
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise DataError(f"{path} has no list `{name}` of objects; name a COCO caption file")
    return lists[0] or [], lists[1] or []


def _locate_coco(root: Path, name: str) -> Location:
    """Look below images/, then beside, then in the folder of the split, as in train2017/<file>."""
    problem: RefusedError | None = None
    for place in ("images", "", "train2017", "val2017", "train2014", "val2014"):
        try:
            return locate(root, f"{place}/{name}" if place and not unsafe_name(name) else name)
        except RefusedError as error:
            if error.reason != "image_missing":
                raise
            problem = problem or error
    assert problem is not None
    raise problem


def _coco_entry(image: dict[str, Any], texts: list[Any], root: Path, config: DataConfig) -> Entry:
    name = image.get("file_name")
    if name is None:
        raise RefusedError("record_missing_field", "no file_name")
    if not isinstance(name, str):
        raise RefusedError("record_wrong_type", f"file_name is {type(name).__name__}; text is needed")
    captions: dict[str, str] = {}
    problem = RefusedError("sample_missing_caption", "no annotation has this image_id")
    for text in texts:
        try:
            found, _ = take_captions({"caption": text}, config, "sample_missing_caption")
            captions = {**found, **captions}
        except RefusedError as error:
            problem = error
    if not captions:
        raise problem
    location = _locate_coco(root, name)
    metadata = {**image, "captions": [text for text in texts if isinstance(text, str)], "source_name": name}
    return Entry(os.path.splitext(name)[0], location, captions, metadata)


def list_coco(paths: list[Path], folder: Path, config: DataConfig) -> Listing:
    """List COCO-style caption files; the first good caption of each language counts, metadata keeps all.

    Raises:
        DataError: a file is not COCO caption JSON.
    """
    listing = Listing("coco")
    root = folder.resolve()
    for path in paths:
        images, annotations = _load_coco(path)
        texts: dict[Any, list[Any]] = {}
        for row in annotations:
            image_id = row.get("image_id")
            if isinstance(image_id, int | str):
                texts.setdefault(image_id, []).append(row.get("caption"))
        for number, image in enumerate(images):
            identity = image.get("id")
            own = texts.get(identity, []) if isinstance(identity, int | str) else []
            try:
                listing.entries.append(_coco_entry(image, own, root, config))
            except RefusedError as error:
                listing.refuse(f"{path.name}:images[{number}]", error.reason, error.detail)
    return listing
