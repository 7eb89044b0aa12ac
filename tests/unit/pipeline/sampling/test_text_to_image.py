"""The facade: a picture depends on its prompt, seed and number alone."""

import copy
from typing import cast

import pytest
import torch
from torch import nn

from cogview2.pipeline.config.model import CogLMConfig, DirectSRConfig, IterativeSRConfig, VQVAEConfig
from cogview2.pipeline.config.sampling import IterativeSRSamplingConfig, RankingConfig, SamplingConfig
from cogview2.pipeline.errors import ConfigError, DataError
from cogview2.pipeline.models.coglm.model import CogLM
from cogview2.pipeline.models.sr.direct import DirectSR
from cogview2.pipeline.models.sr.iterative import IterativeSR
from cogview2.pipeline.models.vqvae.model import VQVAE
from cogview2.pipeline.sampling.meter import Meter
from cogview2.pipeline.sampling.reranking import caption_log_likelihood
from cogview2.pipeline.sampling.styles import Style
from cogview2.pipeline.sampling.text_to_image import Pick, TextToImage
from cogview2.pipeline.tokenizers.image import ImageTokenizer
from cogview2.pipeline.tokenizers.text import TextTokenizer
from cogview2.pipeline.tokenizers.vocabulary import Vocabulary

BASE = CogLMConfig(layers=1, hidden=16, heads=2, max_positions=32, text_length=8, image_position=10)
VOCABULARY = Vocabulary.uniform(20, 40)
PROMPTS = ["red", "a blue one", "x", "green"]


class _Letters:
    """A text tokenizer: one id for each letter."""

    vocabulary = VOCABULARY

    def encode(self, text: str) -> list[int]:
        return [26 + ord(letter) % 30 for letter in text if letter.isalpha()]


def _randomized(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)


@pytest.fixture(scope="module")
def parts() -> dict[str, object]:
    torch.manual_seed(0)
    coglm = CogLM(BASE, VOCABULARY.rows)
    direct = DirectSR(BASE, DirectSRConfig(text_length=5), 4, 2, VOCABULARY.rows)
    iterative = IterativeSR(BASE, IterativeSRConfig(text_length=3), 8, VOCABULARY.rows)
    for model in (coglm, direct, iterative):
        _randomized(model)
    vqvae = VQVAE(
        VQVAEConfig(
            base_channels=8,
            encoder_multipliers=(1, 1, 2),
            decoder_multipliers=((1, 1, 1, 1, 2), (1, 1, 1, 2), (1, 1, 2)),
            encoder_res_blocks=1,
            latent_channels=8,
            codebook_size=20,
            norm_groups=4,
        )
    )
    return dict(
        tokenizer=cast(TextTokenizer, _Letters()),
        coglm=coglm,
        direct=direct,
        iterative=iterative,
        image_tokenizer=ImageTokenizer(vqvae, 8),
        base_grid=4,
        labels=torch.arange(20) % 5,
    )


def _facade(parts: dict[str, object], batch: int = 16, **changes: object) -> TextToImage:
    return TextToImage(**(parts | {"sampling": SamplingConfig(batch=batch)} | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [1, 3])
def test_pictures_do_not_depend_on_the_batch(parts: dict[str, object], batch: int) -> None:
    whole = _facade(parts).draw(PROMPTS, seed=9)
    other = _facade(parts, batch).draw(PROMPTS, seed=9)
    for name in ("base_codes", "direct_codes", "final_codes"):
        assert torch.equal(getattr(whole, name), getattr(other, name))
    rest = _facade(parts, batch).draw(PROMPTS[2:], seed=9, first_number=2)
    assert torch.equal(rest.final_codes, whole.final_codes[2:])


def test_seed_and_number_change_the_picture(parts: dict[str, object]) -> None:
    facade = _facade(parts)
    codes = [facade.draw(["red"], seed, number).base_codes for seed, number in [(0, 0), (1, 0), (0, 1)]]
    assert not torch.equal(codes[0], codes[1]) and not torch.equal(codes[0], codes[2])


def test_pixels_of_every_pass(parts: dict[str, object]) -> None:
    drawn = _facade(parts, batch=3).draw(PROMPTS, seed=0)
    assert drawn.pictures == ("base", "direct", "final")
    assert drawn.pixels("base").shape == (4, 3, 32, 32)
    assert drawn.pixels("direct").shape == drawn.pixels().shape == (4, 3, 64, 64)
    assert 0 <= drawn.pixels().min() and drawn.pixels().max() <= 1


def test_without_super_resolution(parts: dict[str, object]) -> None:
    drawn = _facade(parts, direct=None, iterative=None).draw(PROMPTS, seed=0)
    assert drawn.direct_codes is None and torch.equal(drawn.final_codes, drawn.base_codes)
    assert torch.equal(drawn.pixels("final"), drawn.pixels("base"))
    with pytest.raises(DataError, match="no picture 'direct'"):
        drawn.pixels("direct")
    only_direct = _facade(parts, iterative=None).draw(PROMPTS, seed=0)
    assert only_direct.direct_codes is not None
    assert torch.equal(only_direct.final_codes, only_direct.direct_codes)


@pytest.mark.parametrize("prompts", [[], ["red", ""], ["  "]])
def test_nothing_to_draw_is_refused(parts: dict[str, object], prompts: list[str]) -> None:
    with pytest.raises(DataError, match="nothing to draw|is empty"):
        _facade(parts).draw(prompts, seed=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"direct": None}, "give the direct model too"),
        ({"base_grid": 5}, "from a grid of 4, CogLM draws 5"),
        ({"labels": torch.zeros(19, dtype=torch.int64)}, "the clusters 19"),
        (
            {"iterative": IterativeSR(BASE, IterativeSRConfig(text_length=3), 4, VOCABULARY.rows)},
            "gives a grid of 8, iterative needs 4",
        ),
    ],
)
def test_parts_that_do_not_belong_together(
    parts: dict[str, object], changes: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        _facade(parts, **changes)


def test_the_first_candidate_is_the_picture_without_candidates(parts: dict[str, object]) -> None:
    facade = _facade(parts)
    alone = facade.draw(PROMPTS, seed=9)
    every = facade.draw(PROMPTS, seed=9, candidates=3, keep=3)
    assert alone.picks == tuple(Pick(prompt) for prompt in range(4)) and len(every.picks) == 12
    for prompt in range(4):
        (row,) = [row for row, pick in enumerate(every.picks) if (pick.prompt, pick.candidate) == (prompt, 0)]
        for name in ("base_codes", "direct_codes", "final_codes"):
            assert torch.equal(getattr(every, name)[row], getattr(alone, name)[prompt])
    assert len(every.base_codes.unique(dim=0)) == 12  # every candidate has noise of its own


@pytest.mark.parametrize("batch", [2, 5, 16])
def test_only_the_best_candidates_go_on(parts: dict[str, object], batch: int) -> None:
    """Scores are those of the prompt as caption; what is kept is what comes first by them, super-resolution on."""
    facade = _facade(parts, batch)
    every = facade.draw(PROMPTS, seed=2, candidates=4, keep=4)
    scores = caption_log_likelihood(
        facade.coglm,
        facade.encode([PROMPTS[pick.prompt] for pick in every.picks]),
        every.base_codes,
        VOCABULARY,
    )
    torch.testing.assert_close(torch.tensor([pick.score for pick in every.picks]), scores, atol=1e-4, rtol=0)
    kept = facade.draw(PROMPTS, seed=2, candidates=4, keep=2)
    assert kept.final_codes.shape == (8, 64) and [pick.prompt for pick in kept.picks] == [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
    ]
    for prompt in range(4):
        rows = [row for row, pick in enumerate(every.picks) if pick.prompt == prompt]
        values = [every.picks[row].score for row in rows]
        assert values == sorted(values, reverse=True)  # type: ignore[type-var]
        assert sorted(every.picks[row].candidate for row in rows) == [0, 1, 2, 3]
        assert torch.equal(kept.final_codes[2 * prompt : 2 * prompt + 2], every.final_codes[rows[:2]])
    assert any(pick.candidate for pick in kept.picks)
    best = facade.with_sampling(SamplingConfig(ranking=RankingConfig(candidates=4))).draw(PROMPTS, seed=2)
    assert torch.equal(best.final_codes, kept.final_codes[::2])


def test_the_released_selection_counts_for_base_pictures_alone(parts: dict[str, object]) -> None:
    sampling = SamplingConfig(ranking=RankingConfig(applies="base_only"))
    drawn = _facade(parts, sampling=sampling).draw(PROMPTS, seed=2, candidates=4, keep=2)
    assert [pick.candidate for pick in drawn.picks] == [0, 1] * 4 and drawn.picks[0].score is not None
    base = _facade(parts, sampling=sampling, direct=None, iterative=None).draw(PROMPTS, seed=2, candidates=4)
    always = _facade(parts).draw(PROMPTS, seed=2, candidates=4)
    assert base.picks == always.picks and torch.equal(base.base_codes, always.base_codes)


@pytest.mark.parametrize(("candidates", "keep"), [(1, 2), (3, 0), (2, 5)])
def test_what_cannot_be_kept(parts: dict[str, object], candidates: int, keep: int) -> None:
    with pytest.raises(DataError, match="cannot be kept"):
        _facade(parts).draw(["red"], 0, candidates=candidates, keep=keep)


def test_a_style_changes_prompt_and_settings_but_not_the_caption(parts: dict[str, object]) -> None:
    facade = _facade(parts)
    style = Style(suffix="abc", sampling={"base": {"temperature": 3.0}})
    styled = facade.draw(["red"], 0, style=style, candidates=2, keep=2)
    by_hand = facade.with_sampling(style.sampling_for(facade.sampling)).draw(
        ["red abc"], 0, candidates=2, keep=2
    )
    order = [[pick.candidate for pick in drawn.picks].index(0) for drawn in (styled, by_hand)]
    assert torch.equal(styled.final_codes[order[0]], by_hand.final_codes[order[1]])
    scores = caption_log_likelihood(facade.coglm, facade.encode(["red"] * 2), styled.base_codes, VOCABULARY)
    torch.testing.assert_close(torch.tensor([pick.score for pick in styled.picks]), scores, atol=1e-4, rtol=0)
    assert facade.sampling.base.temperature == 1.15
    assert torch.equal(facade.draw(["red"], 0).base_codes, facade.draw(["red"], 0, style=Style()).base_codes)


def test_a_long_prompt_loses_its_end_and_never_its_style(parts: dict[str, object]) -> None:
    facade = _facade(parts)
    most, style = facade.coglm.config.text_length - 1, Style(suffix="abc")
    short, none = facade.encode_styled("red", style)
    assert none is None and short == facade.encode(["red abc"])[0]
    text = "red " * 200
    ids, note = facade.encode_styled(text, style)
    ending = facade.encode(["abc"])[0]
    assert len(ids) <= most and ids[-len(ending) :] == ending
    assert note is not None and f"room for {most}; its end was left out" in note and "\n" not in note
    plain, note = facade.encode_styled(text, Style())
    assert plain == facade.encode([text])[0][:most] and note is not None
    drawn = facade.draw([text, "red"], 0, style=style)
    assert len(drawn.notes) == 1 and facade.draw(["red"], 0).notes == ()


def test_other_schedules_reach_the_passes(parts: dict[str, object]) -> None:
    sampling = SamplingConfig(
        iterative=IterativeSRSamplingConfig(schedule="diagonal", window=4, rounds=3, top_k=(5,))
    )
    meter = Meter()
    _facade(parts, sampling=sampling).draw(["red"], 0, meter=meter)
    assert [cost.runs for cost in meter.costs] == [16, 1, 3]


PUBLISHED = CogLMConfig(layers=1, hidden=32, heads=2)
"""Published lengths and positions, a tiny network."""


@pytest.fixture(scope="module")
def published() -> dict[str, object]:
    """A cascade on the published grids, 20 and 60, with the published text lengths."""
    torch.manual_seed(1)
    models: list[nn.Module] = [
        CogLM(PUBLISHED, VOCABULARY.rows),
        DirectSR(PUBLISHED, DirectSRConfig(), 20, 3, VOCABULARY.rows),
        IterativeSR(PUBLISHED, IterativeSRConfig(), 60, VOCABULARY.rows),
    ]
    for model in models:
        _randomized(model)
    return dict(coglm=models[0], direct=models[1], iterative=models[2], base_grid=20)


@pytest.mark.parametrize("prompts", [["red"], ["a", "b" * 200, *PROMPTS, *PROMPTS, *PROMPTS, "y", "z"]])
def test_model_runs_of_the_whole_cascade(
    parts: dict[str, object], published: dict[str, object], prompts: list[str]
) -> None:
    """400 + 1 + 6 model runs for one image, and no more for 16 of them, one with a prompt of 200 tokens."""
    facade = _facade(parts | published)
    runs = {name: 0 for name in ("coglm", "direct", "iterative")}

    def count(name: str) -> None:
        runs[name] += 1

    hooks = [
        getattr(facade, name).register_forward_hook(lambda *_, name=name: count(name))  # type: ignore[misc]
        for name in runs
    ]
    meter = Meter()
    drawn = facade.draw(prompts, seed=0, meter=meter)
    for hook in hooks:
        hook.remove()
    assert runs == {"coglm": 400, "direct": 1, "iterative": 6} and sum(runs.values()) == 407
    assert drawn.final_codes.shape == (len(prompts), 3600)
    drawn.pixels()
    assert [(cost.stage, cost.runs, cost.pictures) for cost in meter.costs] == [
        ("base", 400, len(prompts)),
        ("direct", 1, len(prompts)),
        ("iterative", 6, len(prompts)),
        ("decode", 1, len(prompts)),
    ]
    assert all(cost.seconds > 0 and cost.peak_bytes >= 0 for cost in meter.costs)
    assert len(meter.table().splitlines()) == 5 and "base" in meter.table()


def test_ranking_costs_one_run_for_each_batch(parts: dict[str, object]) -> None:
    meter = Meter()
    _facade(parts, batch=3).draw(PROMPTS, seed=0, candidates=2, meter=meter)
    costs = {cost.stage: (cost.runs, cost.pictures) for cost in meter.costs}
    assert costs == {"base": (48, 8), "rank": (3, 8), "direct": (2, 4), "iterative": (12, 4)}


def test_the_meter_sees_memory(parts: dict[str, object]) -> None:
    """A stage that fills 64 MiB grows by about that, whatever the process held before."""
    meter, model = Meter(), nn.Linear(2, 2)
    ballast = torch.ones(200 << 20, dtype=torch.uint8)
    del ballast
    with meter.stage("small", model, 1):
        model(torch.zeros(1, 2))
    with meter.stage("big", model, 1):
        torch.ones(64 << 20, dtype=torch.uint8)
    small, big = meter.costs
    assert small.runs == 1 and big.runs == 0
    assert small.peak_bytes < 16 << 20 and 60 << 20 <= big.peak_bytes < 96 << 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(parts: dict[str, object], dtype: torch.dtype) -> None:
    halves = {name: copy.deepcopy(parts[name]).to(dtype) for name in ("coglm", "direct", "iterative")}  # type: ignore[attr-defined]
    drawn = _facade(parts | halves).draw(PROMPTS, seed=1, candidates=2)
    assert drawn.final_codes.shape == (4, 64) and drawn.pixels().dtype == torch.float32
