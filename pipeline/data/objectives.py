"""Training samples: a row of ids and a random generator in, tokens, labels, roles out (spec 2.6, 4.4, 5.2).

S is the sequence length. A row is the stored form of a text-image pair: text_length slots of text and pads,
then the base codes. labels[i] is the token after i; loss_mask[i] counts the prediction made at i.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cogview2.pipeline.config.model import CogLMConfig, DirectSRConfig, IterativeSRConfig
from cogview2.pipeline.config.stages import ObjectiveConfig
from cogview2.pipeline.errors import DataError
from cogview2.pipeline.models.coglm.masks import CONTEXT, HIDDEN, IMAGE, segment_role
from cogview2.pipeline.models.sr.layout import direct_row, iterative_row
from cogview2.pipeline.tokenizers.vocabulary import Vocabulary

PATCH_SIDE = 4
RELEASED_PATCH_SHARE = 0.8
PAPER_COVERAGE = 0.75
TEXT_MASK_SHARE = 0.15
MEAN_SPAN = 3
_FIRST_CAPTION_SEGMENT = 2
_CAPTIONS = 2

Normalisation = Literal["batch", "region"]
"""See ObjectiveConfig.loss_normalisation."""


@dataclass(frozen=True)
class Sample:
    """One training sample, all arrays [S]."""

    tokens: np.ndarray
    """int64 model ids."""
    position_ids: np.ndarray
    """int64."""
    labels: np.ndarray
    """int64; meaningless where there is no loss."""
    loss_mask: np.ndarray
    """bool."""
    roles: np.ndarray
    """int64: CogLM: see models/coglm/masks.py. Super-resolution: 1 at real text, else 0."""
    loss_weights: np.ndarray
    """float32: how much the prediction made at i counts; 0 where there is no loss. See `region_weights`."""


def region_weights(regions: np.ndarray, loss_normalisation: Normalisation) -> np.ndarray:
    """Return the weights w of a sample, float32 [S]; the loss of a micro batch is sum(w CE) / sum(w).

    Args:
        regions: int [S], 0 where there is no loss; positions of one mask region share a number.
        loss_normalisation: `batch`: 1 at every loss position (released). `region`: 1 / loss positions of the
            region, so that the loss is the mean over regions of the mean inside each (paper, eq. 2).
    """
    has_loss = regions > 0
    if loss_normalisation == "batch":
        return has_loss.astype(np.float32)
    return np.where(has_loss, 1 / np.maximum(np.bincount(regions)[regions], 1), 0).astype(np.float32)


def compose_row(
    captions: Sequence[Sequence[int]], base_codes: np.ndarray, text_length: int, vocabulary: Vocabulary
) -> np.ndarray:
    """Join captions and codes to the stored form: `zh <pad> en <pad> ... <pad> codes` (spec 2.6).

    Args:
        captions: model ids of at most two captions, in order; empty ones and pads inside are dropped.
        base_codes: [g * g] in raster order.
        text_length: text slots; the joined text is cut to text_length - 1, so that a pad always ends it.
        vocabulary: gives the pad id.

    Returns:
        int64 [text_length + g * g].

    Raises:
        DataError: more than two captions.
    """
    if len(captions) > 2:
        raise DataError(f"a row holds at most 2 captions, got {len(captions)}; choose two languages")
    text: list[int] = []
    for caption in captions:
        ids = [int(piece) for piece in caption if piece != vocabulary.pad]
        text += ([vocabulary.pad] if text and ids else []) + ids
    text = text[: text_length - 1]
    pads = [vocabulary.pad] * (text_length - len(text))
    return np.concatenate([np.array(text + pads, dtype=np.int64), np.asarray(base_codes, dtype=np.int64)])


def text_image_sample(
    row: np.ndarray,
    rng: np.random.Generator,
    *,
    objectives: ObjectiveConfig,
    config: CogLMConfig,
    vocabulary: Vocabulary,
) -> Sample:
    """Draw the objective by `caption_ratio`, then build the sample of a text-image row."""
    if rng.random() < objectives.caption_ratio:
        return understanding_sample(
            row,
            rng,
            patch_mode=objectives.patch_mode,
            caption_end=objectives.caption_end,
            loss_normalisation=objectives.loss_normalisation,
            config=config,
            vocabulary=vocabulary,
        )
    return generation_sample(
        row,
        rng,
        history_mask=objectives.history_mask,
        loss_normalisation=objectives.loss_normalisation,
        config=config,
        vocabulary=vocabulary,
    )


def _caption_spans(row: np.ndarray, text_length: int, pad: int) -> list[tuple[int, int]]:
    """Return [start, stop) of the one or two captions of a row."""
    pads = np.flatnonzero(row[:text_length] == pad)
    if pads.size == 0:
        raise DataError(
            f"a text-image row needs a pad ({pad}) in its {text_length} text slots; build it with compose_row"
        )
    spans = [(0, int(pads[0]))]
    if pads.size > 1 and pads[1] > pads[0] + 1:
        spans.append((int(pads[0]) + 1, int(pads[1])))
    return spans


def _next_tokens(tokens: np.ndarray) -> np.ndarray:
    return np.append(tokens[1:], tokens[-1])


def generation_sample(
    row: np.ndarray,
    rng: np.random.Generator,
    *,
    history_mask: float = 0.0,
    loss_normalisation: Normalisation = "batch",
    config: CogLMConfig,
    vocabulary: Vocabulary,
) -> Sample:
    """Text to image: one caption is context, the codes are predicted in raster order (spec 2.6 G).

    Args:
        row: int64 [text_length + g * g] of `compose_row`.
        rng: chooses the caption when there are two, and the codes to hide.
        history_mask: probability that codes are hidden as inputs, each with a chance drawn for the sample; every
            code is predicted all the same.
        loss_normalisation: see `region_weights`; the picture is one region.
        config: gives text_length and image_position.
        vocabulary: gives the special ids.
    """
    text_length = config.text_length
    spans = _caption_spans(row, text_length, vocabulary.pad)
    start, stop = spans[int(rng.integers(len(spans)))] if len(spans) > 1 else spans[0]
    start_of_image = text_length - 1
    tokens = row.astype(np.int64)
    labels = _next_tokens(tokens)
    tokens[start_of_image] = vocabulary.start_of_image
    if history_mask and rng.random() < history_mask:
        codes = tokens[text_length:]
        codes[rng.random(codes.size) < rng.random()] = vocabulary.start_of_image
    position_ids = np.zeros_like(tokens)
    position_ids[start:stop] = np.arange(stop - start)
    position_ids[start_of_image:] = config.image_position + np.arange(tokens.size - start_of_image)
    roles = np.full_like(tokens, HIDDEN)
    roles[start:stop] = CONTEXT
    roles[start_of_image:] = IMAGE
    regions = np.zeros_like(tokens)
    regions[start_of_image:-1] = 1
    weights = region_weights(regions, loss_normalisation)
    return Sample(tokens, position_ids, labels, regions > 0, roles, weights)


def patch_side(grid: int) -> int:
    """Return the side of a masked patch: 4 as published, half the grid below a grid of 8."""
    return max(1, min(PATCH_SIDE, grid // 2))


def draw_patches(
    grid: int, rng: np.random.Generator, patch_mode: str = "released"
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the masked patches of an understanding sample (spec 2.6 U).

    Args:
        grid: side of the base grid.
        rng: draws distinct upper-left corners; patches may overlap.
        patch_mode: `released` draws int(0.8 g^2 / side^2) corners in [0, g - side)^2, so the last row and
            column are never masked; `paper` draws corners anywhere until 75 % of the grid is masked.

    Returns:
        (masked bool, regions int64), both [grid, grid]: a cell has loss, and a region above 0, when its right
        neighbour belongs to the same patch; where patches overlap, the one drawn first has the cell.
    """
    side = patch_side(grid)
    released = patch_mode == "released"
    corners = max(1, grid - side) if released else grid - side + 1
    count = max(1, int(RELEASED_PATCH_SHARE * grid**2 / side**2)) if released else corners**2
    masked, regions = np.zeros((grid, grid), dtype=bool), np.zeros((grid, grid), dtype=np.int64)
    for number, corner in enumerate(rng.permutation(corners**2)[:count], start=1):
        if not released and masked.sum() >= PAPER_COVERAGE * grid**2:
            break
        row, column = divmod(int(corner), corners)
        masked[row : row + side, column : column + side] = True
        cells = regions[row : row + side, column : column + side - 1]
        cells[cells == 0] = number
    return masked, regions


def understanding_sample(
    row: np.ndarray,
    rng: np.random.Generator,
    *,
    patch_mode: str = "released",
    caption_end: bool = False,
    loss_normalisation: Normalisation = "batch",
    config: CogLMConfig,
    vocabulary: Vocabulary,
) -> Sample:
    """Captions in every language of the row, and masked patches; no <start_of_image> (spec 2.6 U).

    Args:
        row: int64 [text_length + g * g] of `compose_row`.
        rng: draws the patches.
        patch_mode: see `draw_patches`.
        caption_end: the last token of a caption predicts a pad. Not of a caption that fills all slots, which may
            have been cut, nor of an empty one.
        loss_normalisation: see `region_weights`; each caption and each patch is a region.
        config: gives text_length and image_position.
        vocabulary: gives the special ids and the language of a caption.
    """
    text_length = config.text_length
    tokens = row.astype(np.int64)
    tokens[1:text_length] = row[: text_length - 1]
    position_ids = np.zeros_like(tokens)
    roles = np.full_like(tokens, HIDDEN)
    regions = np.zeros_like(tokens)
    ends = []
    for index, (start, stop) in enumerate(_caption_spans(row, text_length, vocabulary.pad)):
        # Shifted by one, the caption fills [start + 1, stop + 1), and its start token takes the slot before.
        tokens[start] = vocabulary.start_of(vocabulary.language_of(row[start:stop].tolist()))
        position_ids[start : stop + 1] = np.arange(stop + 1 - start)
        roles[start : stop + 1] = segment_role(_FIRST_CAPTION_SEGMENT + index, reads_image=True)
        regions[start:stop] = 1 + index
        if caption_end and start < stop < text_length - 1:
            regions[stop] = 1 + index
            ends.append(stop)
    labels = _next_tokens(tokens)
    # Written as a label only: after the first of two captions the slot itself holds the next start token.
    labels[ends] = vocabulary.pad
    cells = tokens.size - text_length
    masked, patches = draw_patches(math.isqrt(cells), rng, patch_mode)
    position_ids[text_length:] = config.image_position + 1 + np.arange(cells)
    roles[text_length:] = np.where(masked.reshape(-1), IMAGE, CONTEXT)
    patches = patches.reshape(-1).astype(np.int64)
    regions[text_length:] = np.where(patches, _CAPTIONS + patches, 0)
    weights = region_weights(regions, loss_normalisation)
    return Sample(tokens, position_ids, labels, regions > 0, roles, weights)


def draw_text_regions(length: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Draw the regions [start, start + span] of a text sample as ordered (start, span) pairs (spec 2.6 T).

    They do not overlap. Spans follow Poisson(3), at least 1; their sum stays within 15 % of `length`. A text
    too short for the first drawn span gets one span that just fits.
    """
    budget = TEXT_MASK_SHARE * length
    draws = int(length / MEAN_SPAN * TEXT_MASK_SHARE) + 10
    spans = np.maximum(rng.poisson(MEAN_SPAN, draws), 1)
    spans = spans[np.cumsum(spans) <= budget]
    if spans.size == 0:
        spans = np.array([max(1, int(budget))])
    free = length - int(spans.sum())
    starts = np.sort(rng.choice(free, spans.size, replace=False)) + np.cumsum(spans) - spans
    return list(zip(starts.tolist(), spans.tolist(), strict=True))


def text_sample(
    ids: np.ndarray | Sequence[int],
    rng: np.random.Generator,
    *,
    loss_normalisation: Normalisation = "batch",
) -> Sample:
    """Pure text: masked regions are predicted from the text around them (spec 2.6 T).

    Args:
        ids: text ids, the whole sequence [S], at least 2.
        rng: draws the regions.
        loss_normalisation: see `region_weights`; each masked span is a region.
    """
    tokens = np.asarray(ids, dtype=np.int64)
    if tokens.size < 2:
        raise DataError(f"a text sample needs at least 2 ids, got {tokens.size}; pack more text together")
    roles = np.full_like(tokens, IMAGE)
    regions = np.zeros_like(tokens)
    free = 0
    for number, (start, span) in enumerate(draw_text_regions(tokens.size, rng), start=1):
        roles[free:start] = CONTEXT
        regions[start : start + span] = number
        free = start + span + 1
    weights = region_weights(regions, loss_normalisation)
    return Sample(tokens, np.arange(tokens.size), _next_tokens(tokens), regions > 0, roles, weights)


def _superres_sample(
    row: tuple[np.ndarray, np.ndarray, np.ndarray], codes: np.ndarray, masked: np.ndarray
) -> Sample:
    """Put labels, loss and text roles beside a laid-out row whose last cells are the high-resolution grid."""
    tokens, position_ids, real_text = row
    labels, roles = np.zeros_like(tokens), np.zeros_like(tokens)
    loss_mask = np.zeros(tokens.shape, dtype=bool)
    labels[-codes.size :] = codes
    loss_mask[-codes.size :] = masked
    roles[: real_text.size] = real_text
    return Sample(tokens, position_ids, labels, loss_mask, roles, loss_mask.astype(np.float32))


def direct_sr_sample(
    text_ids: Sequence[int],
    base_codes: np.ndarray,
    superres_codes: np.ndarray,
    *,
    config: DirectSRConfig,
    coglm: CogLMConfig,
    vocabulary: Vocabulary,
) -> Sample:
    """Predict every high-resolution code from text and base codes (spec 4.4).

    Args:
        text_ids: model ids of one caption.
        base_codes: [g * g].
        superres_codes: [G * G], G a multiple of g.
        config, coglm: sizes.
        vocabulary: gives the id of masked cells.

    Returns:
        labels[i] is the code of cell i itself (no shift); `roles` marks the real text for layout.level0_mask.

    Raises:
        DataError: the two grids do not fit.
    """
    codes = np.asarray(superres_codes, dtype=np.int64).reshape(-1)
    ratio, rest = divmod(math.isqrt(codes.size), math.isqrt(np.size(base_codes)))
    if rest or ratio**2 * np.size(base_codes) != codes.size:
        raise DataError(
            f"{codes.size} high-resolution codes do not fit {np.size(base_codes)} base codes: both must be "
            "squares, one side a multiple of the other; write the shards again"
        )
    row = direct_row(
        text_ids,
        base_codes,
        config=config,
        coglm=coglm,
        ratio=ratio,
        start_of_image=vocabulary.start_of_image,
    )
    return _superres_sample(row, codes, np.ones(codes.shape, dtype=bool))


def iterative_sr_sample(
    text_ids: Sequence[int],
    superres_codes: np.ndarray,
    rng: np.random.Generator,
    *,
    config: IterativeSRConfig,
    coglm: CogLMConfig,
    vocabulary: Vocabulary,
) -> Sample:
    """Predict masked high-resolution codes from their neighbourhood and text (spec 5.2).

    Args:
        text_ids: model ids of one caption.
        superres_codes: [G * G].
        rng: draws the mask ratio, then exactly round(ratio * G * G) cells.
        config, coglm: sizes and mask ratios.
        vocabulary: gives the id of masked cells.

    Returns:
        labels[i] is the code of cell i itself (no shift); `roles` marks the real text.
    """
    codes = np.asarray(superres_codes, dtype=np.int64).reshape(-1)
    ratio = config.mask_ratios[int(rng.integers(len(config.mask_ratios)))]
    masked = np.zeros(codes.shape, dtype=bool)
    masked[rng.permutation(codes.size)[: max(1, round(ratio * codes.size))]] = True
    row = iterative_row(
        text_ids, np.where(masked, vocabulary.start_of_image, codes), config=config, coglm=coglm
    )
    return _superres_sample(row, codes, masked)
