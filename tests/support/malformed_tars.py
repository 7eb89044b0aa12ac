"""Odd, broken and hostile tars of pictures, built from a seed, each with the verdict that docs/data.md gives for it."""

import gzip
import lzma
import random
import tarfile
from collections.abc import Callable
from dataclasses import dataclass

from malformed_images import ACCEPTED, good

BLOCK = 512
Member = tuple[str, bytes]


@dataclass(frozen=True)
class TarKind:
    """One kind of tar. `kept` are the good neighbours that must be read from it all the same."""

    name: str
    verdict: str
    """ACCEPTED, or a reason that must be among the refusals."""
    make: Callable[[random.Random], bytes]
    kept: tuple[str, ...] = ("first", "last")


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    """Return one header block (more for long names), GNU format."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def member(name: str, data: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    """Return header and padded content."""
    return header(name, len(data), kind) + data + bytes(-len(data) % BLOCK)


def pair(rng: random.Random, key: str) -> bytes:
    """Return a good sample."""
    return member(f"{key}.png", good(rng)) + member(f"{key}.txt", f"picture {key}".encode())


def around(*middle: bytes) -> Callable[[random.Random], bytes]:
    """Return a tar of a good sample, the bytes in question, and another good sample."""
    return lambda rng: pair(rng, "first") + b"".join(middle) + pair(rng, "last") + bytes(2 * BLOCK)


def sample(*members: Member) -> Callable[[random.Random], bytes]:
    """Return a tar with these members between good samples; `@` as content stands for a good picture."""

    def make(rng: random.Random) -> bytes:
        return around(*(member(name, good(rng) if data == b"@" else data) for name, data in members))(rng)

    return make


def plain(rng: random.Random) -> bytes:
    """Return a tar with nothing wrong."""
    return around()(rng)


def _pax(**records: str) -> bytes:
    """Return a pax header for the next member."""
    body = b""
    for name, value in records.items():
        line = f" {name.replace('__', '.')}={value}\n".encode("utf-8", "surrogateescape")
        length = len(line) + 1
        while len(str(length)) + len(line) != length:
            length += 1
        body += str(length).encode() + line
    return member("pax", body, tarfile.XHDTYPE)


def _long_name(name: bytes) -> bytes:
    return member("././@LongLink", name + b"\0", tarfile.GNUTYPE_LONGNAME)


def _damage(at_block: int, offset: int, value: int) -> Callable[[random.Random], bytes]:
    """Change one byte of a header; its checksum is wrong then."""

    def make(rng: random.Random) -> bytes:
        data = bytearray(plain(rng))
        data[at_block * BLOCK + offset] ^= value
        return bytes(data)

    return make


def _cut(bytes_of_last: int) -> Callable[[random.Random], bytes]:
    """Cut the last sample: `bytes_of_last` of it are left."""
    return lambda rng: pair(rng, "first") + pair(rng, "last")[:bytes_of_last]


def _second_header(rng: random.Random) -> bytes:
    data = bytearray(plain(rng))
    at = len(pair(random.Random(0), "first"))
    data[at + 10] ^= 0x20
    return bytes(data)


def _sparse() -> bytes:
    """A GNU sparse member of 1 GiB that stores nothing."""
    head = bytearray(header("sparse.png", 0, tarfile.GNUTYPE_SPARSE))
    head[483:495] = b"10000000000\0"
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


def _huge_size(rng: random.Random) -> bytes:
    return pair(rng, "first") + header("huge.png", 8 * 1024**3) + bytes(3000)


def _negative(rng: random.Random) -> bytes:
    head = bytearray(header("negative.png"))
    head[124:136] = b"\xff" * 12
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return pair(rng, "first") + bytes(head) + bytes(2 * BLOCK)


def _duplicates(rng: random.Random) -> bytes:
    twice = member("twice.png", good(rng)) + member("twice.txt", b"one")
    return around(twice, pair(rng, "between"), twice)(rng)


_PAYLOAD = b"cos\nsystem\n(S'touch MARK'\ntR."

KINDS: tuple[TarKind, ...] = (
    TarKind("plain", ACCEPTED, plain),
    TarKind("folders as part of the key", ACCEPTED, sample(("a/x.png", b"@"), ("a/x.txt", b"x"))),
    TarKind(
        "leftovers of desktops",
        ACCEPTED,
        sample(("._first.png", b"x"), (".DS_Store", b"x"), ("Thumbs.db", b"x"), ("__MACOSX/a", b"x")),
    ),
    TarKind(
        "pickles beside a picture", ACCEPTED, sample(("x.png", b"@"), ("x.txt", b"x"), ("x.pkl", _PAYLOAD))
    ),
    TarKind(
        "200 bytes of name", ACCEPTED, sample(("\u732b" * 60 + ".png", b"@"), ("\u732b" * 60 + ".txt", b"x"))
    ),
    TarKind(
        "300 bytes of name, pax",
        ACCEPTED,
        lambda rng: around(
            *(
                _pax(path="y" * 300 + end) + member("y", data)
                for end, data in ((".png", good(rng)), (".txt", b"z"))
            )
        )(rng),
    ),
    TarKind("cut in a picture", "shard_truncated", _cut(BLOCK + 600), ("first",)),
    TarKind("cut in a header", "shard_truncated", _cut(100), ("first",)),
    TarKind("cut between two samples", "shard_truncated", _cut(0), ("first",)),
    TarKind("member of 8 GiB in a file of 3 KB", "shard_truncated", _huge_size, ("first",)),
    TarKind(
        "name of 8 GiB",
        "shard_corrupt",
        around(header("x", 8 * 1024**3, tarfile.GNUTYPE_LONGNAME)),
        ("first",),
    ),
    TarKind(
        "pax header of 8 GiB", "shard_corrupt", around(header("x", 8 * 1024**3, tarfile.XHDTYPE)), ("first",)
    ),
    TarKind(
        "pax header of noise", "shard_corrupt", around(member("x", b"999 a=b\n", tarfile.XHDTYPE)), ("first",)
    ),
    TarKind(
        "pax size of letters", "shard_corrupt", around(_pax(size="many"), member("x.png", b"x")), ("first",)
    ),
    TarKind("negative size", "shard_corrupt", _negative, ("first",)),
    TarKind("first header damaged", "shard_corrupt", _damage(0, 3, 0x40), ()),
    TarKind("later header damaged", "shard_corrupt", _second_header, ("first",)),
    TarKind("noise", "shard_corrupt", lambda rng: rng.randbytes(4096), ()),
    TarKind("HTML page", "shard_corrupt", lambda _: b"<!DOCTYPE html><html>404</html>" * 40, ()),
    TarKind("200 bytes", "shard_corrupt", lambda rng: plain(rng)[:200], ()),
    TarKind("no bytes", "shard_empty", lambda _: b"", ()),
    TarKind("zeros", "shard_empty", lambda _: bytes(10_240), ()),
    TarKind("no samples", "shard_empty", lambda _: header("folder/", 0, tarfile.DIRTYPE) + bytes(1024), ()),
    TarKind("gzip", "shard_compressed", lambda rng: gzip.compress(plain(rng)), ()),
    TarKind("xz", "shard_compressed", lambda rng: lzma.compress(plain(rng)), ()),
    TarKind("zip", "shard_compressed", lambda rng: b"PK\x03\x04" + rng.randbytes(2000), ()),
    TarKind("two archives in one", "shard_trailing_data", lambda rng: plain(rng) + pair(rng, "hidden")),
    TarKind("name upwards", "member_unsafe_name", sample(("../x.png", b"@"), ("../x.txt", b"x"))),
    TarKind("name upwards inside", "member_unsafe_name", sample(("a/../../x.png", b"@"))),
    TarKind("absolute name", "member_unsafe_name", sample(("/tmp/EVIL_x.png", b"@"))),
    TarKind("name with a line break", "member_unsafe_name", sample(("a\nb.png", b"@"))),
    TarKind("name with an escape sequence", "member_unsafe_name", sample(("a\x1b[2Jb.png", b"@"))),
    TarKind("name with backslashes", "member_unsafe_name", sample(("a\\..\\x.png", b"@"))),
    TarKind("name that reads backwards", "member_unsafe_name", sample(("\u202egnp.x.png", b"@"))),
    TarKind("name that is not UTF-8", "member_unsafe_name", sample(("\udcff.png", b"@"))),
    TarKind(
        "long name upwards",
        "member_unsafe_name",
        around(_long_name(b"../" * 60 + b"x.png"), member("x", b"x")),
    ),
    TarKind(
        "pax name upwards", "member_unsafe_name", around(_pax(path="../../x.png"), member("x.png", b"x"))
    ),
    TarKind(
        "pax name absolute", "member_unsafe_name", around(_pax(path="/etc/x.png"), member("x.png", b"x"))
    ),
    TarKind(
        "symbolic link", "member_not_regular", around(header("x.png", 0, tarfile.SYMTYPE, "/etc/passwd"))
    ),
    TarKind("hard link", "member_not_regular", around(header("x.png", 0, tarfile.LNKTYPE, "../secret"))),
    TarKind(
        "file below a link",
        "member_not_regular",
        around(header("d", 0, tarfile.SYMTYPE, "/tmp"), member("d/EVIL_x.png", b"x")),
    ),
    TarKind("named pipe", "member_not_regular", around(header("x.png", 0, tarfile.FIFOTYPE))),
    TarKind("device", "member_not_regular", around(header("x.png", 0, tarfile.CHRTYPE))),
    TarKind("sparse file of 1 GiB", "member_not_regular", around(_sparse())),
    TarKind(
        "sparse file, pax",
        "member_not_regular",
        around(_pax(GNU__sparse__major="1", GNU__sparse__realsize="1073741824"), member("x.png", b"x")),
    ),
    TarKind("key twice", "duplicate_key", _duplicates, ("first", "last", "between", "twice")),
    TarKind("picture without caption", "sample_missing_caption", sample(("x.png", b"@"))),
    TarKind(
        "caption compressed to 200 MiB",
        "sample_missing_caption",
        sample(("x.png", b"@"), ("x.txt.gz", b"\x1f")),
    ),
    TarKind("caption without picture", "sample_missing_image", sample(("x.txt", b"x"))),
    TarKind(
        "keys with dots",
        "sample_dotted_key",
        sample(("v1.0.png", b"@"), ("v1.0.txt", b"x"), ("v1.9.png", b"@"), ("v1.9.txt", b"x")),
    ),
    TarKind(
        "further pictures of a sample",
        ACCEPTED,
        sample(("x.png", b"@"), ("x.txt", b"x"), ("x.seg.png", b"@")),
    ),
    TarKind(
        "two pictures", "sample_ambiguous_image", sample(("x.png", b"@"), ("x.jpg", b"@"), ("x.txt", b"x"))
    ),
    TarKind("caption that is not UTF-8", "caption_invalid_utf8", sample(("x.png", b"@"), ("x.txt", b"\xff"))),
    TarKind(
        "caption of 5 MiB", "caption_too_long", sample(("x.png", b"@"), ("x.txt", b"x" * 5 * 1024 * 1024))
    ),
    TarKind("caption of spaces", "caption_empty", sample(("x.png", b"@"), ("x.txt", b"  "))),
    TarKind("JSON that is none", "record_bad_json", sample(("x.png", b"@"), ("x.json", b"{"))),
    TarKind(
        "JSON nested 100,000 deep", "record_bad_json", sample(("x.png", b"@"), ("x.json", b"[" * 100_000))
    ),
    TarKind("JSON list", "record_wrong_type", sample(("x.png", b"@"), ("x.json", b'["a"]'))),
)
