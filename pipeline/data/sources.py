"""Where pictures and captions come from: generated drawings, folders, COCO-style JSON, raw tars."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Protocol

from cogview2.pipeline.config.data import GENERATED_SOURCE, DataConfig
from cogview2.pipeline.data.folder import find_coco, list_coco, list_jsonl, list_text_beside
from cogview2.pipeline.data.listing import Entry, Listing, Location, key_of
from cogview2.pipeline.data.open_files import OpenFiles
from cogview2.pipeline.data.records import RawPair, Refusal, RefusedError
from cogview2.pipeline.data.tars import find_tars, list_tars
from cogview2.pipeline.errors import DataError

CAPTIONS_FILE = "captions.jsonl"
_FORMAT = "listed-1"
_TOP_REASONS = 5


class Source(Protocol):
    """Numbered pairs of a picture and its captions."""

    keys: list[str]
    """Unique, `[A-Za-z0-9_-]{1,64}`, in a stable order."""
    splits: dict[str, list[int]]
    """`train`, `held_out` and, for drawings, `unseen` -> numbers of records."""
    refused: list[Refusal]
    """Found while listing."""
    fingerprint: str
    """Equal exactly when the same things were listed."""
    description: str

    def __len__(self) -> int: ...

    def read(self, index: int) -> RawPair:
        """Return record `index`; RefusedError for this record only."""
        ...


def _unique(listing: Listing) -> list[tuple[str, Entry]]:
    """Give every entry its key; a name that comes again (a picture with a second caption) gets a number."""
    seen: Counter[str] = Counter()
    keyed: dict[str, Entry] = {}
    for entry in listing.entries:
        seen[entry.name] += 1
        again = seen[entry.name]
        key = key_of(entry.name if again == 1 else f"{entry.name}~{again}")
        if key in keyed:
            listing.refuse(entry.name, "duplicate_key", f"the key {key} is taken; rename the file")
        else:
            keyed[key] = entry
    return list(keyed.items())


def _digest(entries: list[tuple[str, Entry]]) -> str:
    digest = hashlib.sha256(_FORMAT.encode())
    for key, entry in entries:
        line = json.dumps([key, entry.name, entry.image.size, entry.captions], sort_keys=True)
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def _content(location: Location, files: OpenFiles) -> str:
    try:
        return hashlib.sha256(files.read(location.path, location.offset, location.size)).hexdigest()
    except OSError:
        return f"unreadable:{location}"


def same_picture_groups(locations: list[Location]) -> list[list[int]]:
    """Group the numbers of byte-identical pictures. Only pictures of equal size are read."""
    by_size: dict[int, list[int]] = {}
    for index, location in enumerate(locations):
        by_size.setdefault(location.size, []).append(index)
    groups: list[list[int]] = []
    with OpenFiles() as files:
        for indices in by_size.values():
            places = {locations[index] for index in indices}
            digests = {place: _content(place, files) if len(places) > 1 else "" for place in places}
            by_content: dict[str, list[int]] = {}
            for index in indices:
                by_content.setdefault(digests[locations[index]], []).append(index)
            groups.extend(by_content.values())
    return groups


def split_held_out(keys: list[str], groups: list[list[int]], wanted: int, seed: int) -> dict[str, list[int]]:
    """Choose held-out records by a hash of seed and key, so that an added record moves few others.

    Args:
        keys: of all records.
        groups: a partition of their numbers; a group stays together.
        wanted: most records held out; at most a tenth of all is, and at least one when there are two groups.
        seed: of the run.

    Returns:
        `train` and `held_out`, ascending and disjoint. A source of a single group has nothing held out.
    """
    ranks = [hashlib.sha256(f"{seed}:{key}".encode()).hexdigest() for key in keys]
    ordered = sorted(groups, key=lambda group: min(ranks[index] for index in group))
    limit = min(wanted, max(1, len(keys) // 10))
    held_out: list[int] = []
    for group in ordered if len(groups) > 1 else []:
        if len(held_out) + len(group) <= limit:
            held_out.extend(group)
    if not held_out and len(groups) > 1:
        held_out = min(
            ordered, key=len
        )  # every picture has copies: the smallest group, although above the limit
    chosen = set(held_out)
    train = [index for index in range(len(keys)) if index not in chosen]
    return {"train": train, "held_out": sorted(held_out)}


class ListedSource:
    """A source of listed entries; picture bytes are read on demand, nothing is ever written."""

    def __init__(self, listing: Listing, config: DataConfig, seed: int, where: Path) -> None:
        keyed = _unique(listing)
        self._entries = [entry for _, entry in keyed]
        self._max_bytes = config.images.max_file_bytes
        self._files = OpenFiles()
        self.keys = [key for key, _ in keyed]
        self.refused = listing.refused
        if not self.keys:
            raise DataError(_nothing(where, self.refused))
        groups = same_picture_groups([entry.image for entry in self._entries])
        self.splits = split_held_out(self.keys, groups, config.held_out, seed)
        self.fingerprint = _digest(keyed)
        copies = len(self.keys) - len(groups)
        self.description = (
            f"{len(self.keys)} pairs ({listing.kind}), {len(self.splits['held_out'])} held out, "
            f"{copies} repeat another's picture, {len(self.refused)} refused"
        )

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int) -> RawPair:
        """Return record `index` with the bytes of its picture.

        Raises:
            RefusedError: reason image_file_too_large, image_unreadable or image_truncated.
        """
        entry = self._entries[index]
        size = entry.image.size
        if size > self._max_bytes:
            raise RefusedError(
                "image_file_too_large", f"{size} bytes; data.images.max_file_bytes is {self._max_bytes}"
            )
        try:
            image = self._files.read(entry.image.path, entry.image.offset, size)
        except OSError as error:
            raise RefusedError("image_unreadable", f"{entry.image.path}: {error.strerror}") from error
        if len(image) < size:
            raise RefusedError("image_truncated", f"{entry.image.path} has shrunk since it was listed")
        return RawPair(self.keys[index], image, dict(entry.captions), dict(entry.metadata))


def _nothing(where: Path, refused: list[Refusal]) -> str:
    if not refused:
        return (
            f"{where} holds no data; it needs {CAPTIONS_FILE}, pictures with <name>.txt beside them, "
            f"raw webdataset tars, or COCO caption JSON"
        )
    counts = Counter(refusal.reason for refusal in refused).most_common(_TOP_REASONS)
    reasons = ", ".join(f"{reason} {count}" for reason, count in counts)
    first = refused[0]
    return f"no usable record in {where}: {reasons}; first: {first.key}: {first.detail}; correct the data"


def _list(path: Path, config: DataConfig) -> Listing:
    if path.is_file():
        if path.suffix == ".jsonl":
            return list_jsonl(path, config)
        if path.suffix == ".json":
            return list_coco([path], path.parent, config)
        if ".tar" in path.suffixes or path.suffix == ".tgz":
            return list_tars([path], config)
        raise DataError(f"data.source {path} is neither a folder nor a .jsonl, .json or .tar file")
    if not path.is_dir():
        raise DataError(f"data.source {path} does not exist; name a folder, or `{GENERATED_SOURCE}`")
    if (path / CAPTIONS_FILE).is_file():
        return list_jsonl(path / CAPTIONS_FILE, config)
    tars = find_tars(path)
    if tars:
        return list_tars(tars, config)
    coco = find_coco(path)
    return list_coco(coco, path, config) if coco else list_text_beside(path, config)


def open_source(config: DataConfig, seed: int, base_dir: Path | None = None) -> Source:
    """List the source of a recipe.

    A folder is taken as what it holds, in this order: captions.jsonl; *.tar; coco_captions*.json or
    annotations/captions*.json; else pictures with <name>.txt beside them, in all sub-folders.

    Args:
        config: the recipe's `data`.
        seed: of the run; decides which records are held out.
        base_dir: what a relative `source` is relative to; by default the current folder.

    Raises:
        DataError: no such source, or not one usable record in it.
    """
    if config.source == GENERATED_SOURCE:
        from cogview2.pipeline.data.drawings import DrawingsSource

        return DrawingsSource(config, seed)
    path = Path(base_dir or ".") / Path(config.source).expanduser()
    try:
        listing = _list(path, config)
    except OSError as error:
        raise DataError(
            f"cannot read data.source {path}: {error.strerror}; check the path and its permissions"
        ) from error
    return ListedSource(listing, config, seed, path)
