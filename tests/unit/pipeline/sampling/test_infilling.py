"""Infilling against sequences written out by hand and one full forward pass for every code."""

import numpy as np
import pytest
import torch

from cogview2.pipeline.config.model import CogLMConfig
from cogview2.pipeline.config.sampling import AutoregressiveSamplingConfig
from cogview2.pipeline.models.coglm.model import CogLM
from cogview2.pipeline.sampling.autoregressive import UNKNOWN
from cogview2.pipeline.sampling.decoding import ClusterSampler
from cogview2.pipeline.sampling.infilling import infill, infilling_order, lay_out_infilling
from cogview2.pipeline.sampling.noise import batch_uniforms
from cogview2.pipeline.tokenizers.vocabulary import Vocabulary

TINY = CogLMConfig(layers=2, hidden=32, heads=4, max_positions=64, text_length=9, image_position=12)
VOCABULARY = Vocabulary.uniform(20, 46, rows=75)
TEXT = [30, 31, 40]
CODES = list(range(16))
LABELS = torch.arange(20) % 6
SAMPLING = AutoregressiveSamplingConfig(top_k_clusters=4, text_attention_bias=1.4)
REDRAWN = np.array([[0, 0, 0, 0], [0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1]], dtype=bool)
EVERYTHING = np.ones((4, 4), dtype=bool)


@pytest.fixture(scope="module")
def model() -> CogLM:
    torch.manual_seed(0)
    model = CogLM(TINY, VOCABULARY.rows)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def _layout(redrawn: np.ndarray, **options: object):
    return lay_out_infilling(
        TEXT,
        CODES,
        redrawn,
        config=TINY,
        vocabulary=VOCABULARY,
        text_attention_bias=1.4,
        **options,  # type: ignore[arg-type]
    )


def test_order() -> None:
    context, region = infilling_order(REDRAWN)
    assert context == [0, 1, 2, 3, 7, 10, 11, 12, 13]
    assert region == [4, 5, 6, 8, 9, 14, 15]  # 4 and 14 lead; 8 begins a row, so nothing leads it
    assert infilling_order(EVERYTHING) == ([], list(range(16)))
    apart = np.zeros((4, 4), dtype=bool)
    apart[0, 1] = apart[0, 3] = True
    assert infilling_order(apart)[1] == [0, 1, 2, 3]


def test_sequence_by_hand() -> None:
    sequence = _layout(REDRAWN)
    start = VOCABULARY.start_of_image
    known = [*TEXT, start, 0, 1, 2, 3, 7, 10, 11, 12, 13]
    assert sequence.tokens[0].tolist() == [*known, 4, -1, -1, -1, -1, 14, -1]
    assert sequence.position_ids[0, :4].tolist() == [0, 1, 2, 12]
    assert sequence.position_ids[0, 4:].tolist() == [
        13 + c for c in (0, 1, 2, 3, 7, 10, 11, 12, 13, 4, 5, 6, 8, 9, 14, 15)
    ]
    assert sequence.attention_bias[0, 0, 0].tolist() == pytest.approx([1.4] * 3 + [0] * 17)
    length, text, context = 20, 3, range(4, 13)
    for query in range(length):
        for key in range(length):
            expected = key <= query or (query < text and key < text) or (query > text and key in context)
            assert bool(sequence.attention_mask[0, 0, query, key]) == expected, (query, key)


def test_second_start_of_image_belongs_to_the_text() -> None:
    sequence = _layout(REDRAWN, second_start_of_image=True)
    start = VOCABULARY.start_of_image
    assert sequence.tokens[0, :6].tolist() == [*TEXT, start, start, 0]
    assert sequence.position_ids[0, :6].tolist() == [0, 1, 2, 3, 12, 13]
    assert sequence.attention_bias[0, 0, 0, :5].tolist() == pytest.approx([1.4] * 4 + [0])
    assert sequence.attention_mask[0, 0, 0, :5].tolist() == [True] * 4 + [False]


@pytest.mark.parametrize(("second", "kept"), [(False, 8), (True, 7)])
def test_long_texts_are_cut(second: bool, kept: int) -> None:
    sequence = lay_out_infilling(
        list(range(30, 50)),
        CODES,
        REDRAWN,
        config=TINY,
        vocabulary=VOCABULARY,
        text_attention_bias=0,
        second_start_of_image=second,
    )
    assert int((sequence.tokens[0] >= 30).sum()) == kept + 1 + second
    assert int(sequence.position_ids[0, : kept + second].max()) == 7


def test_known_before_is_plain_raster_order() -> None:
    sequence = _layout(REDRAWN, known="before")
    assert sequence.tokens[0, 4:].tolist() == [0, 1, 2, 3, 4, -1, -1, 7, -1, -1, 10, 11, 12, 13, 14, -1]
    assert sequence.position_ids[0, 3:].tolist() == list(range(12, 29))
    image = sequence.attention_mask[0, 0, 3:, 3:]
    assert torch.equal(image, torch.ones(17, 17, dtype=torch.bool).tril())
    upper = REDRAWN.copy()
    upper[2:] = False
    assert _layout(upper, known="before").tokens.shape[1] == 4 + 7  # what comes after is seen by nobody


def _slowly(model: CogLM, sequence, uniforms_M2: torch.Tensor) -> torch.Tensor:
    """Return the codes of every cell, one full forward pass for each unknown one, no cache."""
    tokens = sequence.tokens[0].clone()
    codes = torch.tensor(CODES)
    sampler = ClusterSampler(
        LABELS,
        temperature=SAMPLING.temperature,
        top_k_clusters=SAMPLING.top_k_clusters,
        cluster_temperature=SAMPLING.cluster_temperature,
    )
    model.eval()
    for place in (tokens == UNKNOWN).nonzero()[:, 0].tolist():
        with torch.no_grad():
            hidden = model(
                tokens[None, :place],
                sequence.position_ids[:, :place],
                sequence.attention_mask[..., :place, :place],
                attention_bias=sequence.attention_bias[..., :place],
            )
        cell = int(sequence.position_ids[0, place]) - 13
        tokens[place] = codes[cell] = sampler(model.logits(hidden[:, -1], 20), uniforms_M2[cell][None])
    return codes


@pytest.mark.parametrize("redrawn", [REDRAWN, EVERYTHING, ~EVERYTHING | np.eye(4, dtype=bool)])
@pytest.mark.parametrize(
    "options",
    [{}, {"second_start_of_image": True}, {"known": "before"}],
    ids=lambda o: next(iter(o), "plain"),
)
def test_equals_uncached_drawing(model: CogLM, redrawn: np.ndarray, options: dict[str, object]) -> None:
    uniforms_BM2 = batch_uniforms(3, [0, 1, 2], "x", 16, 2)
    runs = []
    handle = model.transformer.register_forward_pre_hook(lambda *_: runs.append(1))
    ours = infill(
        model,
        TEXT,
        torch.tensor(CODES),
        redrawn,
        uniforms_BM2,
        vocabulary=VOCABULARY,
        labels=LABELS,
        config=SAMPLING,
        **options,  # type: ignore[arg-type]
    )
    handle.remove()
    assert len(runs) == redrawn.sum()
    sequence = _layout(redrawn, **options)
    for row in range(3):
        assert torch.equal(ours[row], _slowly(model, sequence, uniforms_BM2[row]))
    kept = torch.from_numpy(~redrawn.ravel())
    assert torch.equal(ours[:, kept], torch.tensor(CODES)[kept].expand(3, -1))


def test_sizes_must_fit(model: CogLM) -> None:
    arguments = {"vocabulary": VOCABULARY, "labels": LABELS, "config": SAMPLING}
    codes = torch.tensor(CODES)
    with pytest.raises(ValueError, match="16 codes need a mask of as many cells"):
        infill(model, TEXT, codes, REDRAWN[:3], torch.zeros(1, 16, 2), **arguments)
    with pytest.raises(ValueError, match="no cell is to be redrawn"):
        infill(model, TEXT, codes, ~EVERYTHING, torch.zeros(1, 16, 2), **arguments)
