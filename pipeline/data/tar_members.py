"""The members of a tar file, from its headers alone: nothing is extracted, no size is believed."""

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cogview2.pipeline.data.records import RefusedError

BLOCK = tarfile.BLOCKSIZE
_ZERO_BLOCK = bytes(BLOCK)
_MAX_EXTENSION_BYTES = 1024 * 1024
_COMPRESSED: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"PK\x03\x04", "zip"),
)
_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_WITHOUT_DATA = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.DIRTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.FIFOTYPE,
)
_PAX_RECORD = re.compile(rb"(\d{1,7}) ")


@dataclass(frozen=True)
class Member:
    """One member: `kind` is `file`, `folder`, `link`, `other` or `cut`; data at [offset, offset + size)."""

    name: str
    kind: str
    offset: int
    size: int


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _kind(info: tarfile.TarInfo, pax: dict[str, str]) -> str:
    if info.type in _PLAIN:
        return "other" if any(name.startswith("GNU.sparse.") for name in pax) else "file"
    if info.type == tarfile.DIRTYPE:
        return "folder"
    return "link" if info.type in (tarfile.LNKTYPE, tarfile.SYMTYPE) else "other"


def _pax_records(data: bytes) -> dict[str, str]:
    """Parse the records `<length> <name>=<value>\\n` of a pax header."""
    records: dict[str, str] = {}
    at = 0
    while at < len(data) and data[at] != 0:
        match = _PAX_RECORD.match(data, at)
        length = int(match[1]) if match else 0
        record = data[match.end() : at + length] if match else b""
        if not record.endswith(b"\n") or b"=" not in record or at + length > len(data):
            raise RefusedError("shard_corrupt", "a pax header is damaged")
        name, value = record[:-1].split(b"=", 1)
        records[name.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        at += length
    return records


class TarWalk:
    """Walks the headers of one open tar file of `length` bytes."""

    def __init__(self, file: BinaryIO, length: int) -> None:
        self._file = file
        self._length = length
        self._at = 0

    def members(self) -> Iterator[Member]:
        """Yield every member in order; the one that the end of the file cuts has kind `cut`.

        Raises:
            RefusedError: reason shard_empty, shard_compressed, shard_corrupt, shard_truncated or
                shard_trailing_data; after the members before the fault have been yielded.
        """
        self._check_start()
        name: str | None = None
        pax: dict[str, str] = {}
        while (info := self._header()) is not None:
            if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
                text = self._extension(info).split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
                name = text if info.type == tarfile.GNUTYPE_LONGNAME else name
                continue
            if info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                pax = _pax_records(self._extension(info))
                continue
            if info.type == tarfile.XGLTYPE:
                self._extension(info)
                continue
            member = self._member(info, pax.get("path", name or info.name), pax)
            yield member
            if member.kind == "cut":
                left = self._length - member.offset
                detail = f"{member.name!r} claims {member.size} bytes, {left} are left; fetch it again"
                raise RefusedError("shard_truncated", detail)
            name, pax = None, {}
        self._check_end()

    def _read(self, size: int) -> bytes:
        self._file.seek(self._at)
        data = self._file.read(size)
        self._at += len(data)
        return data

    def _check_start(self) -> None:
        start = self._read(BLOCK)
        self._at = 0
        if not start:
            raise RefusedError("shard_empty", "the file has no bytes")
        method = next((name for magic, name in _COMPRESSED if start.startswith(magic)), None)
        if method:
            raise RefusedError(
                "shard_compressed", f"{method}; unpack it to a plain .tar, reading needs random access"
            )

    def _header(self) -> tarfile.TarInfo | None:
        """Read one header block; None at the end mark."""
        start = self._at
        block = self._read(BLOCK)
        if block == _ZERO_BLOCK:
            return None
        if len(block) < BLOCK:
            reason = "shard_corrupt" if start == 0 else "shard_truncated"
            raise RefusedError(reason, f"ends at byte {self._at} without the end mark")
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as error:
            raise RefusedError("shard_corrupt", f"no tar header at byte {start}: {error}") from error
        if info.size < 0:
            raise RefusedError("shard_corrupt", f"negative size in the header at byte {start}")
        extended = info.type == tarfile.GNUTYPE_SPARSE and block[482] != 0
        while extended:
            more = self._read(BLOCK)
            extended = len(more) == BLOCK and more[504] != 0
        return info

    def _extension(self, info: tarfile.TarInfo) -> bytes:
        """Read the data of a header that describes the next member."""
        if info.size > _MAX_EXTENSION_BYTES:
            raise RefusedError("shard_corrupt", f"an extended header claims {info.size} bytes")
        data = self._read(_padded(info.size))
        if len(data) < info.size:
            raise RefusedError("shard_truncated", "ends inside an extended header")
        return data[: info.size]

    def _member(self, info: tarfile.TarInfo, name: str, pax: dict[str, str]) -> Member:
        size = 0 if info.type in _WITHOUT_DATA else info.size
        if "size" in pax and info.type not in _WITHOUT_DATA:
            if not re.fullmatch(r"\d{1,15}", pax["size"]):
                raise RefusedError("shard_corrupt", f"{name!r}: a pax header gives size {pax['size'][:40]!r}")
            size = int(pax["size"])
        offset = self._at
        if offset + size > self._length:
            return Member(name, "cut", offset, size)
        self._at = offset + _padded(size)
        kind = "folder" if name.endswith("/") and info.type in _PLAIN else _kind(info, pax)
        return Member(name, kind, offset, size)

    def _check_end(self) -> None:
        """After the end mark only zeros may follow: anything else would be overlooked by every tar reader."""
        while data := self._read(1024 * 1024):
            if data.count(0) != len(data):
                raise RefusedError("shard_trailing_data", f"data after the end mark, before byte {self._at}")


def walk_tar(path: Path) -> Iterator[Member]:
    """Yield the members of the tar file `path`; see `TarWalk.members`. OSError as the system gives it."""
    with open(path, "rb") as file:
        yield from TarWalk(file, path.stat().st_size).members()
