"""The facade: a picture depends on its prompt, seed and number alone."""

import copy

import pytest
import torch
from tiny_cascade import BASE, VOCABULARY, facade, make_parts, randomize
from torch import nn

from cogview2.pipeline.config.model import CogLMConfig, DirectSRConfig, IterativeSRConfig
from cogview2.pipeline.config.sampling import IterativeSRSamplingConfig, RankingConfig, SamplingConfig
from cogview2.pipeline.errors import ConfigError, DataError
from cogview2.pipeline.models.coglm.model import CogLM
from cogview2.pipeline.models.sr.direct import DirectSR
from cogview2.pipeline.models.sr.iterative import IterativeSR
from cogview2.pipeline.sampling.meter import Meter
from cogview2.pipeline.sampling.reranking import caption_log_likelihood
from cogview2.pipeline.sampling.styles import Style
from cogview2.pipeline.sampling.text_to_image import Pick

PROMPTS = ["red", "a blue one", "x", "green"]


@pytest.fixture(scope="module")
def parts() -> dict[str, object]:
    return make_parts()


@pytest.mark.parametrize("batch", [1, 3])
def test_pictures_do_not_depend_on_the_batch(parts: dict[str, object], batch: int) -> None:
    whole = facade(parts).draw(PROMPTS, seed=9)
    other = facade(parts, batch).draw(PROMPTS, seed=9)
    for name in ("base_codes", "direct_codes", "final_codes"):
        assert torch.equal(getattr(whole, name), getattr(other, name))
    rest = facade(parts, batch).draw(PROMPTS[2:], seed=9, first_number=2)
    assert torch.equal(rest.final_codes, whole.final_codes[2:])


def test_seed_and_number_change_the_picture(parts: dict[str, object]) -> None:
    cascade = facade(parts)
    codes = [cascade.draw(["red"], seed, number).base_codes for seed, number in [(0, 0), (1, 0), (0, 1)]]
    assert not torch.equal(codes[0], codes[1]) and not torch.equal(codes[0], codes[2])


def test_pixels_of_every_pass(parts: dict[str, object]) -> None:
    drawn = facade(parts, batch=3).draw(PROMPTS, seed=0)
    assert drawn.pictures == ("base", "direct", "final")
    assert drawn.pixels("base").shape == (4, 3, 32, 32)
    assert drawn.pixels("direct").shape == drawn.pixels().shape == (4, 3, 64, 64)
    assert 0 <= drawn.pixels().min() and drawn.pixels().max() <= 1


def test_without_super_resolution(parts: dict[str, object]) -> None:
    drawn = facade(parts, direct=None, iterative=None).draw(PROMPTS, seed=0)
    assert drawn.direct_codes is None and torch.equal(drawn.final_codes, drawn.base_codes)
    assert torch.equal(drawn.pixels("final"), drawn.pixels("base"))
    with pytest.raises(DataError, match="no picture 'direct'"):
        drawn.pixels("direct")
    only_direct = facade(parts, iterative=None).draw(PROMPTS, seed=0)
    assert only_direct.direct_codes is not None
    assert torch.equal(only_direct.final_codes, only_direct.direct_codes)


@pytest.mark.parametrize("prompts", [[], ["red", ""], ["  "]])
def test_nothing_to_draw_is_refused(parts: dict[str, object], prompts: list[str]) -> None:
    with pytest.raises(DataError, match="nothing to draw|is empty"):
        facade(parts).draw(prompts, seed=0)


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
        facade(parts, **changes)


def test_the_first_candidate_is_the_picture_without_candidates(parts: dict[str, object]) -> None:
    cascade = facade(parts)
    alone = cascade.draw(PROMPTS, seed=9)
    every = cascade.draw(PROMPTS, seed=9, candidates=3, keep=3)
    assert alone.picks == tuple(Pick(prompt) for prompt in range(4)) and len(every.picks) == 12
    for prompt in range(4):
        (row,) = [row for row, pick in enumerate(every.picks) if (pick.prompt, pick.candidate) == (prompt, 0)]
        for name in ("base_codes", "direct_codes", "final_codes"):
            assert torch.equal(getattr(every, name)[row], getattr(alone, name)[prompt])
    assert len(every.base_codes.unique(dim=0)) == 12  # every candidate has noise of its own


@pytest.mark.parametrize("batch", [2, 5, 16])
def test_only_the_best_candidates_go_on(parts: dict[str, object], batch: int) -> None:
    """Scores are those of the prompt as caption; what is kept is what comes first by them, super-resolution on."""
    cascade = facade(parts, batch)
    every = cascade.draw(PROMPTS, seed=2, candidates=4, keep=4)
    scores = caption_log_likelihood(
        cascade.coglm,
        cascade.encode([PROMPTS[pick.prompt] for pick in every.picks]),
        every.base_codes,
        VOCABULARY,
    )
    torch.testing.assert_close(torch.tensor([pick.score for pick in every.picks]), scores, atol=1e-4, rtol=0)
    kept = cascade.draw(PROMPTS, seed=2, candidates=4, keep=2)
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
    best = cascade.with_sampling(SamplingConfig(ranking=RankingConfig(candidates=4))).draw(PROMPTS, seed=2)
    assert torch.equal(best.final_codes, kept.final_codes[::2])


def test_the_released_selection_counts_for_base_pictures_alone(parts: dict[str, object]) -> None:
    sampling = SamplingConfig(ranking=RankingConfig(applies="base_only"))
    drawn = facade(parts, sampling=sampling).draw(PROMPTS, seed=2, candidates=4, keep=2)
    assert [pick.candidate for pick in drawn.picks] == [0, 1] * 4 and drawn.picks[0].score is not None
    base = facade(parts, sampling=sampling, direct=None, iterative=None).draw(PROMPTS, seed=2, candidates=4)
    always = facade(parts).draw(PROMPTS, seed=2, candidates=4)
    assert base.picks == always.picks and torch.equal(base.base_codes, always.base_codes)


@pytest.mark.parametrize(("candidates", "keep"), [(1, 2), (3, 0), (2, 5)])
def test_what_cannot_be_kept(parts: dict[str, object], candidates: int, keep: int) -> None:
    with pytest.raises(DataError, match="cannot be kept"):
        facade(parts).draw(["red"], 0, candidates=candidates, keep=keep)


def test_a_style_changes_prompt_and_settings_but_not_the_caption(parts: dict[str, object]) -> None:
    cascade = facade(parts)
    style = Style(suffix="abc", sampling={"base": {"temperature": 3.0}})
    styled = cascade.draw(["red"], 0, style=style, candidates=2, keep=2)
    by_hand = cascade.with_sampling(style.sampling_for(cascade.sampling)).draw(
        ["red abc"], 0, candidates=2, keep=2
    )
    order = [[pick.candidate for pick in drawn.picks].index(0) for drawn in (styled, by_hand)]
    assert torch.equal(styled.final_codes[order[0]], by_hand.final_codes[order[1]])
    scores = caption_log_likelihood(cascade.coglm, cascade.encode(["red"] * 2), styled.base_codes, VOCABULARY)
    torch.testing.assert_close(torch.tensor([pick.score for pick in styled.picks]), scores, atol=1e-4, rtol=0)
    assert cascade.sampling.base.temperature == 1.15
    assert torch.equal(
        cascade.draw(["red"], 0).base_codes, cascade.draw(["red"], 0, style=Style()).base_codes
    )


def test_a_long_prompt_loses_its_end_and_never_its_style(parts: dict[str, object]) -> None:
    cascade = facade(parts)
    most, style = cascade.coglm.config.text_length - 1, Style(suffix="abc")
    short, none = cascade.encode_styled("red", style)
    assert none is None and short == cascade.encode(["red abc"])[0]
    text = "red " * 200
    ids, note = cascade.encode_styled(text, style)
    ending = cascade.encode(["abc"])[0]
    assert len(ids) <= most and ids[-len(ending) :] == ending
    assert note is not None and f"room for {most}; its end was left out" in note and "\n" not in note
    plain, note = cascade.encode_styled(text, Style())
    assert plain == cascade.encode([text])[0][:most] and note is not None
    drawn = cascade.draw([text, "red"], 0, style=style)
    assert len(drawn.notes) == 1 and cascade.draw(["red"], 0).notes == ()


def test_other_schedules_reach_the_passes(parts: dict[str, object]) -> None:
    sampling = SamplingConfig(
        iterative=IterativeSRSamplingConfig(schedule="diagonal", window=4, rounds=3, top_k=(5,))
    )
    meter = Meter()
    facade(parts, sampling=sampling).draw(["red"], 0, meter=meter)
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
        randomize(model)
    return dict(coglm=models[0], direct=models[1], iterative=models[2], base_grid=20)


@pytest.mark.parametrize("prompts", [["red"], ["a", "b" * 200, *PROMPTS, *PROMPTS, *PROMPTS, "y", "z"]])
def test_model_runs_of_the_whole_cascade(
    parts: dict[str, object], published: dict[str, object], prompts: list[str]
) -> None:
    """400 + 1 + 6 model runs for one image, and no more for 16 of them, one with a prompt of 200 tokens."""
    cascade = facade(parts | published)
    runs = {name: 0 for name in ("coglm", "direct", "iterative")}

    def count(name: str) -> None:
        runs[name] += 1

    hooks = [
        getattr(cascade, name).register_forward_hook(lambda *_, name=name: count(name))  # type: ignore[misc]
        for name in runs
    ]
    meter = Meter()
    drawn = cascade.draw(prompts, seed=0, meter=meter)
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
    facade(parts, batch=3).draw(PROMPTS, seed=0, candidates=2, meter=meter)
    costs = {cost.stage: (cost.runs, cost.pictures) for cost in meter.costs}
    assert costs == {"base": (48, 8), "rank": (3, 8), "direct": (2, 4), "iterative": (12, 4)}


def test_the_meter_sees_memory(parts: dict[str, object]) -> None:
    """A stage that fills 64 MiB grows by about that, whatever the process held before."""
    peaks = []
    for _ in range(4):  # the kernel may take pages away meanwhile, or give them back
        meter, model = Meter(), nn.Linear(2, 2)
        ballast = torch.ones(200 << 20, dtype=torch.uint8)
        del ballast
        with meter.stage("small", model, 1):
            model(torch.zeros(1, 2))
        with meter.stage("big", model, 1):
            torch.ones(64 << 20, dtype=torch.uint8)
        small, big = meter.costs
        assert small.runs == 1 and big.runs == 0
        peaks.append((small.peak_bytes >> 20, big.peak_bytes >> 20))
    assert any(small < 16 and 60 <= big < 96 for small, big in peaks), peaks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(parts: dict[str, object], dtype: torch.dtype) -> None:
    halves = {name: copy.deepcopy(parts[name]).to(dtype) for name in ("coglm", "direct", "iterative")}  # type: ignore[attr-defined]
    drawn = facade(parts | halves).draw(PROMPTS, seed=1, candidates=2)
    assert drawn.final_codes.shape == (4, 64) and drawn.pixels().dtype == torch.float32
