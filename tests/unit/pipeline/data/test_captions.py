import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogview2.pipeline.config.data import CaptionRulesConfig
from cogview2.pipeline.data.captions import clean_caption, guess_language, normalise
from cogview2.pipeline.data.records import RefusedError

RULES = CaptionRulesConfig()


def reason_of(raw: bytes | str) -> str | None:
    try:
        clean_caption(raw, RULES)
    except RefusedError as error:
        return error.reason
    return None


def test_manifest(fixtures: Path) -> None:
    folder = fixtures / "data" / "bad"
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text("utf-8").splitlines()]
    rows = [row for row in rows if row["file"].startswith("captions/")]
    assert rows
    wrong = [
        (row["file"], reason, row["reason"])
        for row in rows
        if (reason := reason_of((folder / row["file"]).read_bytes())) != row["reason"]
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  a\tred\n\u2028circle\u3000 ", "a red circle"),
        (b"\xef\xbb\xbfa dog", "a dog"),
        ("a\u200bb \u202ec\u202c \x00d\x1b", "ab c d"),
        ("e\u0301te\u0301", "\u00e9t\u00e9"),
        ("\u4e00\u53ea\u732b\uff0c\u5750\u7740\u3002", "\u4e00\u53ea\u732b\uff0c\u5750\u7740\u3002"),
        ("<b>x</b> &amp; <pad>", "<b>x</b> &amp; <pad>"),
        ("\u2764\ufe0f", "\u2764\ufe0f"),
    ],
)
def test_clean(raw: bytes | str, clean: str) -> None:
    assert clean_caption(raw, RULES) == clean


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("", "caption_empty"),
        ("\u200b \u3164\u2800\u0301 \U000e0041", "caption_empty"),
        ("\ud83d", "caption_invalid_utf8"),
        (b"\xc0\xaf", "caption_invalid_utf8"),
        ("x" * 2000, None),
        ("x" * 2001, "caption_too_long"),
        ("?!", None),
    ],
)
def test_refused(raw: bytes | str, reason: str | None) -> None:
    assert reason_of(raw) == reason


@pytest.mark.parametrize("unit", ["x ", " ", "\u200b", "\u0300\u0316", "\ufdfa", "a\u0301"])
def test_a_megabyte_takes_no_time(unit: str) -> None:
    """Composing a megabyte of combining marks would take hours."""
    text = "e" + unit * (1024 * 1024 // len(unit.encode()))
    start = time.process_time()
    reason_of(text)
    assert time.process_time() - start < 0.5


@given(st.text(max_size=200))
def test_clean_text_stays_as_it_is(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert "\n" not in once and once == once.strip() and "  " not in once


@pytest.mark.parametrize(
    ("text", "language"), [("a cat", "en"), ("\u4e00\u53ea cat", "zh"), ("\u00e9\u00e8", "en"), ("123", "en")]
)
def test_language(text: str, language: str) -> None:
    assert guess_language(text) == language
