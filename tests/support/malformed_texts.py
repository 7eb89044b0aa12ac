"""Odd, broken and hostile captions, records and names, each with the verdict that docs/data.md gives for it."""

import json
from dataclasses import dataclass

from malformed_images import ACCEPTED


@dataclass(frozen=True)
class Caption:
    """The bytes of a caption file; `clean` is what an accepted one becomes."""

    name: str
    verdict: str
    data: bytes
    clean: str = ""


@dataclass(frozen=True)
class Line:
    """One line of captions.jsonl, without its end."""

    name: str
    verdict: str
    data: bytes


_TOO_LONG = 2001

CAPTIONS: tuple[Caption, ...] = (
    Caption("plain", ACCEPTED, b"a red circle\n", "a red circle"),
    Caption("BOM", ACCEPTED, b"\xef\xbb\xbfa dog", "a dog"),
    Caption("lone carriage returns", ACCEPTED, b"a\rdog\r", "a dog"),
    Caption("line and paragraph separators", ACCEPTED, "a\u2028dog\u2029".encode(), "a dog"),
    Caption("NUL and escape sequences", ACCEPTED, b"a\x00 \x1b[31mdog\x1b[0m", "a [31mdog[0m"),
    Caption("turns of the reading direction", ACCEPTED, "a \u202egod\u202c".encode(), "a god"),
    Caption("zero-width characters in words", ACCEPTED, "d\u200bo\u2060g".encode(), "dog"),
    Caption("decomposed accents", ACCEPTED, "e\u0301te\u0301".encode(), "\u00e9t\u00e9"),
    Caption("HTML", ACCEPTED, b"<b>dog</b> &amp; <script>", "<b>dog</b> &amp; <script>"),
    Caption("control tokens in words", ACCEPTED, b"[BASE] <pad> <unk> </s>", "[BASE] <pad> <unk> </s>"),
    Caption("a shell command", ACCEPTED, b"$(touch MARK); `touch MARK`", "$(touch MARK); `touch MARK`"),
    Caption("2,000 characters", ACCEPTED, b"x" * (_TOO_LONG - 1), "x" * (_TOO_LONG - 1)),
    Caption("no bytes", "caption_empty", b""),
    Caption("only spaces", "caption_empty", b" \t\r\n \xe3\x80\x80"),
    Caption("only zero-width characters", "caption_empty", "\u200b\u200d\ufeff\u2060".encode()),
    Caption("only combining marks", "caption_empty", "\u0301\u0300".encode()),
    Caption("only hidden tags", "caption_empty", "\U000e0041\U000e0042".encode()),
    Caption("only blanks of Hangul and braille", "caption_empty", "\u3164\u2800".encode()),
    Caption("Latin-1", "caption_invalid_utf8", b"caf\xe9 au lait"),
    Caption("GBK", "caption_invalid_utf8", "\u7ea2\u8272".encode("gbk")),
    Caption("UTF-16", "caption_invalid_utf8", "a dog".encode("utf-16")),
    Caption("overlong form", "caption_invalid_utf8", b"a\xc0\xafb"),
    Caption("half a pair", "caption_invalid_utf8", b"a\xed\xa0\xbdb"),
    Caption("beyond Unicode", "caption_invalid_utf8", b"\xf4\x90\x80\x80"),
    Caption("cut inside a character", "caption_invalid_utf8", "\u732b".encode()[:2]),
    Caption("a picture", "caption_invalid_utf8", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"),
    Caption("2,001 characters", "caption_too_long", b"x" * _TOO_LONG),
    Caption("a megabyte", "caption_too_long", b"dog " * (256 * 1024)),
    Caption("a megabyte of combining marks", "caption_too_long", ("e" + "\u0300\u0316" * 260_000).encode()),
    Caption("20,000 Chinese characters", "caption_too_long", "\u732b".encode() * 20_000),
    Caption("5 MiB", "caption_too_long", b"y" * (5 * 1024 * 1024)),
)

_IMAGE = '"image": "good.png"'


def _line(text: str) -> bytes:
    return f"{{{text}}}".encode()


LINES: tuple[Line, ...] = (
    Line("plain record", ACCEPTED, _line(f'{_IMAGE}, "caption": "a dog"')),
    Line(
        "NaN and infinity in other fields", ACCEPTED, _line(f'{_IMAGE}, "caption": "d", "a": NaN, "b": 1e999')
    ),
    Line("further fields", ACCEPTED, _line(f'{_IMAGE}, "caption": "d", "x": {{"y": [1, null, "z"]}}')),
    Line("path with ./", ACCEPTED, _line('"image": "./good.png", "caption": "d"')),
    Line("cut off", "record_bad_json", _line(f'{_IMAGE}, "caption": "a dog"')[:-6]),
    Line("two objects", "record_bad_json", _line(f'{_IMAGE}, "caption": "d"') * 2),
    Line("Python dict", "record_bad_json", b"{'image': 'good.png', 'caption': 'd'}"),
    Line("nested 100,000 deep", "record_bad_json", b"[" * 100_000 + b"]" * 100_000),
    Line(
        "number of 10,000 digits", "record_bad_json", _line(f'{_IMAGE}, "caption": "d", "n": {"9" * 10_000}')
    ),
    Line("raw control characters", "record_bad_json", _line(f'{_IMAGE}, "caption": "a\tdog\x01"')),
    Line("shell command", "record_bad_json", b"$(touch MARK)"),
    Line("field twice", "record_duplicate_key", _line(f'{_IMAGE}, "caption": "a", "caption": "b"')),
    Line(
        "field twice, deep",
        "record_duplicate_key",
        _line(f'{_IMAGE}, "caption": "a", "m": {{"x": 1, "x": 2}}'),
    ),
    Line("list", "record_wrong_type", b'["good.png", "a dog"]'),
    Line("text", "record_wrong_type", b'"a dog"'),
    Line("null", "record_wrong_type", b"null"),
    Line("number as caption", "record_wrong_type", _line(f'{_IMAGE}, "caption": 7')),
    Line("list as caption", "record_wrong_type", _line(f'{_IMAGE}, "caption": ["a"]')),
    Line("null as caption", "record_wrong_type", _line(f'{_IMAGE}, "caption": null')),
    Line("NaN as caption", "record_wrong_type", _line(f'{_IMAGE}, "caption": NaN')),
    Line("number as image", "record_wrong_type", _line('"image": 7, "caption": "d"')),
    Line("no caption", "record_missing_field", _line(f"{_IMAGE}")),
    Line("no image", "record_missing_field", _line('"caption": "d"')),
    Line("empty object", "record_missing_field", b"{}"),
    Line("unknown language", "record_missing_field", _line(f'{_IMAGE}, "caption_fr": "chien"')),
    Line("empty caption", "caption_empty", _line(f'{_IMAGE}, "caption": ""')),
    Line("half a pair, escaped", "caption_invalid_utf8", _line(f'{_IMAGE}, "caption": "a \\ud83d b"')),
    Line(
        "line that is not UTF-8",
        "caption_invalid_utf8",
        _line(f'{_IMAGE}, "caption": "x').replace(b"x", b"\xff"),
    ),
    Line("long caption", "caption_too_long", _line(f'{_IMAGE}, "caption": "{"x" * _TOO_LONG}"')),
    Line("line of 5 MiB", "record_too_long", _line(f'{_IMAGE}, "caption": "{"x" * 5 * 1024 * 1024}"')),
    Line("path upwards", "path_unsafe", _line('"image": "../good.png", "caption": "d"')),
    Line("path upwards inside", "path_unsafe", _line('"image": "a/../../good.png", "caption": "d"')),
    Line("absolute path", "path_unsafe", _line('"image": "/etc/passwd", "caption": "d"')),
    Line("path with NUL", "path_unsafe", _line('"image": "good\\u0000.png", "caption": "d"')),
    Line("path with backslashes", "path_unsafe", _line('"image": "..\\\\good.png", "caption": "d"')),
    Line("path with a line break", "path_unsafe", _line('"image": "go\\nod.png", "caption": "d"')),
    Line("path that reads backwards", "path_unsafe", _line('"image": "\\u202egnp.doog", "caption": "d"')),
    Line("empty path", "path_unsafe", _line('"image": "", "caption": "d"')),
    Line("link that leaves", "path_unsafe", _line('"image": "out.png", "caption": "d"')),
    Line("folder that is a link", "path_unsafe", _line('"image": "up/secret.png", "caption": "d"')),
    Line("no such file", "image_missing", _line('"image": "none.png", "caption": "d"')),
    Line("address", "image_missing", _line('"image": "https://example.org/a.png", "caption": "d"')),
    Line("pipe command", "image_missing", _line('"image": "pipe:touch MARK", "caption": "d"')),
    Line("very long name", "image_missing", _line(f'"image": "{"x" * 5000}", "caption": "d"')),
    Line("folder", "image_not_regular", _line('"image": "folder", "caption": "d"')),
    Line("named pipe", "image_not_regular", _line('"image": "fifo", "caption": "d"')),
    Line("device", "path_unsafe", _line('"image": "device", "caption": "d"')),
)

NAMES: dict[str, tuple[str, ...]] = {
    "dots": ("v1.0", "v1.1", "v1.9", "v1", "v1."),
    "slashes and underscores": ("a/b", "a__b", "a_/b", "a/_b", "a_b"),
    "spaces": ("a b", "a  b", " a b", "a b "),
    "capitals": ("Cat", "cat", "CAT"),
    "composed and decomposed": ("\u00e9", "e\u0301"),
    "look-alike letters": ("cat", "c\u0430t"),
    "Chinese": ("\u732b", "\u72d7"),
    "emoji": ("\U0001f408", "\U0001f415"),
    "300 characters": ("x" * 300, "x" * 299 + "y"),
    "64 and 65 characters": ("k" * 64, "k" * 65),
    "leading dashes": ("-rf", "--rf", "rf"),
    "shell words": ("$(touch MARK)", "`touch MARK`", "a;b", "a|b"),
    "names of devices": ("con", "nul", "CON"),
    "quotes": ("a'b", 'a"b'),
    "percent signs": ("a%2Fb", "a%2fb", "%00"),
    "numbers": ("0", "00", "000000", "1e3"),
}
"""Kind -> names of different samples: every one gets a key of its own, `[A-Za-z0-9_-]{1,64}`."""


def text_of(line: Line) -> dict[str, object]:
    """Return the record of an accepted line."""
    record: dict[str, object] = json.loads(line.data)
    return record
