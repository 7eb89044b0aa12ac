"""Writes shards: plain webdataset tars with deterministic bytes, and an index of byte ranges beside each."""

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from cogview2.pipeline import fsops
from cogview2.pipeline.data.records import TokenPair
from cogview2.pipeline.errors import DataError

INDEX_FORMAT = 1
KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")
_LANGUAGE = re.compile(r"[a-z]{2,8}")
_MODE = 0o644


@dataclass(frozen=True)
class ShardEntry:
    """One finished shard, as the manifest names it; `size` in bytes, both digests are sha256 in hex."""

    name: str
    size: int
    sha256: str
    samples: int
    index_sha256: str


@dataclass(frozen=True)
class SampleRange:
    """Where one sample lies in its tar: all its members with their headers; sha256 of exactly these bytes."""

    key: str
    offset: int
    length: int
    sha256: str
    has_superres: bool


def index_name(shard_name: str) -> str:
    """Return the name of the index of shard `<name>.tar`."""
    return shard_name.removesuffix(".tar") + ".index.json"


def npy_bytes(values: np.ndarray) -> bytes:
    """Return the .npy file of whole numbers as int32 [n].

    Raises:
        DataError: not whole numbers, not one axis, or beyond int32.
    """
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise DataError(f"a shard holds whole numbers along one axis, got {array.dtype} {array.shape}")
    limits = np.iinfo(np.int32)
    if array.size and (int(array.min()) < limits.min or int(array.max()) > limits.max):
        raise DataError(f"a shard holds int32, got a value of {int(np.abs(array).max())}")
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array.astype(np.int32), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _pair_members(pair: TokenPair) -> dict[str, bytes]:
    """Extension -> content of the files of one pair."""
    try:
        text = json.dumps(
            {"captions": pair.captions, "metadata": pair.metadata},
            sort_keys=True,
            separators=(",", ":"),
            allow_nan=False,
        )
    except (TypeError, ValueError) as error:
        raise DataError(f"metadata of {pair.key} is not plain finite JSON ({error}); leave it out") from error
    members = {"json": text.encode(), "base.npy": npy_bytes(pair.base_codes)}
    for language, ids in pair.text_ids.items():
        if not _LANGUAGE.fullmatch(language):
            raise DataError(f"language {language!r} of {pair.key} is not a code such as en")
        members[f"text_{language}.npy"] = npy_bytes(ids)
    if pair.superres_codes is not None:
        members["superres.npy"] = npy_bytes(pair.superres_codes)
    return members


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), _MODE  # mtime, uid and gid are 0 by default: equal content, equal bytes
    tar.addfile(info, io.BytesIO(data))


def _write(folder: Path, name: str, samples: Iterable[tuple[str, dict[str, bytes]]]) -> ShardEntry:
    if not KEY.fullmatch(name):
        raise DataError(f"shard name {name!r} must match {KEY.pattern}")
    buffer = io.BytesIO()
    spans: list[tuple[str, int, int, bool]] = []
    seen: set[str] = set()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples:
            if not KEY.fullmatch(key) or key in seen:
                raise DataError(f"key {key!r} in shard {name} must be new and match {KEY.pattern}")
            seen.add(key)
            start = buffer.tell()
            for extension in sorted(members):
                _add(tar, f"{key}.{extension}", members[extension])
            spans.append((key, start, buffer.tell() - start, "superres.npy" in members))
    data = buffer.getvalue()
    ranges = [
        SampleRange(key, start, length, hashlib.sha256(data[start : start + length]).hexdigest(), superres)
        for key, start, length, superres in spans
    ]
    shard_name = f"{name}.tar"
    document = {"format": INDEX_FORMAT, "shard": shard_name, "samples": [asdict(item) for item in ranges]}
    index = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    fsops.write_bytes(folder / shard_name, data)
    fsops.write_bytes(folder / index_name(shard_name), index)
    digests = hashlib.sha256(data).hexdigest(), hashlib.sha256(index).hexdigest()
    return ShardEntry(shard_name, len(data), digests[0], len(ranges), digests[1])


def write_shard(folder: Path, name: str, samples: Iterable[TokenPair]) -> ShardEntry:
    """Write `<name>.tar` and `<name>.index.json`, each whole or not at all; equal samples give equal bytes.

    Members of a sample: `<key>.json` (captions, metadata), `<key>.text_<language>.npy`, `<key>.base.npy` and,
    where there are high-resolution codes, `<key>.superres.npy`; all arrays int32 [n].

    Args:
        folder: existing folder.
        name: without extension.
        samples: a shard's worth; it is built in memory.

    Raises:
        DataError: a key, an array or metadata that cannot be stored.
        RunDirectoryError: the disk is full or read-only.
    """
    return _write(folder, name, ((pair.key, _pair_members(pair)) for pair in samples))


def write_text_shard(folder: Path, name: str, rows: Iterable[tuple[str, np.ndarray]]) -> ShardEntry:
    """Write a shard of pure-text rows (key, ids [S]): one member `<key>.text.npy` each; see `write_shard`."""
    return _write(folder, name, ((key, {"text.npy": npy_bytes(ids)}) for key, ids in rows))
