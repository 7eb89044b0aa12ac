"""Reads samples of shards by number: manifest, index of each shard, one verified read per sample.

No byte is believed: the manifest has its own digest and those of the indexes, an index those of its samples, and what
lies behind the last sample must be zeros. Threads may share an index.
"""

import hashlib
import io
import json
import os
import re
import tarfile
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from cogview2.pipeline import fsops
from cogview2.pipeline.data.open_files import OpenFiles
from cogview2.pipeline.data.records import TokenPair
from cogview2.pipeline.data.shard_writer import INDEX_FORMAT, SampleRange, ShardEntry, index_name
from cogview2.pipeline.errors import DataError

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 2
_FORMAT_WITHOUT_DIGEST = 1
_SHARD_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}\.tar")
_OPEN_INDEXES = 64
_REMEDY = "delete the shards and run stage shard_dataset again"


def _sha256_of(value: Any) -> str:
    """Return the sha256 of plain JSON, whatever its layout in a file."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def fingerprint_of(entries: Sequence[ShardEntry]) -> str:
    """Return the sha256 over names, sizes and digests of the shards in order: the dataset's identity."""
    return _sha256_of([asdict(entry) for entry in entries])


def write_manifest(folder: Path, entries: Sequence[ShardEntry], extra: dict[str, Any]) -> str:
    """Write manifest.json, last of all: a folder without one is not a dataset.

    Shards of an earlier attempt with other settings, and temporary files of a killed one, are removed before: stock
    readers take every tar that they find.

    Args:
        folder: where the shards are.
        entries: all shards in their order.
        extra: further plain JSON, kept under `extra`; not part of the fingerprint.

    Returns:
        The fingerprint of the dataset.
    """
    twice = _duplicates(entries)
    if twice:
        raise DataError(f"shards stand twice in {folder / MANIFEST}: {'; '.join(twice)}; {_REMEDY}")
    for name in _foreign(folder, entries):
        fsops.remove_tree(folder / name)
    for pattern in (".tmp.*", ".trash.*"):
        for path in folder.glob(pattern):
            fsops.discard(path)
    fingerprint = fingerprint_of(entries)
    document = {
        "format": MANIFEST_FORMAT,
        "fingerprint": fingerprint,
        "shards": [asdict(entry) for entry in entries],
        "extra": extra,
    }
    fsops.write_json(folder / MANIFEST, document | {"sha256": _sha256_of(document)})
    return fingerprint


def _duplicates(entries: Sequence[ShardEntry]) -> list[str]:
    """Name the shards that stand twice: by name, or by content (keys are unique, so only empty shards are alike)."""
    problems: list[str] = []
    names: set[str] = set()
    contents: dict[str, str] = {}
    for entry in entries:
        if entry.name in names:
            problems.append(f"{entry.name} is named twice")
        elif entry.samples and entry.sha256 in contents:
            problems.append(f"{entry.name} is a copy of {contents[entry.sha256]}")
        names.add(entry.name)
        contents.setdefault(entry.sha256, entry.name)
    return problems


def _foreign(folder: Path, entries: Sequence[ShardEntry]) -> list[str]:
    """Name the shards and indexes in `folder` that are not of `entries`; hidden files are nobody's."""
    ours = {name for entry in entries for name in (entry.name, index_name(entry.name))}
    shards = (name for name in os.listdir(folder) if name.endswith((".tar", ".index.json")))
    return sorted(name for name in shards if name not in ours and not name.startswith("."))


def _read_manifest(path: Path) -> tuple[list[ShardEntry], str, dict[str, Any]]:
    try:
        document = json.loads(_read_plain(path))
    except FileNotFoundError as error:
        raise DataError(
            f"{path} is missing: the shards were not finished; run stage shard_dataset"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path} ({error}); {_REMEDY}") from error
    try:
        _check_document(document, path)
        entries = [ShardEntry(**shard) for shard in document["shards"]]
        good = all(_SHARD_NAME.fullmatch(entry.name) and entry.samples >= 0 for entry in entries)
        fingerprint, extra = document["fingerprint"], dict(document["extra"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error!r}); {_REMEDY}") from error
    if not good or fingerprint != fingerprint_of(entries):
        raise DataError(f"{path} does not agree with its own fingerprint; {_REMEDY}")
    return entries, fingerprint, extra


def _read_plain(path: Path) -> bytes:
    """Return the content of a file that is no link: a link may lead to what nobody has checked."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        return file.read()


def _check_document(document: dict[str, Any], path: Path) -> None:
    """Compare the manifest with its own digest; manifests of the first format have none."""
    version = document["format"]
    if version not in (MANIFEST_FORMAT, _FORMAT_WITHOUT_DIGEST):
        raise DataError(f"{path} has format {version!r}, known is {MANIFEST_FORMAT}; {_REMEDY}")
    rest = {name: value for name, value in document.items() if name != "sha256"}
    if (version == _FORMAT_WITHOUT_DIGEST) != ("sha256" not in document) or (
        version == MANIFEST_FORMAT and document["sha256"] != _sha256_of(rest)
    ):
        raise DataError(f"{path} is damaged: it does not agree with its own sha256; restore it or {_REMEDY}")


def _file_problem(path: Path, size: int | None) -> str | None:
    """Return what is wrong with one file of a shard, without reading it."""
    if path.is_symlink():
        return f"{path.name} is a symbolic link"
    if not path.is_file():
        return f"{path.name} is missing"
    found = path.stat().st_size
    return f"{path.name} has {found} bytes instead of {size}" if size not in (None, found) else None


def _problems(folder: Path, entries: Sequence[ShardEntry]) -> list[str]:
    """Name everything that can be seen to be wrong without reading the shards: all of it, not the first only."""
    problems = [*_duplicates(entries), *(f"{name} is foreign" for name in _foreign(folder, entries))]
    for entry in entries:
        found = (
            _file_problem(folder / entry.name, entry.size),
            _file_problem(folder / index_name(entry.name), None),
        )
        problems.extend(problem for problem in found if problem is not None)
    return problems


class ShardIndex:
    """The samples of a folder of shards, numbered in the order of the manifest. Threads may share one."""

    def __init__(
        self, folder: Path, entries: Sequence[ShardEntry], fingerprint: str, extra: dict[str, Any]
    ) -> None:
        self.folder = folder
        self.entries = list(entries)
        self.fingerprint = fingerprint
        self.extra = extra
        self.sizes = [entry.samples for entry in entries]
        """Samples of each shard."""
        self._ends = list(accumulate(self.sizes))
        self._files = OpenFiles()
        self._indexes: OrderedDict[int, list[SampleRange]] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def load(cls, folder: Path) -> "ShardIndex":
        """Read the manifest of `folder` and check that every shard is there with its size.

        Raises:
            DataError: no manifest, a damaged one, or shards missing, resized, linked, foreign or doubled (all of them
                are named).
        """
        entries, fingerprint, extra = _read_manifest(folder / MANIFEST)
        problems = _problems(folder, entries)
        if problems:
            raise DataError(
                f"shards in {folder} are not whole: {'; '.join(problems)}; restore them or {_REMEDY}"
            )
        return cls(folder, entries, fingerprint, extra)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def locate(self, index: int) -> tuple[ShardEntry, SampleRange]:
        """Return the shard of sample `index` and its place in it; IndexError outside [0, len)."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = bisect_right(self._ends, index)
        return self.entries[shard], self._ranges(shard)[index - self._ends[shard] + self.sizes[shard]]

    def read(self, index: int) -> TokenPair:
        """Return pair `index`, verified against its digest.

        Raises:
            DataError: the bytes on disk are not those that were written; names shard, key and remedy.
        """
        key, members = self._members(index)
        record = json.loads(members.pop("json"))
        arrays = {name.removesuffix(".npy"): _array(data) for name, data in members.items()}
        base, superres = arrays.pop("base"), arrays.pop("superres", None)
        text_ids = {name.removeprefix("text_"): ids for name, ids in sorted(arrays.items())}
        return TokenPair(key, text_ids, base, superres, record["captions"], record["metadata"])

    def read_text(self, index: int) -> np.ndarray:
        """Return the ids int32 [S] of pure-text row `index`; see `read`."""
        return _array(self._members(index)[1]["text.npy"])

    def verify(self) -> None:
        """Read all shards whole and compare their digests.

        Raises:
            DataError: naming every damaged shard.
        """
        bad = [e.name for e in self.entries if fsops.sha256_file(self.folder / e.name) != e.sha256]
        if bad:
            raise DataError(f"damaged shards in {self.folder}: {', '.join(bad)}; restore them or {_REMEDY}")

    def close(self) -> None:
        """Close the open shards; a later read opens them again."""
        self._files.close()

    def _ranges(self, shard: int) -> list[SampleRange]:
        with self._lock:
            if shard not in self._indexes:
                self._indexes[shard] = self._load_ranges(self.entries[shard])
            self._indexes.move_to_end(shard)
            while len(self._indexes) > _OPEN_INDEXES:
                self._indexes.popitem(last=False)
            return self._indexes[shard]

    def _load_ranges(self, entry: ShardEntry) -> list[SampleRange]:
        path = self.folder / index_name(entry.name)
        try:
            data = _read_plain(path)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}; restore it or {_REMEDY}") from error
        _check_index(data, entry, path)
        document = json.loads(data)
        if document["format"] != INDEX_FORMAT:
            raise DataError(f"{path} has format {document['format']!r}, known is {INDEX_FORMAT}; {_REMEDY}")
        ranges = [SampleRange(**item) for item in document["samples"]]
        end = ranges[-1].offset + ranges[-1].length if ranges else 0
        _check_tail(self._bytes(entry, end, entry.size - end + 1), entry.size - end, self.folder / entry.name)
        return ranges

    def _bytes(self, entry: ShardEntry, offset: int, length: int) -> bytes:
        path = self.folder / entry.name
        try:
            return self._files.read(path, offset, length)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}; restore it or {_REMEDY}") from error

    def _members(self, index: int) -> tuple[str, dict[str, bytes]]:
        entry, place = self.locate(index)
        data = self._bytes(entry, place.offset, place.length)
        _check_sample(data, place, self.folder / entry.name)
        members: dict[str, bytes] = {}
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for info in tar:
                file = tar.extractfile(info)
                assert file is not None  # write_shard stores plain files only, and the digest is right
                members[info.name.partition(".")[2]] = file.read()
        return place.key, members


def _check_index(data: bytes, entry: ShardEntry, path: Path) -> None:
    if hashlib.sha256(data).hexdigest() != entry.index_sha256:
        raise DataError(f"{path} is damaged: its sha256 is not that of the manifest; restore it or {_REMEDY}")


def _check_tail(tail: bytes, length: int, path: Path) -> None:
    """Behind the last sample there are only the zeros of the end mark; the digests of the samples do not cover them."""
    if len(tail) != length or any(tail):
        raise DataError(f"{path} is damaged behind its last sample; restore it or {_REMEDY}")


def _check_sample(data: bytes, place: SampleRange, path: Path) -> None:
    if hashlib.sha256(data).hexdigest() != place.sha256:
        raise DataError(
            f"sample {place.key} of {path} is damaged (sha256 differs); restore the shard or {_REMEDY}"
        )


def _array(data: bytes) -> np.ndarray:
    array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    return np.asarray(array, dtype=np.int32)
