"""Caption bytes or text -> one clean line, or a refusal with its reason."""

import re
import unicodedata

from cogview2.pipeline.config.data import CaptionRulesConfig, Language
from cogview2.pipeline.data.records import RefusedError

# Controls that are not white space; soft hyphen; zero-width, joiner and bidirectional marks; Hangul and
# braille blanks; annotation marks; tags. What nobody can see must neither split a word nor hide in it.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    "\u202a-\u202e\u2060-\u206f\u2800\u3164\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e0fff]"
)
_CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")
_MARKS = ("M", "Z", "C")
_PRIVATE = ("Co", "Cn")


def normalise(text: str) -> str:
    """Remove invisible characters, make all white space single spaces, strip, and compose accents (NFC).

    NFC, not NFKC: full-width Chinese punctuation stays; the tokenizer's own rule may still fold it.
    """
    return unicodedata.normalize("NFC", single_line(text))


def single_line(text: str) -> str:
    """`normalise` without the composition: linear time, whatever the text."""
    return " ".join(_INVISIBLE.sub("", text).split())


def decode_utf8(raw: bytes) -> str:
    """Decode strictly.

    Raises:
        RefusedError: reason caption_invalid_utf8.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        detail = f"not UTF-8 at byte {error.start}: {raw[error.start : error.start + 8]!r}; save it as UTF-8"
        raise RefusedError("caption_invalid_utf8", detail) from error


def _visible(text: str) -> bool:
    categories = (unicodedata.category(character) for character in text)
    return any(category[0] not in _MARKS or category in _PRIVATE for category in categories)


def clean_caption(raw: bytes | str, rules: CaptionRulesConfig) -> str:
    """Return `raw` as one line of visible text.

    Args:
        raw: UTF-8 bytes, or text.
        rules: the most characters accepted.

    Raises:
        RefusedError: reason caption_invalid_utf8, caption_empty or caption_too_long.
    """
    text = decode_utf8(raw) if isinstance(raw, bytes) else raw
    if isinstance(raw, str):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RefusedError(
                "caption_invalid_utf8", f"lone surrogate at character {error.start}"
            ) from error
    text = single_line(text)
    if len(text) <= rules.max_characters:
        # Only now: composing a long run of combining marks takes quadratic time.
        text = unicodedata.normalize("NFC", text)
    if len(text) > rules.max_characters:
        detail = f"{len(text)} characters; data.captions.max_characters is {rules.max_characters}"
        raise RefusedError("caption_too_long", detail)
    if not _visible(text):
        raise RefusedError("caption_empty", "no visible character")
    return text


def guess_language(text: str) -> Language:
    """Return `zh` when `text` holds any Chinese character, else `en`."""
    return "zh" if _CHINESE.search(text) else "en"
