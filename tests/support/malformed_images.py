"""Odd, broken and hostile picture files, built from a seed, each with the verdict that docs/data.md gives for it."""

import io
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

ACCEPTED = "accepted"
MIN_SIDE = 8
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Kind:
    """One kind of malformed (or odd but good) input."""

    name: str
    verdict: str
    """ACCEPTED, or the reason of the refusal."""
    make: Callable[[random.Random], bytes]


def noise(rng: random.Random, width: int = 48, height: int = 40, mode: str = "RGB") -> Image.Image:
    """Return a picture that compresses badly, so that a cut takes pixels away."""
    generator = np.random.default_rng(rng.randrange(2**32))
    pixels = generator.integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    """Return the file of a picture."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def good(rng: random.Random, kind: str = "PNG") -> bytes:
    """Return a picture with nothing wrong."""
    return encode(noise(rng), kind)


def chunk(name: bytes, data: bytes, crc: int | None = None) -> bytes:
    """Return one PNG chunk, with a wrong checksum where one is given."""
    return (
        struct.pack(">I", len(data))
        + name
        + data
        + struct.pack(">I", zlib.crc32(name + data) if crc is None else crc)
    )


def png(width: int, height: int, rows: bytes | None = None, *, depth: int = 8, colour: int = 2) -> bytes:
    """Return a PNG of black rows, or of none where `rows` is empty; sizes may be lies."""
    if rows is None:
        per_row = 1 + (width * depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour] + 7) // 8
        packer = zlib.compressobj(9)
        rows = (
            b"".join([packer.compress(bytes(per_row * 64)) for _ in range(-(-height // 64))]) + packer.flush()
        )
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return _PNG + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def _cut(kind: str, share: float) -> Callable[[random.Random], bytes]:
    def make(rng: random.Random) -> bytes:
        data = good(rng, kind)
        return data[: int(len(data) * share)]

    return make


def _as(kind: str, mode: str = "RGB", **options: object) -> Callable[[random.Random], bytes]:
    return lambda rng: encode(noise(rng, mode=mode), kind, **options)


def _start(start: bytes, length: int = 2000) -> Callable[[random.Random], bytes]:
    return lambda rng: start + rng.randbytes(length)


def _damaged_png(rng: random.Random) -> bytes:
    data = bytearray(good(rng))
    data[len(data) // 2] ^= 0xFF
    return bytes(data)


def _bad_ihdr(rng: random.Random) -> bytes:
    data = bytearray(good(rng))
    data[29] ^= 1  # the checksum of IHDR
    return bytes(data)


def _no_idat(_: random.Random) -> bytes:
    return _PNG + chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 32, 8, 2, 0, 0, 0)) + chunk(b"IEND", b"")


def _text_bomb(rng: random.Random) -> bytes:
    data = good(rng)
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(64 * 1024 * 1024), 9))
    return data[:33] + bomb + data[33:]


def _profile_bomb(rng: random.Random) -> bytes:
    data = good(rng)
    bomb = chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(64 * 1024 * 1024), 9))
    return data[:33] + bomb + data[33:]


def _many_chunks(rng: random.Random) -> bytes:
    data = good(rng)
    return data[:33] + chunk(b"tEXt", b"a\0b") * 20_000 + data[33:]


def _jpeg_size(width: int, height: int) -> Callable[[random.Random], bytes]:
    """A JPEG whose header claims another size than its data has."""

    def make(rng: random.Random) -> bytes:
        data = bytearray(good(rng, "JPEG"))
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", height, width)
        return bytes(data)

    return make


def _bit_rot(rng: random.Random) -> bytes:
    """Changed bytes of the scan; 0xff would begin a marker."""
    data = bytearray(good(rng, "JPEG"))
    start = data.index(b"\xff\xda") + 20
    for _ in range(10):
        at = rng.randrange(start, len(data) - 4)
        if 0xFF not in data[at - 1 : at + 2]:
            data[at] = rng.randrange(0xFF)
    return bytes(data)


def _jpeg_without_scan(rng: random.Random) -> bytes:
    data = good(rng, "JPEG")
    return data[: data.index(b"\xff\xda")] + b"\xff\xd9"


def _jpeg_without_tables(rng: random.Random) -> bytes:
    data = good(rng, "JPEG")
    at = data.index(b"\xff\xdb")
    length = struct.unpack(">H", data[at + 2 : at + 4])[0]
    return data[:at] + data[at + 2 + length :].replace(b"\xff\xdb", b"\xff\xfe")


def _gif_size(rng: random.Random) -> bytes:
    data = good(rng, "GIF")
    return data[:6] + struct.pack("<HH", 65535, 65535) + data[10:]


def _bmp_size(_: random.Random) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, 100_000, 100_000, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + head


def _webp_size(rng: random.Random) -> bytes:
    body = b"VP8X" + struct.pack("<I", 10) + bytes(4) + b"\xff\x3f\0" + b"\xff\x3f\0"
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body + rng.randbytes(64)


def _tiff(*entries: tuple[int, int, int, int], following: int = 0) -> bytes:
    """Return a TIFF of one directory of (tag, type, count, value)."""
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + struct.pack("<I", following) + bytes(64)


def _tiff_size(_: random.Random) -> bytes:
    sides = [(256, 4, 1, 100_000), (257, 4, 1, 100_000), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    return _tiff(*sides, (273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, 100_000), (279, 4, 1, 10))


def _tiff_outside(_: random.Random) -> bytes:
    sides = [(256, 4, 1, 32), (257, 4, 1, 32), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    return _tiff(*sides, (273, 4, 1, 0x7FFFFFFF), (277, 3, 1, 1), (278, 4, 1, 32), (279, 4, 1, 1024))


def _tiff_loop(rng: random.Random) -> bytes:
    data = encode(noise(rng, mode="L"), "TIFF")
    offset = struct.unpack("<I", data[4:8])[0]
    count = struct.unpack("<H", data[offset : offset + 2])[0]
    at = offset + 2 + 12 * count
    return data[:at] + struct.pack("<I", offset) + data[at + 4 :]  # the next directory is this one again


def _exif(value: bytes) -> Callable[[random.Random], bytes]:
    return lambda rng: encode(noise(rng), "JPEG", exif=value)


def _rotated(rng: random.Random) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(noise(rng), "JPEG", exif=exif)


def _animation(kind: str) -> Callable[[random.Random], bytes]:
    def make(rng: random.Random) -> bytes:
        frames = [noise(rng) for _ in range(3)]
        return encode(frames[0], kind, save_all=True, append_images=frames[1:])

    return make


def _icc(rng: random.Random) -> bytes:
    return encode(noise(rng), "JPEG", icc_profile=rng.randbytes(3000))


KINDS: tuple[Kind, ...] = (
    Kind("plain PNG", ACCEPTED, good),
    Kind("grey JPEG", ACCEPTED, _as("JPEG", "L")),
    Kind("CMYK JPEG", ACCEPTED, _as("JPEG", "CMYK")),
    Kind("progressive JPEG", ACCEPTED, _as("JPEG", progressive=True)),
    Kind("JPEG with bytes after its end", ACCEPTED, lambda r: good(r, "JPEG") + r.randbytes(500)),
    Kind("JPEG on its side (EXIF)", ACCEPTED, _rotated),
    Kind("JPEG with a broken EXIF", ACCEPTED, _exif(b"Exif\0\0MM\0*\xff\xff\xff\xff")),
    Kind("JPEG with a broken colour profile", ACCEPTED, _icc),
    Kind("JPEG with changed pixel data", ACCEPTED, _bit_rot),
    Kind("JPEG with more rows in its header than in its data", ACCEPTED, _jpeg_size(48, 56)),
    Kind("PNG of 1 bit", ACCEPTED, _as("PNG", "1")),
    Kind("PNG with transparency", ACCEPTED, _as("PNG", "RGBA")),
    Kind("PNG with 20,000 text chunks", ACCEPTED, _many_chunks),
    Kind("PNG of 16-bit grey", ACCEPTED, lambda _: png(32, 32, depth=16, colour=0)),
    Kind("lossless WebP", ACCEPTED, _as("WEBP", lossless=True)),
    Kind("animated WebP", ACCEPTED, _animation("WEBP")),
    Kind("animated GIF", ACCEPTED, _animation("GIF")),
    Kind("animated PNG", ACCEPTED, _animation("PNG")),
    Kind("BMP", ACCEPTED, _as("BMP")),
    Kind("TIFF with LZW", ACCEPTED, _as("TIFF", compression="tiff_lzw")),
    Kind("TIFF whose directories go round in a circle", ACCEPTED, _tiff_loop),
    Kind("no bytes", "image_empty", lambda _: b""),
    Kind("HTML page", "image_not_an_image", lambda _: b"<!DOCTYPE html><html><svg></svg></html>"),
    Kind("noise", "image_not_an_image", lambda r: b"\x07" + r.randbytes(3000)),
    Kind("one byte", "image_not_an_image", lambda _: b"\xff"),
    Kind("zeros", "image_not_an_image", lambda _: bytes(4096)),
    Kind("JSON", "image_not_an_image", lambda _: b'{"error": "rate limit"}'),
    Kind("gzip", "image_not_an_image", _start(b"\x1f\x8b\x08\0")),
    Kind("PNM", "image_not_an_image", lambda _: b"P6 8 8 255 " + bytes(192)),
    Kind("ELF program", "image_not_an_image", _start(b"\x7fELF\x02\x01\x01")),
    Kind("pickle", "image_not_an_image", lambda _: b"\x80\x04cos\nsystem\n(S'touch MARK'\ntR."),
    Kind("shell script", "image_not_an_image", lambda _: b"#!/bin/sh\ntouch MARK\n"),
    Kind("SVG", "image_unsupported_format", lambda _: b"<?xml version='1.0'?><svg width='9' height='9'/>"),
    Kind("HEIC", "image_unsupported_format", _start(b"\0\0\0\x18ftypheic\0\0\0\0")),
    Kind("AVIF", "image_unsupported_format", _start(b"\0\0\0\x20ftypavif\0\0\0\0")),
    Kind("MP4", "image_unsupported_format", _start(b"\0\0\0\x18ftypisom\0\0\0\0")),
    Kind("EPS", "image_unsupported_format", lambda _: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"),
    Kind("PDF", "image_unsupported_format", _start(b"%PDF-1.7\n")),
    Kind("PSD", "image_unsupported_format", _start(b"8BPS\0\x01")),
    Kind("ICO", "image_unsupported_format", _start(b"\0\0\x01\0\x01\0")),
    Kind("JPEG 2000", "image_unsupported_format", _start(b"\0\0\0\x0cjP  \r\n\x87\n")),
    Kind("JPEG XL", "image_unsupported_format", _start(b"\xff\x0a")),
    Kind("TIFF of floats", "image_unsupported_format", _as("TIFF", "F")),
    Kind("TIFF of 32-bit numbers", "image_unsupported_format", _as("TIFF", "I")),
    Kind("JPEG cut in its header", "image_corrupt", lambda r: good(r, "JPEG")[:20]),
    Kind("JPEG without a scan", "image_corrupt", _jpeg_without_scan),
    Kind("JPEG without tables", "image_corrupt", _jpeg_without_tables),
    Kind("JPEG of height 0", "image_corrupt", _jpeg_size(48, 0)),
    Kind("PNG signature alone", "image_corrupt", lambda _: _PNG),
    Kind("PNG with a wrong header checksum", "image_corrupt", _bad_ihdr),
    Kind("PNG with damaged pixels", "image_corrupt", _damaged_png),
    Kind("PNG without pixels", "image_corrupt", _no_idat),
    Kind("PNG of width 0", "image_corrupt", lambda _: png(0, 32, b"")),
    Kind("PNG with a text bomb", "image_corrupt", _text_bomb),
    Kind("GIF header alone", "image_corrupt", lambda _: b"GIF89a"),
    Kind("WebP header alone", "image_corrupt", lambda _: b"RIFF\x10\0\0\0WEBPVP8 "),
    Kind("WebP cut", "image_corrupt", _cut("WEBP", 0.5)),
    Kind("JPEG cut in the middle", "image_truncated", _cut("JPEG", 0.5)),
    Kind("TIFF with pixels outside", "image_truncated", _tiff_outside),
    Kind("PNG cut in the middle", "image_truncated", _cut("PNG", 0.5)),
    Kind("GIF cut in the middle", "image_truncated", _cut("GIF", 0.5)),
    Kind("TIFF cut in the middle", "image_truncated", _cut("TIFF", 0.5)),
    Kind("BMP cut in the middle", "image_truncated", _cut("BMP", 0.5)),
    Kind("PNG bomb of 400 Mpx", "image_too_many_pixels", lambda _: png(20_000, 20_000, depth=1, colour=0)),
    Kind("PNG bomb of 88 Mpx", "image_too_many_pixels", lambda _: png(9400, 9400, depth=1, colour=0)),
    Kind("PNG that claims 2^31 squared", "image_too_many_pixels", lambda _: png(2**31 - 1, 2**31 - 1, b"")),
    Kind("JPEG that claims 65,000 squared", "image_too_many_pixels", _jpeg_size(65_000, 65_000)),
    Kind("GIF that claims 65,535 squared", "image_too_many_pixels", _gif_size),
    Kind("BMP that claims 100,000 squared", "image_too_many_pixels", _bmp_size),
    Kind("TIFF that claims 100,000 squared", "image_too_many_pixels", _tiff_size),
    Kind("WebP that claims 16,384 squared", "image_too_many_pixels", _webp_size),
    Kind("1 x 1", "image_too_small", lambda r: encode(noise(r, 1, 1), "PNG")),
    Kind("one pixel too small", "image_too_small", lambda r: encode(noise(r, 40, MIN_SIDE - 1), "PNG")),
    Kind("too long", "image_extreme_aspect", lambda r: encode(noise(r, 8, 400), "PNG")),
    Kind("65 MiB of one file", "image_file_too_large", lambda r: good(r) + bytes(65 * 1024 * 1024)),
    Kind("PNG with a colour profile bomb", "image_corrupt", _profile_bomb),
)
