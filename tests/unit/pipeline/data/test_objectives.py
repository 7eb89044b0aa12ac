"""Sample builders at published and tiny sizes."""

import numpy as np
import pytest
import torch

from cogview2.pipeline.config.model import CogLMConfig, DirectSRConfig, IterativeSRConfig
from cogview2.pipeline.config.stages import ObjectiveConfig
from cogview2.pipeline.data.objectives import (
    Sample,
    compose_row,
    direct_sr_sample,
    draw_patches,
    draw_text_regions,
    generation_sample,
    iterative_sr_sample,
    patch_side,
    text_image_sample,
    text_sample,
    understanding_sample,
)
from cogview2.pipeline.errors import DataError
from cogview2.pipeline.models.coglm.masks import CONTEXT, HIDDEN, IMAGE, attention_mask
from cogview2.pipeline.tokenizers.vocabulary import Vocabulary

WORDS = Vocabulary.uniform(100, 86)
PAD, EN, ZH = WORDS.pad, WORDS.english[0], WORDS.chinese[0]
TINY = CogLMConfig(layers=1, hidden=8, heads=2, max_positions=128, text_length=8, image_position=16)


def _rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_row_joins_captions_and_always_ends_the_text_with_a_pad() -> None:
    row = compose_row([[ZH, ZH + 1], [EN]], np.arange(4), 8, WORDS)
    assert row.tolist() == [ZH, ZH + 1, PAD, EN, PAD, PAD, PAD, PAD, 0, 1, 2, 3]
    assert compose_row([[EN] * 20], np.arange(4), 8, WORDS)[:8].tolist() == [EN] * 7 + [PAD]
    assert compose_row([[], [EN, PAD, EN]], np.arange(4), 4, WORDS)[:4].tolist() == [EN, EN, PAD, PAD]
    with pytest.raises(DataError, match="at most 2"):
        compose_row([[EN]] * 3, np.arange(4), 8, WORDS)


def test_generation_sample() -> None:
    sample = generation_sample(
        compose_row([[EN, EN + 1]], np.arange(4), 8, WORDS), _rng(), config=TINY, vocabulary=WORDS
    )
    assert sample.tokens.tolist() == [EN, EN + 1, *[PAD] * 5, WORDS.start_of_image, 0, 1, 2, 3]
    assert sample.labels.tolist() == [EN + 1, *[PAD] * 6, 0, 1, 2, 3, 3]
    assert sample.position_ids.tolist() == [0, 1, 0, 0, 0, 0, 0, 16, 17, 18, 19, 20]
    assert sample.loss_mask.nonzero()[0].tolist() == [7, 8, 9, 10]
    assert sample.roles.tolist() == [CONTEXT] * 2 + [HIDDEN] * 5 + [IMAGE] * 5
    assert {array.dtype for array in (sample.tokens, sample.labels, sample.roles)} == {np.dtype(np.int64)}


def test_generation_chooses_either_language() -> None:
    row = compose_row([[ZH, ZH], [EN]], np.arange(4), 8, WORDS)
    chosen = {
        tuple(generation_sample(row, _rng(seed), config=TINY, vocabulary=WORDS).roles[:7])
        for seed in range(20)
    }
    assert chosen == {
        (CONTEXT, CONTEXT, *[HIDDEN] * 5),
        (HIDDEN, HIDDEN, HIDDEN, CONTEXT, *[HIDDEN] * 3),
    }


def test_a_history_mask_hides_inputs_and_nothing_else() -> None:
    row = compose_row([[EN, EN + 1]], np.arange(64), 8, WORDS)
    plain = generation_sample(row, _rng(), config=TINY, vocabulary=WORDS)
    shares = []
    for seed in range(400):
        sample = generation_sample(row, _rng(seed), history_mask=0.5, config=TINY, vocabulary=WORDS)
        hidden = sample.tokens != plain.tokens
        assert not hidden[:8].any() and (sample.tokens[hidden] == WORDS.start_of_image).all()
        for name in ("labels", "position_ids", "loss_mask", "roles"):
            assert (getattr(sample, name) == getattr(plain, name)).all(), name
        shares.append(hidden[8:].mean())
    spared = np.array(shares) == 0
    assert 0.4 < spared.mean() < 0.6
    # The chance differs between samples, from hardly any code to all but all.
    assert np.std(np.array(shares)[~spared]) > 0.2 and max(shares) > 0.95


def test_generation_without_a_caption_has_no_context() -> None:
    row = compose_row([], np.arange(4), 8, WORDS)
    sample = generation_sample(row, _rng(), config=TINY, vocabulary=WORDS)
    assert not (sample.roles == CONTEXT).any() and sample.loss_mask.sum() == 4


def test_understanding_sample_shifts_text_and_predicts_both_captions() -> None:
    row = compose_row([[ZH, ZH + 1], [EN]], np.arange(64), 8, WORDS)
    sample = understanding_sample(row, _rng(), config=TINY, vocabulary=WORDS)
    zh, en = WORDS.start_of_chinese, WORDS.start_of_english
    assert sample.tokens[:8].tolist() == [zh, ZH, ZH + 1, en, EN, PAD, PAD, PAD]
    assert sample.position_ids[:9].tolist() == [0, 1, 2, 0, 1, 0, 0, 0, 17]
    assert sample.loss_mask[:8].nonzero()[0].tolist() == [0, 1, 3]
    assert sample.labels[:4].tolist() == [ZH, ZH + 1, en, EN]
    mask = attention_mask(torch.from_numpy(sample.roles)[None])[0, 0]
    assert mask[[0, 1, 2, 3, 4]][:, :8].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 0, 0, 0],
    ]
    assert mask[:5, 8:].all() and not mask[8:, :8].any()


def test_longest_caption_fills_the_shifted_text() -> None:
    row = compose_row([[EN] * 7], np.arange(4), 8, WORDS)
    sample = understanding_sample(row, _rng(), config=TINY, vocabulary=WORDS)
    assert sample.tokens[:8].tolist() == [WORDS.start_of_english, *[EN] * 7]
    assert sample.loss_mask[:8].tolist() == [True] * 7 + [False]


def _captions_with_end(captions: list[list[int]], **options: object) -> Sample:
    row = compose_row(captions, np.arange(64), 8, WORDS)
    return understanding_sample(row, _rng(), config=TINY, vocabulary=WORDS, **options)  # type: ignore[arg-type]


def test_a_caption_end_is_one_more_label_and_nothing_else() -> None:
    captions = [[ZH, ZH + 1], [EN]]
    plain, sample = _captions_with_end(captions), _captions_with_end(captions, caption_end=True)
    assert sample.loss_mask[:8].nonzero()[0].tolist() == [0, 1, 2, 3, 4]
    # Slot 3 holds the start token of the second caption, and is no continuation of the first.
    assert sample.labels[:5].tolist() == [ZH, ZH + 1, PAD, EN, PAD]
    for name in ("tokens", "position_ids", "roles"):
        assert np.array_equal(getattr(sample, name), getattr(plain, name)), name
    assert np.array_equal(sample.loss_mask[8:], plain.loss_mask[8:])
    added = sample.loss_mask & ~plain.loss_mask
    assert added.nonzero()[0].tolist() == [2, 4] and (sample.labels[added] == PAD).all()
    assert np.array_equal(sample.labels[~added], plain.labels[~added])


@pytest.mark.parametrize(
    ("captions", "losses"),
    [
        ([[EN] * 7], [0, 1, 2, 3, 4, 5, 6]),
        ([[EN] * 9], [0, 1, 2, 3, 4, 5, 6]),
        ([[EN] * 6], [0, 1, 2, 3, 4, 5, 6]),
        ([[ZH] * 3, [EN] * 5], [0, 1, 2, 3, 4, 5, 6]),
        ([], []),
    ],
)
def test_no_end_is_predicted_of_a_caption_that_may_be_cut_or_is_empty(
    captions: list[list[int]], losses: list[int]
) -> None:
    sample = _captions_with_end(captions, caption_end=True)
    assert sample.loss_mask[:8].nonzero()[0].tolist() == losses
    ends = sample.labels[:8][sample.loss_mask[:8]] == PAD
    cut = captions and sum(map(len, captions)) + len(captions) - 1 >= 7
    assert ends.sum() == max(0, len(captions) - bool(cut))


def test_weights_of_a_region_sum_to_one_and_a_batch_counts_every_position() -> None:
    captions = [[ZH, ZH + 1], [EN]]
    plain = _captions_with_end(captions, caption_end=True)
    assert plain.loss_weights.dtype == np.float32
    assert np.array_equal(plain.loss_weights, plain.loss_mask)
    sample = _captions_with_end(captions, caption_end=True, loss_normalisation="region")
    for name in ("tokens", "position_ids", "labels", "loss_mask", "roles"):
        assert np.array_equal(getattr(sample, name), getattr(plain, name)), name
    np.testing.assert_allclose(sample.loss_weights[:8], [1 / 3] * 3 + [1 / 2] * 2 + [0] * 3, rtol=1e-6)
    # Slowly, for the patches: who has a cell, cell by cell.
    rng, owner = _rng(), np.zeros((8, 8), dtype=int)
    for number, corner in enumerate(rng.permutation(4**2)[: int(0.8 * 64 / 16)], start=1):
        top, left = divmod(int(corner), 4)
        for row in range(top, top + 4):
            for column in range(left, left + 3):
                owner[row, column] = owner[row, column] or number
    for number in np.unique(owner[owner > 0]):
        cells = (owner == number).reshape(-1)
        np.testing.assert_allclose(sample.loss_weights[8:][cells], 1 / cells.sum(), rtol=1e-6)
    assert not sample.loss_weights[8:][owner.reshape(-1) == 0].any()


def test_overlapping_patches_share_no_cell() -> None:
    regions = [draw_patches(20, _rng(seed))[1] for seed in range(20)]
    sizes = [np.bincount(each.reshape(-1), minlength=21)[1:] for each in regions]
    assert all(size.max() <= 12 for size in sizes) and min(size.min() for size in sizes) < 12
    assert all((each > 0).sum() == size.sum() for each, size in zip(regions, sizes, strict=True))


def test_regions_of_generation_and_of_text() -> None:
    row = compose_row([[EN]], np.arange(64), 8, WORDS)
    sample = generation_sample(row, _rng(), loss_normalisation="region", config=TINY, vocabulary=WORDS)
    np.testing.assert_allclose(sample.loss_weights[sample.loss_mask], 1 / 64, rtol=1e-6)
    regions = draw_text_regions(200, _rng(4))
    text = text_sample(np.arange(100, 300), _rng(4), loss_normalisation="region")
    assert text.loss_weights.sum() == pytest.approx(len(regions), rel=1e-5)
    for start, span in regions:
        np.testing.assert_allclose(text.loss_weights[start : start + span], 1 / span, rtol=1e-6)
    assert np.array_equal(text.loss_weights > 0, text.loss_mask)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_the_mixture_hands_every_choice_on(ratio: float) -> None:
    row = compose_row([[EN]], np.arange(64), 8, WORDS)
    objectives = ObjectiveConfig(caption_ratio=ratio, caption_end=True, loss_normalisation="region")
    sample = text_image_sample(row, _rng(), objectives=objectives, config=TINY, vocabulary=WORDS)
    assert 0 < sample.loss_weights[sample.loss_mask].min() < 1
    assert (sample.labels[sample.loss_mask] == PAD).sum() == ratio


def test_released_patches_have_the_measured_coverage() -> None:
    draws = [draw_patches(20, _rng(seed)) for seed in range(300)]
    masked = np.mean([mask.mean() for mask, _ in draws])
    loss = np.mean([(regions > 0).mean() for _, regions in draws])
    assert masked == pytest.approx(0.518, abs=0.012) and loss == pytest.approx(0.429, abs=0.012)
    assert not any(mask[19].any() or mask[:, 19].any() for mask, _ in draws)


def test_paper_patches_reach_three_quarters_and_every_cell() -> None:
    draws = [draw_patches(20, _rng(seed), "paper")[0] for seed in range(50)]
    assert all(300 <= mask.sum() < 316 for mask in draws)
    assert np.any(draws, axis=0).all()


@pytest.mark.parametrize("mode", ["released", "paper"])
@pytest.mark.parametrize("grid", [1, 2, 3, 4, 5, 7, 8, 16, 20])
def test_patches_fit_every_grid(grid: int, mode: str) -> None:
    for seed in range(5):
        masked, regions = draw_patches(grid, _rng(seed), mode)
        loss = regions > 0
        assert masked.shape == (grid, grid) and masked.any()
        assert loss.any() == (patch_side(grid) > 1)
        assert (
            not loss[:, -1].any()
            and (masked[:, :-1] | ~loss[:, :-1]).all()
            and (masked[:, 1:] | ~loss[:, :-1]).all()
        )


@pytest.mark.parametrize("length", [2, 3, 10, 24, 88, 512])
def test_text_regions_lie_inside_and_do_not_overlap(length: int) -> None:
    for seed in range(50):
        regions = draw_text_regions(length, _rng(seed))
        assert regions and all(span >= 1 for _, span in regions)
        assert regions[0][0] >= 0 and regions[-1][0] + regions[-1][1] < length
        assert all(a + span < b for (a, span), (b, _) in zip(regions, regions[1:], strict=False))
        assert sum(span for _, span in regions) <= max(1, 0.15 * length)


def test_text_sample_has_context_between_regions_and_a_causal_tail() -> None:
    sample = text_sample(np.arange(100, 140), _rng(3))
    assert sample.position_ids.tolist() == list(range(40))
    assert sample.labels.tolist() == [*range(101, 140), 139]
    region = sample.loss_mask | np.roll(sample.loss_mask, 1)
    last = region.nonzero()[0].max()
    assert (sample.roles[: last + 1] == np.where(region, IMAGE, CONTEXT)[: last + 1]).all()
    assert (sample.roles[last + 1 :] == IMAGE).all()
    with pytest.raises(DataError, match="at least 2"):
        text_sample([1], _rng())


def test_mixture_follows_the_ratio() -> None:
    row = compose_row([[EN]], np.arange(4), 8, WORDS)
    objectives = ObjectiveConfig(caption_ratio=0.3)
    rng = _rng()
    draws = [
        text_image_sample(row, rng, objectives=objectives, config=TINY, vocabulary=WORDS) for _ in range(600)
    ]
    captions = np.mean([sample.tokens[0] == WORDS.start_of_english for sample in draws])
    assert captions == pytest.approx(0.3, abs=0.06)


def test_direct_sr_sample() -> None:
    config = DirectSRConfig(text_length=4)
    sample = direct_sr_sample(
        [EN, EN + 1], np.arange(4), np.arange(20, 36), config=config, coglm=TINY, vocabulary=WORDS
    )
    assert sample.tokens.tolist() == [0, 0, EN, EN + 1, 0, 1, 2, 3] + [WORDS.start_of_image] * 16
    assert sample.position_ids.tolist() == [0, 0, 0, 1, 17, 18, 19, 20, *range(128, 144)]
    assert sample.labels[8:].tolist() == list(range(20, 36))
    assert sample.loss_mask.nonzero()[0].tolist() == list(range(8, 24))
    assert sample.roles.nonzero()[0].tolist() == [2, 3]
    with pytest.raises(DataError, match="do not fit"):
        direct_sr_sample([EN], np.arange(4), np.arange(9), config=config, coglm=TINY, vocabulary=WORDS)


def test_iterative_sr_sample_masks_whole_numbers_of_cells() -> None:
    config, codes = IterativeSRConfig(text_length=3), np.arange(100) % 50
    counts = set()
    for seed in range(40):
        sample = iterative_sr_sample([EN], codes, _rng(seed), config=config, coglm=TINY, vocabulary=WORDS)
        masked = sample.loss_mask[3:]
        counts.add(int(masked.sum()))
        assert np.array_equal(sample.tokens[3:], np.where(masked, WORDS.start_of_image, codes))
        assert np.array_equal(sample.labels[3:], codes)
        assert not sample.loss_mask[:3].any() and sample.roles[:3].tolist() == [0, 0, 1]
    assert counts == {20, 40, 60, 80, 90}


def test_same_generator_same_sample() -> None:
    row = compose_row([[ZH, ZH], [EN]], np.arange(64), 8, WORDS)
    first, second = (
        understanding_sample(row, _rng(7), patch_mode="paper", config=TINY, vocabulary=WORDS)
        for _ in range(2)
    )
    assert np.array_equal(first.roles, second.roles) and np.array_equal(first.loss_mask, second.loss_mask)


def test_a_row_without_a_pad_is_refused() -> None:
    row = np.concatenate([np.full(8, EN), np.arange(4)])
    with pytest.raises(DataError, match="compose_row"):
        generation_sample(row, _rng(), config=TINY, vocabulary=WORDS)
