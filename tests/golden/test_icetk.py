"""The published text model, where it is at hand: its own test vectors and known points (spec 1.1)."""

from pathlib import Path

import pytest

from cogview2.pipeline.tokenizers.icetk import Icetk
from cogview2.pipeline.tokenizers.text import TextTokenizer
from cogview2.pipeline.tokenizers.vocabulary import Vocabulary

pytestmark = pytest.mark.golden
KNOWN = {20000: "<unk>", 20002: "</s>", 20003: "<pad>", 20005: "\u2581", 20006: ",", 20007: "."}
MORE = {20012: ":", 20027: ";", 20031: "?", 20035: "!", 83823: "\u3002", 145803: "\u03b1"}


@pytest.fixture(scope="module")
def icetk(fixtures: Path) -> Icetk:
    path = fixtures / "icetk/ice_text.model"
    if not path.is_file():
        pytest.skip(f"the published text model is not at {path}")
    return Icetk(TextTokenizer(path, Vocabulary.icetk()))


def test_known_points(icetk: Icetk) -> None:
    assert icetk.text.pieces == 130_000
    for token, name in (KNOWN | MORE).items():
        assert icetk[token] == name and icetk[name] == token


def test_published_vectors(icetk: Icetk) -> None:
    english = [39316, 20932, 20035, 20115, 20344, 22881, 35955, 20007]
    chinese = [20005, 94874, 84097, 20035, 94947, 22881, 35955, 83823]
    assert icetk.encode_text("Hello World! I am icetk.") == english
    assert icetk.decode_text(english) == "Hello World! I am icetk."
    sentence = "\u4f60\u597d\u4e16\u754c\uff01\u8fd9\u91cc\u662f icetk\u3002"
    assert icetk.encode_text(sentence) == chinese


def test_line_breaks_and_discouraged_pieces(icetk: Icetk) -> None:
    ids = icetk.encode_text("Hello\nWorld", ignore_linebreak=False)
    assert ids.count(icetk["<n>"]) == 1 and icetk.decode_text(ids) == "Hello\nWorld"
    rare = range(125_653, 130_000)
    dashes = icetk.discouraged(rare).encode_text("-" * 20)
    assert not {token - 20_000 for token in dashes} & set(rare)
