"""Captions against one full forward pass for every token."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from cogview2.pipeline.config.data import Language
from cogview2.pipeline.config.model import CogLMConfig
from cogview2.pipeline.config.sampling import CaptioningConfig
from cogview2.pipeline.errors import ConfigError, DataError
from cogview2.pipeline.models.coglm.model import CogLM
from cogview2.pipeline.sampling import captioning
from cogview2.pipeline.sampling.captioning import (
    Describer,
    allowed_ids,
    caption,
    caption_candidates,
    end_of,
)
from cogview2.pipeline.sampling.decoding import draw_top_k
from cogview2.pipeline.sampling.noise import uniforms
from cogview2.pipeline.sampling.reranking import caption_log_likelihood
from cogview2.pipeline.tokenizers.vocabulary import Vocabulary

TINY = CogLMConfig(layers=2, hidden=32, heads=4, max_positions=64, text_length=12, image_position=14)
VOCABULARY = Vocabulary.from_counts(20, (12, 14, 12, 8), rows=75)
PAD, SILENT = VOCABULARY.pad, 27
CODES = torch.randint(0, 20, (5, 16), generator=torch.Generator().manual_seed(0))
LONG = CaptioningConfig(max_tokens=9)


class _Words:
    """Spells an id as a word of its number; 26 is a full stop, SILENT has no spelling, 64 and 65 do not exist."""

    vocabulary, pieces = VOCABULARY, 44

    def decode(self, ids: Any) -> str:
        words = {26: ".", SILENT: "", VOCABULARY.boundary: ""}
        return " ".join(words.get(int(token), f"w{token}") for token in ids)


def _describer(end_bias: float = 0.0) -> Describer:
    """Return random weights; `end_bias` makes <pad> likelier."""
    torch.manual_seed(3)
    model = CogLM(TINY, VOCABULARY.rows)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    # The first hidden value is always 1, so the first column of the tied matrix is a bias of the logits.
    last = model.transformer.final_layernorm
    words = model.transformer.word_embeddings
    with torch.no_grad():
        last.weight[0], last.bias[0] = 0, 1
        words.weight[:, 0] = 0
        words.weight[PAD, 0] = end_bias
    model.requires_grad_(False)
    return cast(Describer, SimpleNamespace(tokenizer=_Words(), coglm=model))


@pytest.fixture(scope="module")
def endless() -> Describer:
    return _describer(-1e3)


@pytest.fixture(scope="module")
def ending() -> Describer:
    return _describer(3.0)


def _permitted(language: str) -> list[int]:
    """The ids of the test's vocabulary: common 20-31, English 32-45, Chinese 46-57, rare 58-65."""
    common = [25, 26, 28, 29, 30, 31]
    return [*common, *(range(32, 46) if language == "en" else range(46, 58))]


def _slowly(
    describer: Describer, codes: list[int], language: str, draw: Any, most: int
) -> tuple[list[int], list[float], bool]:
    """Draw a caption with one full forward pass for each token."""
    start = VOCABULARY.start_of(language)
    ids: list[int] = []
    scores: list[float] = []
    for step in range(most + 1):
        text = [start, *ids]
        length = 16 + len(text)
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        mask[:16, :16] = True
        positions = torch.tensor([[*range(15, 31), *range(len(text))]])
        with torch.no_grad():
            hidden = describer.coglm.eval()(torch.tensor([codes + text]), positions, mask[None, None])
        logits = describer.coglm.logits(hidden[0, -1])
        masked = torch.full_like(logits, -torch.inf)
        permitted = _permitted(language) + ([PAD] if ids else [])
        masked[permitted] = logits[permitted]
        token = draw(masked, step)
        if token == PAD:
            return ids, scores, True
        ids.append(token)
        scores.append(float(logits[20:66].log_softmax(0)[token - 20]))
    return ids[:most], scores[:most], False


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("ends", [False, True])
def test_greedy_equals_uncached_decoding(
    language: Language, ends: bool, endless: Describer, ending: Describer
) -> None:
    describer = ending if ends else endless
    found = caption(describer, CODES, language, LONG)
    ended = []
    for row, one in enumerate(found):
        ids, scores, stopped = _slowly(
            describer, CODES[row].tolist(), language, lambda logits, _: int(logits.argmax()), 9
        )
        if not stopped:
            kept = end_of(ids, scores, cast(Any, _Words()))
            ids, scores = ids[:kept], scores[:kept]
        assert list(one.ids) == ids and one.ended == stopped
        assert one.score == pytest.approx(sum(scores) / len(scores), abs=1e-5)
        assert one.text == _Words().decode(ids).strip()
        ended.append(stopped)
    assert any(ended) == ends


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_drawn_captions_equal_uncached_drawing_whatever_the_batch(ending: Describer, batch: int) -> None:
    config = CaptioningConfig(max_tokens=6, temperature=1.3, top_k=7, candidates=3)
    found = caption_candidates(
        ending, CODES, "en", config, seed=8, numbers=range(2, 2 + len(CODES)), batch=batch
    )
    for row, candidates in enumerate(found):
        expected = []
        for candidate in range(3):
            numbers = uniforms(8, 2 + row, f"caption en {candidate}", 7, 2)

            def draw(logits: torch.Tensor, step: int, numbers: torch.Tensor = numbers) -> int:
                return int(draw_top_k(logits[None, 20:66], numbers[step, :1], 7, 1.3)) + 20

            ids, scores, stopped = _slowly(ending, CODES[row].tolist(), "en", draw, 6)
            kept = len(ids) if stopped else end_of(ids, scores, cast(Any, _Words()))
            expected.append((sum(scores[:kept]) / kept, tuple(ids[:kept])))
        expected.sort(key=lambda pair: -pair[0])
        assert [one.ids for one in candidates] == [ids for _, ids in expected]
        assert [one.score for one in candidates] == pytest.approx([score for score, _ in expected], abs=1e-5)


def test_the_score_is_that_of_ranking() -> None:
    describer = _describer()
    for one, codes in zip(caption(describer, CODES, "zh", LONG), CODES, strict=True):
        score = caption_log_likelihood(
            describer.coglm, [one.ids], codes[None], VOCABULARY, start="chinese", softmax="text"
        )
        assert one.score == pytest.approx(float(score), abs=1e-5)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_only_allowed_ids(language: Language, endless: Describer) -> None:
    allowed = allowed_ids(cast(Any, _Words()), language)
    assert (allowed.nonzero()[:, 0] + 20).tolist() == sorted([PAD, *_permitted(language)])
    hot = CaptioningConfig(max_tokens=11, temperature=50.0, top_k=75, candidates=8)
    drawn = {
        token
        for candidates in caption_candidates(endless, CODES, language, hot)
        for one in candidates
        for token in one.ids
    }
    assert drawn <= set(_permitted(language)) and len(drawn) > 10


def test_ids_that_the_text_model_lacks_are_never_allowed() -> None:
    words = _Words()
    words.pieces = 20  # type: ignore[misc]
    assert allowed_ids(cast(Any, words), "en")[20:].sum() == 0
    assert allowed_ids(cast(Any, words), "zh")[20:].sum() == 0


def test_an_end_is_never_the_first_token() -> None:
    for one in caption(_describer(1e3), CODES, "en", LONG):
        assert len(one.ids) == 1 and one.ended and PAD not in one.ids


def test_length_is_bounded_by_option_and_model(endless: Describer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captioning, "end_of", lambda ids, *_: len(ids))
    for most, kept in ((4, 4), (60, 11)):
        found = caption(endless, CODES, "en", CaptioningConfig(max_tokens=most))
        assert {len(one.ids) for one in found} == {kept}


def test_drawing_stops_when_all_captions_have_ended() -> None:
    describer = _describer(1e3)
    runs = []
    describer.coglm.register_forward_pre_hook(lambda *_: runs.append(1))
    caption(describer, CODES, "en", LONG)
    assert len(runs) == 2


def test_refusals(ending: Describer) -> None:
    with pytest.raises(ConfigError, match="2 candidates at temperature 0"):
        caption(ending, CODES, "en", CaptioningConfig(candidates=2))
    with pytest.raises(DataError, match="no start token for language 'fr'"):
        caption(ending, CODES, cast(Language, "fr"), LONG)
    with pytest.raises(ValueError, match=r"base codes must be \[B, M\]"):
        caption(ending, CODES[0], "en", LONG)


@pytest.mark.parametrize(
    ("ids", "kept"),
    [
        ([40, 41, 26, 42, 43], 3),  # up to the full stop
        ([26, 40, 41, 26, 42], 4),  # but not at the very start
        ([40, 41, 42, 42, 42, 42], 3),  # one token again and again
        ([40, 41, 42, 41, 42, 41, 42], 3),  # two
        ([32, 40, 41, 42, 43, 40, 41, 42, 43, 40], 5),  # four, once more
    ],
)
def test_rules_of_thumb_for_the_end(ids: list[int], kept: int) -> None:
    assert end_of(ids, [-1.0] * len(ids), cast(Any, _Words())) == kept


def test_without_any_sign_the_likeliest_length_counts() -> None:
    ids = list(range(32, 44))
    scores = [-1.0] * 9 + [-0.1] + [-5.0] * 2
    assert end_of(ids, scores, cast(Any, _Words())) == 10
    assert end_of(ids[:1], scores[:1], cast(Any, _Words())) == 1
    twice = [40, 41, 42, 42, 43]  # one repeated word is no circle
    assert end_of(twice, [-1.0] * 5, cast(Any, _Words())) == 5
