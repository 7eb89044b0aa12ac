"""Caption likelihood against one explicit sequence for each text."""

from typing import get_args

import pytest
import torch

from cogview2.pipeline.config.model import CogLMConfig
from cogview2.pipeline.config.sampling import RankingConfig
from cogview2.pipeline.models.coglm.model import CogLM
from cogview2.pipeline.sampling import reranking
from cogview2.pipeline.sampling.reranking import Reduce, Softmax, Start, caption_log_likelihood, rank
from cogview2.pipeline.tokenizers.vocabulary import Vocabulary

TINY = CogLMConfig(layers=2, hidden=32, heads=4, max_positions=64, text_length=9, image_position=12)
VOCABULARY = Vocabulary.uniform(20, 46, rows=75)
ENGLISH, CHINESE = VOCABULARY.english[0], VOCABULARY.chinese[0]
TEXTS = [[ENGLISH, ENGLISH + 3, ENGLISH + 1], [CHINESE, CHINESE + 2], [ENGLISH + 5]]


@pytest.fixture(scope="module")
def model() -> CogLM:
    torch.manual_seed(0)
    model = CogLM(TINY, VOCABULARY.rows)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


CODES = torch.randint(0, 20, (3, 16), generator=torch.Generator().manual_seed(0))


def _naive(model: CogLM, ids: list[int], codes: list[int], start: int, softmax: Softmax) -> list[float]:
    """log p of every token of the text, one full forward pass for each."""
    found = []
    for index, target in enumerate(ids):
        text = [start, *ids[:index]]
        tokens = torch.tensor([[*codes, *text]])
        length, cells = tokens.shape[1], len(codes)
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        mask[:cells, :cells] = True
        positions = torch.tensor([[*(13 + i for i in range(cells)), *range(len(text))]])
        model.eval()
        with torch.no_grad():
            logits = model.logits(model(tokens, positions, mask[None, None]))[0, -1]
        model.train()
        if softmax == "text":
            logits[:20] = -1e4  # image codes
            logits[66:] = -1e4  # special and spare ids
        found.append(float(torch.log_softmax(logits, 0)[target]))
    return found


@pytest.mark.parametrize("start", ["language", "english", "chinese"])
@pytest.mark.parametrize("softmax", ["all", "text"])
@pytest.mark.parametrize("rows", [256, 2])
def test_equals_the_naive_computation(
    model: CogLM, start: Start, softmax: Softmax, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reranking, "_ROWS", rows)
    mean, total = (
        caption_log_likelihood(
            model, TEXTS, CODES, VOCABULARY, start=start, softmax=softmax, reduce=reduce
        ).tolist()
        for reduce in ("mean", "sum")
    )
    for row, ids in enumerate(TEXTS):
        english = start == "english" or (start == "language" and row != 1)
        token = VOCABULARY.start_of_english if english else VOCABULARY.start_of_chinese
        tokens = _naive(model, ids, CODES[row].tolist(), token, softmax)
        assert mean[row] == pytest.approx(sum(tokens) / len(ids), abs=1e-5)
        assert total[row] == pytest.approx(sum(tokens), abs=1e-5)
    assert model.training


def test_logits_exist_for_few_positions_at_a_time(model: CogLM, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    logits = CogLM.logits

    def watched(self: CogLM, hidden_XD: torch.Tensor, rows: int | None = None) -> torch.Tensor:
        sizes.append(len(hidden_XD))
        return logits(self, hidden_XD, rows)

    monkeypatch.setattr(reranking, "_ROWS", 2)
    monkeypatch.setattr(CogLM, "logits", watched)
    caption_log_likelihood(model, TEXTS, CODES, VOCABULARY)
    assert sizes == [2, 2, 2]


def test_options_follow_the_configuration() -> None:
    fields = RankingConfig.model_fields
    assert get_args(Start) == get_args(fields["start"].annotation)
    assert get_args(Softmax) == get_args(fields["softmax"].annotation)
    assert get_args(Reduce) == get_args(fields["reduce"].annotation)


def test_the_start_token_matters(model: CogLM) -> None:
    a = caption_log_likelihood(model, TEXTS, CODES, VOCABULARY)
    b = caption_log_likelihood(model, TEXTS, CODES, VOCABULARY, start="chinese")
    assert a[1] == b[1] and a[0] != b[0]


def test_rank_orders_candidates(model: CogLM) -> None:
    ranking = rank(model, TEXTS[0], CODES, VOCABULARY, batch=2)
    alone = [float(caption_log_likelihood(model, TEXTS[:1], CODES[i : i + 1], VOCABULARY)) for i in range(3)]
    assert ranking.scores.tolist() == pytest.approx(alone, abs=1e-5)
    assert ranking.order.tolist() == sorted(range(3), key=lambda i: -alone[i])
    other = rank(model, TEXTS[0], CODES, VOCABULARY, start="chinese", softmax="text", reduce="sum", batch=2)
    scores = caption_log_likelihood(
        model, [TEXTS[0]] * 3, CODES, VOCABULARY, start="chinese", softmax="text", reduce="sum"
    )
    assert other.scores.tolist() == pytest.approx(scores.tolist(), abs=1e-5)
    assert not torch.allclose(other.scores, ranking.scores)


def test_ties_keep_their_order(model: CogLM) -> None:
    same = CODES[:1].expand(4, -1)
    assert rank(model, TEXTS[0], same, VOCABULARY).order.tolist() == [0, 1, 2, 3]


def test_long_texts_are_cut_and_empty_ones_refused(model: CogLM) -> None:
    long = [ENGLISH + i for i in range(9)]
    a = caption_log_likelihood(model, [long], CODES[:1], VOCABULARY)
    assert a == caption_log_likelihood(model, [long[:8]], CODES[:1], VOCABULARY)
    with pytest.raises(ValueError, match="text 1 has no tokens"):
        caption_log_likelihood(model, [TEXTS[0], []], CODES[:2], VOCABULARY)
    with pytest.raises(ValueError, match=f"id {VOCABULARY.start_of_image} is not text"):
        caption_log_likelihood(model, [[VOCABULARY.start_of_image]], CODES[:1], VOCABULARY, softmax="text")
    with pytest.raises(ValueError, match="2 texts need codes of 2 images"):
        caption_log_likelihood(model, TEXTS[:2], CODES, VOCABULARY)
