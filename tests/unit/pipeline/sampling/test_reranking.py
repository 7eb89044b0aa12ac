"""Caption likelihood against one explicit sequence for each text."""

import pytest
import torch

from cogview2.pipeline.config.model import CogLMConfig
from cogview2.pipeline.models.coglm.model import CogLM
from cogview2.pipeline.sampling import reranking
from cogview2.pipeline.sampling.reranking import Start, caption_log_likelihood, rank
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


def _naive(model: CogLM, ids: list[int], codes: list[int], start: int) -> float:
    """Mean over the text of log p, one full forward pass for every token."""
    total = 0.0
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
        total += float(torch.log_softmax(logits, 0)[target])
    return total / len(ids)


@pytest.mark.parametrize("start", ["language", "released"])
@pytest.mark.parametrize("rows", [256, 2])
def test_equals_the_naive_computation(
    model: CogLM, start: Start, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reranking, "_ROWS", rows)
    ours = caption_log_likelihood(model, TEXTS, CODES, VOCABULARY, start=start)
    for row, ids in enumerate(TEXTS):
        english = start == "language" and row != 1
        token = VOCABULARY.start_of_english if english else VOCABULARY.start_of_chinese
        assert ours[row].item() == pytest.approx(_naive(model, ids, CODES[row].tolist(), token), abs=1e-5)
    assert model.training


def test_the_start_token_matters(model: CogLM) -> None:
    a = caption_log_likelihood(model, TEXTS, CODES, VOCABULARY)
    b = caption_log_likelihood(model, TEXTS, CODES, VOCABULARY, start="released")
    assert a[1] == b[1] and a[0] != b[0]


def test_rank_orders_candidates(model: CogLM) -> None:
    ranking = rank(model, TEXTS[0], CODES, VOCABULARY, batch=2)
    alone = [float(caption_log_likelihood(model, TEXTS[:1], CODES[i : i + 1], VOCABULARY)) for i in range(3)]
    assert ranking.scores.tolist() == pytest.approx(alone, abs=1e-5)
    assert ranking.order.tolist() == sorted(range(3), key=lambda i: -alone[i])


def test_long_texts_are_cut_and_empty_ones_refused(model: CogLM) -> None:
    long = [ENGLISH + i for i in range(9)]
    a = caption_log_likelihood(model, [long], CODES[:1], VOCABULARY)
    assert a == caption_log_likelihood(model, [long[:8]], CODES[:1], VOCABULARY)
    with pytest.raises(ValueError, match="text 1 has no tokens"):
        caption_log_likelihood(model, [TEXTS[0], []], CODES[:2], VOCABULARY)
    with pytest.raises(ValueError, match="2 texts need codes of 2 images"):
        caption_log_likelihood(model, TEXTS[:2], CODES, VOCABULARY)
