import itertools
import re
from pathlib import Path

import pytest
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from cogview2.pipeline.config.stages import TokenizerConfig
from cogview2.pipeline.errors import DataError
from cogview2.pipeline.tokenizers.piece_ranges import range_of
from cogview2.pipeline.tokenizers.text import TextTokenizer
from cogview2.pipeline.tokenizers.train_text import TrainedTokenizer, clean, draw, train, words_alone
from cogview2.pipeline.tokenizers.vocabulary import CONTROL_PIECES, RANGE_NAMES, Vocabulary

IMAGE_CODES = 50
PIECES = 132
EN = [
    f"a {size} {colour} {shape} {place} the {other} one."
    for size, colour, shape, place, other in itertools.product(
        ("small", "large"),
        ("red", "green", "blue"),
        ("circle", "square"),
        ("above", "left of"),
        ("grey", "black"),
    )
]
ZH = [
    f"{a}\u8272\u7684{b}\u5728{c}\u7684{d}\u8fb9\u3002"
    for a, b, c, d in itertools.product(
        "\u7ea2\u7eff\u84dd",
        ("\u5706\u5f62", "\u65b9\u5757"),
        ("\u5341\u5b57", "\u83f1\u5f62"),
        "\u5de6\u53f3",
    )
]
CORPUS = [*EN, *ZH, *["\u03b1 \u03b2 \u03b1\u03b2"] * 3]
CONTROL_TEXTS = [
    "<pad>",
    "</s>",
    "<s>",
    "<unk>",
    "<n>",
    "a <n> b<n>c",
    "<start_of_image>",
    "<start_of_english> red <start_of_chinese>",
    "[BOI1] <|endoftext|> <start_of_chinese> [EOI1] <unk> </s> [MASK] \u2581 red",
    "\uff1cpad\uff1e \uff1cn\uff1e",
    "\ufdd0 red \ufdd0",
    "<n\ufdd0>",
]


def make(
    pieces: int, sentences: list[str] = CORPUS, rows: int | None = None, **config: object
) -> TrainedTokenizer:
    return train(
        sentences,
        pieces=pieces,
        config=TokenizerConfig.model_validate(config),
        image_codes=IMAGE_CODES,
        rows=rows,
        seed=3,
    )


@pytest.fixture(scope="module")
def trained() -> TrainedTokenizer:
    return make(PIECES)


@pytest.fixture(scope="module")
def tokenizer(trained: TrainedTokenizer) -> TextTokenizer:
    return TextTokenizer.from_bytes(trained.model_bytes, trained.vocabulary)


def pieces_of(trained: TrainedTokenizer) -> list[model_pb2.ModelProto.SentencePiece]:
    return list(model_pb2.ModelProto.FromString(trained.model_bytes).pieces)


def test_pieces_stand_in_the_order_of_the_ranges(trained: TrainedTokenizer) -> None:
    pieces = pieces_of(trained)
    assert len(pieces) == PIECES
    assert tuple(piece.piece for piece in pieces[:6]) == CONTROL_PIECES
    for name in RANGE_NAMES:
        first, end = getattr(trained.vocabulary, name)
        inside = [piece for piece in pieces[first - IMAGE_CODES : end - IMAGE_CODES]]
        assert trained.report["pieces_by_range"][name] == len(inside) > 0
        learned = [piece for piece in inside if piece.piece not in CONTROL_PIECES]
        assert {range_of(piece.piece) for piece in learned} == {name}
        scores = [piece.score for piece in learned]
        assert scores == sorted(scores, reverse=True)


def test_the_report(trained: TrainedTokenizer) -> None:
    report = trained.report
    assert report["num_threads"] == 1 and report["normalizer"] == "nmt_nfkc"
    assert set(report["tokens_per_caption"]) == {"en", "zh"}
    assert 1 < report["tokens_per_caption"]["zh"] < report["tokens_per_caption"]["en"] < 40
    assert report["unk_rate"] == 0 and report["unused_ids"] == 0 and len(report["sha256"]) == 64


def test_the_report_sees_both_languages_when_captions_alternate() -> None:
    pairs = [caption for pair in zip(EN * 50, (ZH * 100)[: len(EN) * 50], strict=True) for caption in pair]
    assert len(pairs) >= 4000
    assert set(make(PIECES, pairs, shrink_to_fit=True).report["tokens_per_caption"]) == {"en", "zh"}


@pytest.mark.parametrize("text", [EN[0], ZH[0], "A Large RED Cat, 12%?!", "\u03b1\u03b2", "a red-ish ~ {x}"])
def test_round_trip(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert all(tokenizer.vocabulary.is_text(token) for token in ids)
    if any(range_of(character) == "chinese" for character in text):
        assert tokenizer.vocabulary.language_of(ids) == "zh"
    assert tokenizer.vocabulary.unk not in ids or "C" not in text
    assert tokenizer.decode(ids) == text


def test_no_printable_ascii_is_unknown(tokenizer: TextTokenizer) -> None:
    for character in map(chr, range(33, 127)):
        assert tokenizer.vocabulary.unk not in tokenizer.encode(character), character


def test_language_ranges(tokenizer: TextTokenizer) -> None:
    assert tokenizer.vocabulary.language_of(tokenizer.encode(EN[5])) == "en"
    assert tokenizer.vocabulary.language_of(tokenizer.encode(ZH[5])) == "zh"


def test_full_width_forms_are_folded_but_not_the_ideographic_full_stop(tokenizer: TextTokenizer) -> None:
    assert tokenizer.encode("\uff21\uff01") == tokenizer.encode("A!")
    assert tokenizer.encode("\u3002") != tokenizer.encode(".")
    assert tokenizer.encode("a  red \t circle ") == tokenizer.encode("a red circle")


@pytest.mark.parametrize("keep_newlines", [False, True])
@pytest.mark.parametrize("text", CONTROL_TEXTS)
def test_control_spellings_are_ordinary_text(
    tokenizer: TextTokenizer, text: str, keep_newlines: bool
) -> None:
    vocabulary = tokenizer.vocabulary
    ids = tokenizer.encode(text, keep_newlines=keep_newlines)
    forbidden = {vocabulary.bos, vocabulary.eos, vocabulary.pad, vocabulary.newline, vocabulary.unk}
    assert not forbidden & set(ids)
    assert all(vocabulary.is_text(token) for token in ids)
    plain = text.replace("\ufdd0", "").replace("\u2581", " ").replace("\uff1c", "<").replace("\uff1e", ">")
    assert tokenizer.decode(ids) == re.sub(" +", " ", plain).strip()


def test_newlines(tokenizer: TextTokenizer) -> None:
    newline = tokenizer.vocabulary.newline
    assert tokenizer.encode("red\ncircle") == tokenizer.encode("red circle")
    for text in ("red\ncircle", "red\r\ncircle", "red\rcircle"):
        ids = tokenizer.encode(text, keep_newlines=True)
        assert ids.count(newline) == 1
        assert tokenizer.decode(ids) == "red\ncircle"
    both = tokenizer.encode("<n>\n", keep_newlines=True)
    assert both.count(newline) == 1 and tokenizer.decode(both) == "<n>\n"


def test_decode_leaves_special_tokens_out_and_refuses_image_codes(tokenizer: TextTokenizer) -> None:
    vocabulary = tokenizer.vocabulary
    ids = tokenizer.encode("a red circle")
    padded = [vocabulary.start_of_english, *ids, vocabulary.eos, vocabulary.pad, vocabulary.pad]
    assert tokenizer.decode(padded) == "a red circle"
    for token in (0, IMAGE_CODES - 1, -1, vocabulary.rows):
        with pytest.raises(DataError, match=f"id {token} is not text"):
            tokenizer.decode([*ids, token])


def test_empty_odd_and_invalid_text(tokenizer: TextTokenizer) -> None:
    assert tokenizer.encode("") == [] and tokenizer.encode(" \n\t") == [] and tokenizer.decode([]) == ""
    assert tokenizer.vocabulary.unk in tokenizer.encode("\U0001f9ff")
    with pytest.raises(DataError, match="not valid Unicode"):
        tokenizer.encode("red \ud800")


def test_equal_bytes_for_equal_input(trained: TrainedTokenizer) -> None:
    assert make(PIECES).model_bytes == trained.model_bytes
    threaded = make(PIECES, num_threads=2)
    assert threaded.model_bytes == make(PIECES, num_threads=2).model_bytes
    assert threaded.report["num_threads"] == 2


def test_too_many_pieces_are_refused_with_the_number_that_fits() -> None:
    with pytest.raises(DataError, match="at most") as refusal:
        make(5000)
    fits = int(re.search(r"text_pieces to (\d+)", str(refusal.value))[1])  # type: ignore[index]
    assert make(fits).report["pieces"] == fits
    with pytest.raises(DataError, match=f"at most {fits}"):
        make(fits + 1)


def test_too_few_pieces_are_refused_with_the_number_needed() -> None:
    with pytest.raises(DataError, match="character_coverage") as refusal:
        make(30)
    needed = int(re.search(r"text_pieces to (\d+)", str(refusal.value))[1])  # type: ignore[index]
    assert make(needed).report["pieces"] == needed
    with pytest.raises(DataError, match="fewer than"):
        make(needed - 1)


def test_shrink_to_fit_keeps_the_width_of_the_layout() -> None:
    trained = make(5000, rows=6000, shrink_to_fit=True)
    size = trained.report["pieces"]
    assert size < 5000 and trained.report["unused_ids"] == 5000 - size
    vocabulary = trained.vocabulary
    assert (vocabulary.text_pieces, vocabulary.rows, vocabulary.rare[1]) == (5000, 6000, IMAGE_CODES + 5000)
    tokenizer = TextTokenizer.from_bytes(trained.model_bytes, vocabulary)
    ids = tokenizer.encode("a red circle")
    assert tokenizer.decode([*ids, vocabulary.rare[1] - 1]) == "a red circle"


def test_rare_frequency_moves_pieces_to_the_rare_range(trained: TrainedTokenizer) -> None:
    moved = make(PIECES, rare_frequency=0.005).vocabulary
    before, after = trained.vocabulary, moved
    assert after.rare[1] - after.rare[0] > before.rare[1] - before.rare[0]
    assert after.english[1] - after.english[0] < before.english[1] - before.english[0]


def test_no_text_is_refused() -> None:
    for sentences in ([], ["", "  ", "\n"]):
        with pytest.raises(DataError, match="no text"):
            make(PIECES, sentences)


def test_a_corpus_full_of_control_spellings_trains_and_stays_safe() -> None:
    hostile = [f"<pad> {line} </s><n><s> <unk>\ufdd0" for line in CORPUS] * 3
    trained = make(PIECES, hostile)
    spelled = [piece.piece.replace("\u2581", "") for piece in pieces_of(trained)[6:]]
    assert not set(CONTROL_PIECES) & set(spelled)
    tokenizer = TextTokenizer.from_bytes(trained.model_bytes, trained.vocabulary)
    assert min(tokenizer.encode("<pad></s><n>")) > trained.vocabulary.newline


def test_drawing_sentences() -> None:
    lines = [str(index) for index in range(1000)]
    drawn = draw(lines, 50, seed=1)
    assert drawn == draw(iter(lines), 50, seed=1) and drawn != draw(lines, 50, seed=2)
    assert len(set(drawn)) == 50 and [int(line) for line in drawn] == sorted(map(int, drawn))
    assert draw(lines, 5000, seed=1) == lines
    used = make(PIECES, CORPUS, input_sentences=20, shrink_to_fit=True).report
    assert used["sentences"] == 20


def test_words_that_always_stand_before_a_space_become_pieces() -> None:
    trained = make(5000, EN * 20, shrink_to_fit=True)
    pieces = {piece.piece for piece in pieces_of(trained)}
    assert {"\u2581red", "\u2581green", "\u2581small", "\u2581circle"} <= pieces
    assert words_alone(["a red cat, a red dog", f"{ZH[0]} {ZH[0]}", "once"]) == ["a", "red"]


def test_cleaning() -> None:
    assert list(clean(["a\nb\n", " ", "\ud800c\0d", "x" * 2500])) == [
        "a",
        "b",
        "c d",
        "x" * 1000,
        "x" * 1000,
        "x" * 500,
    ]


def test_models_that_do_not_fit_are_refused(tmp_path: Path, trained: TrainedTokenizer) -> None:
    path = tmp_path / "text.model"
    with pytest.raises(DataError, match="cannot read"):
        TextTokenizer(path, trained.vocabulary)
    path.write_bytes(trained.model_bytes)
    assert TextTokenizer(path, trained.vocabulary).encode("red") == TextTokenizer.from_bytes(
        trained.model_bytes, trained.vocabulary
    ).encode("red")
    with pytest.raises(DataError, match="more than the 100"):
        TextTokenizer(path, Vocabulary.uniform(IMAGE_CODES, 100))
    proto = model_pb2.ModelProto.FromString(trained.model_bytes)
    proto.pieces[4].piece = "<x>"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(DataError, match="starts with the pieces"):
        TextTokenizer(path, trained.vocabulary)
    for content in (b"", b"not a model", trained.model_bytes[:1000]):
        path.write_bytes(content)
        with pytest.raises(DataError):
            TextTokenizer(path, trained.vocabulary)


def test_user_defined_pieces_of_other_models_never_match_text(trained: TrainedTokenizer) -> None:
    proto = model_pb2.ModelProto.FromString(trained.model_bytes)
    proto.pieces.add(piece="<|blank_2|>", score=0.0, type=model_pb2.ModelProto.SentencePiece.USER_DEFINED)
    tokenizer = TextTokenizer.from_bytes(
        proto.SerializeToString(), Vocabulary.uniform(IMAGE_CODES, PIECES + 1)
    )
    assert IMAGE_CODES + PIECES not in tokenizer.encode("a <|blank_2|> b")


@pytest.mark.golden
def test_the_bilingual_corpus(fixtures: Path) -> None:
    lines: list[str] = []
    for name in ("en.txt", "zh.txt"):
        lines += (fixtures / "data/corpus" / name).read_text(encoding="utf-8").splitlines()[::30]
    trained = train(lines, pieces=4000, config=TokenizerConfig(), image_codes=20_000, rows=None, seed=0)
    report = trained.report
    assert report["unk_rate"] < 0.005
    assert min(report["pieces_by_range"]["english"], report["pieces_by_range"]["chinese"]) > 500
    tokenizer = TextTokenizer.from_bytes(trained.model_bytes, trained.vocabulary)
    injected = (fixtures / "data/bad/captions/special_tokens.txt").read_text(encoding="utf-8")
    ids = tokenizer.encode(injected)
    assert min(ids) > trained.vocabulary.newline and max(ids) < trained.vocabulary.start_of_image
    assert tokenizer.decode(ids) == re.sub(" +", " ", injected.replace("\u2581", " ")).strip()
    with pytest.raises(DataError, match="at most") as refusal:
        train(lines, pieces=130_000, config=TokenizerConfig(), image_codes=20_000, rows=None, seed=0)
    fits = int(re.search(r"text_pieces to (\d+)", str(refusal.value))[1])  # type: ignore[index]
    retried = train(lines, pieces=fits, config=TokenizerConfig(), image_codes=20_000, rows=None, seed=0)
    assert retried.report["pieces"] == fits
