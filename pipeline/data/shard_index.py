"""Reads samples of shards by number: manifest, index of each shard, one verified read per sample."""

import hashlib
import io
import json
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
MANIFEST_FORMAT = 1
_SHARD_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}\.tar")
_OPEN_INDEXES = 64
_REMEDY = "delete the shards and run stage shard_dataset again"


def fingerprint_of(entries: Sequence[ShardEntry]) -> str:
    """Return the sha256 over names, sizes and digests of the shards in order: the dataset's identity."""
    text = json.dumps([asdict(entry) for entry in entries], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write_manifest(folder: Path, entries: Sequence[ShardEntry], extra: dict[str, Any]) -> str:
    """Write manifest.json, last of all: a folder without one is not a dataset.

    Args:
        folder: where the shards are.
        entries: all shards in their order.
        extra: further plain JSON, kept under `extra`; not part of the fingerprint.

    Returns:
        The fingerprint of the dataset.
    """
    names = [entry.name for entry in entries]
    if len(set(names)) != len(names):
        raise DataError(f"a shard is named twice in {folder / MANIFEST}: {sorted(names)}")
    fingerprint = fingerprint_of(entries)
    document = {
        "format": MANIFEST_FORMAT,
        "fingerprint": fingerprint,
        "shards": [asdict(entry) for entry in entries],
        "extra": extra,
    }
    fsops.write_json(folder / MANIFEST, document)
    return fingerprint


def _read_manifest(path: Path) -> tuple[list[ShardEntry], str, dict[str, Any]]:
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(
            f"{path} is missing: the shards were not finished; run stage shard_dataset"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path} ({error}); {_REMEDY}") from error
    try:
        if document["format"] != MANIFEST_FORMAT:
            raise DataError(
                f"{path} has format {document['format']!r}, known is {MANIFEST_FORMAT}; {_REMEDY}"
            )
        entries = [ShardEntry(**shard) for shard in document["shards"]]
        good = all(_SHARD_NAME.fullmatch(entry.name) and entry.samples >= 0 for entry in entries)
        fingerprint, extra = document["fingerprint"], dict(document["extra"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error!r}); {_REMEDY}") from error
    if not good or fingerprint != fingerprint_of(entries):
        raise DataError(f"{path} does not agree with its own fingerprint; {_REMEDY}")
    return entries, fingerprint, extra


def _check_files(folder: Path, entries: Sequence[ShardEntry]) -> None:
    """Name every missing or resized file at once."""
    problems: list[str] = []
    for entry in entries:
        if not (folder / index_name(entry.name)).is_file():
            problems.append(f"{index_name(entry.name)} is missing")
        path = folder / entry.name
        if not path.is_file():
            problems.append(f"{entry.name} is missing")
        elif path.stat().st_size != entry.size:
            problems.append(f"{entry.name} has {path.stat().st_size} bytes instead of {entry.size}")
    if problems:
        raise DataError(f"shards in {folder} are not whole: {'; '.join(problems)}; restore them or {_REMEDY}")


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
            DataError: no manifest, a damaged one, or shards missing or resized (all of them are named).
        """
        entries, fingerprint, extra = _read_manifest(folder / MANIFEST)
        _check_files(folder, entries)
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
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}; restore it or {_REMEDY}") from error
        if hashlib.sha256(data).hexdigest() != entry.index_sha256:
            raise DataError(
                f"{path} is damaged: its sha256 is not that of the manifest; restore it or {_REMEDY}"
            )
        document = json.loads(data)
        if document["format"] != INDEX_FORMAT:
            raise DataError(f"{path} has format {document['format']!r}, known is {INDEX_FORMAT}; {_REMEDY}")
        return [SampleRange(**item) for item in document["samples"]]

    def _members(self, index: int) -> tuple[str, dict[str, bytes]]:
        entry, place = self.locate(index)
        path = self.folder / entry.name
        try:
            data = self._files.read(path, place.offset, place.length)
        except OSError as error:
            raise DataError(f"cannot read sample {place.key} of {path}: {error.strerror}") from error
        if hashlib.sha256(data).hexdigest() != place.sha256:
            raise DataError(
                f"sample {place.key} of {path} is damaged (sha256 differs); restore the shard or {_REMEDY}"
            )
        members: dict[str, bytes] = {}
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for info in tar:
                file = tar.extractfile(info)
                assert file is not None  # write_shard stores plain files only, and the digest is right
                members[info.name.partition(".")[2]] = file.read()
        return place.key, members


def _array(data: bytes) -> np.ndarray:
    array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    return np.asarray(array, dtype=np.int32)
