"""How well a text describes an image, by the likelihood of the text as its caption (spec 3.5).

Dims: B batch, S sequence, M base codes, D hidden.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from cogview2.pipeline.models.coglm.masks import CONTEXT, HIDDEN, attention_mask, segment_role
from cogview2.pipeline.models.coglm.model import CogLM
from cogview2.pipeline.sampling.inference import device_of, inference
from cogview2.pipeline.tokenizers.vocabulary import Vocabulary

Start = Literal["language", "english", "chinese"]
Softmax = Literal["all", "text"]
Reduce = Literal["mean", "sum"]
_CAPTION = segment_role(2)
_ROWS = 256
"""Positions whose logits exist at one time: 256 x 150010 float32 are 154 MB."""


class Ranking(NamedTuple):
    """The candidates of one text, best first."""

    order: torch.Tensor
    """int64 [B], indices of the candidates."""
    scores: torch.Tensor
    """float32 [B], log likelihoods in nats, in the order of the candidates as given."""


def _start_token(ids: Sequence[int], vocabulary: Vocabulary, start: Start) -> int:
    language = {"english": "en", "chinese": "zh"}.get(start) or vocabulary.language_of(ids)
    return vocabulary.start_of(language)


def _lay_out(
    captions: Sequence[Sequence[int]],
    base_codes_BM: torch.Tensor,
    starts: Sequence[int],
    model: CogLM,
    pad: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tokens, position ids and roles [B, S] of [image codes | start token | caption | pads]."""
    batch, cells = base_codes_BM.shape
    longest = max(map(len, captions))
    tokens_BS = torch.full((batch, cells + 1 + longest), pad)
    positions_BS = torch.zeros_like(tokens_BS)
    roles_BS = torch.full_like(tokens_BS, HIDDEN)
    tokens_BS[:, :cells] = base_codes_BM
    positions_BS[:, :cells] = model.config.image_position + 1 + torch.arange(cells)
    roles_BS[:, :cells] = CONTEXT
    for row, (start, ids) in enumerate(zip(starts, captions, strict=True)):
        end = cells + 1 + len(ids)
        tokens_BS[row, cells:end] = torch.tensor([start, *ids])
        positions_BS[row, cells:end] = torch.arange(len(ids) + 1)
        roles_BS[row, cells:end] = _CAPTION
    return tokens_BS, positions_BS, roles_BS


def _token_losses(
    model: CogLM, hidden_PD: torch.Tensor, targets_P: torch.Tensor, vocabulary: Vocabulary, softmax: Softmax
) -> torch.Tensor:
    """Return -log p of every target in nats, float32 [P]; logits exist for `_ROWS` of them at a time."""
    parts = []
    for hidden, targets in zip(hidden_PD.split(_ROWS), targets_P.split(_ROWS), strict=True):
        if softmax == "text":
            logits = model.logits(hidden, vocabulary.text_end)[:, vocabulary.image_codes :]
            targets = targets - vocabulary.image_codes
        else:
            logits = model.logits(hidden)
        parts.append(F.cross_entropy(logits, targets, reduction="none"))
    return torch.cat(parts)


def caption_log_likelihood(
    model: CogLM,
    text_ids: Sequence[Sequence[int]],
    base_codes_BM: torch.Tensor,
    vocabulary: Vocabulary,
    *,
    start: Start = "language",
    softmax: Softmax = "all",
    reduce: Reduce = "mean",
) -> torch.Tensor:
    """Return log p(text | image) in nats over each text's tokens, float32 [B] on the CPU (spec 3.5).

    The image sees itself and no text; a text token sees the image and the text before it. The softmax runs in
    float32. Position 0 is the start token's, as in training.

    Args:
        model: on any device, in any mode; its mode is restored.
        text_ids: model ids of each text without special tokens; the first text_length - 1 count.
        base_codes_BM: int64, one image for each text.
        vocabulary: the id layout.
        start: the token before the text: `language` takes the one that training puts before such ids,
            `english` or `chinese` always that one; the released script always takes <start_of_chinese>.
        softmax: `all` rows of the embedding (released), or `text` pieces alone, without image codes and special
            tokens (CogView).
        reduce: `mean` over the tokens (released) or `sum` (CogView).

    Raises:
        ValueError: an empty text, ids outside a `text` softmax, or not one image for each text.
    """
    if base_codes_BM.ndim != 2 or len(base_codes_BM) != len(text_ids):
        raise ValueError(
            f"{len(text_ids)} texts need codes of {len(text_ids)} images, got {list(base_codes_BM.shape)}"
        )
    captions = [list(ids)[: model.config.text_length - 1] for ids in text_ids]
    if not captions:
        return torch.empty(0)
    if not all(captions):
        raise ValueError(f"text {captions.index([])} has no tokens, so no likelihood; leave empty texts out")
    strange = [token for ids in captions for token in ids if not vocabulary.is_text(token)]
    if strange and softmax == "text":
        raise ValueError(f"id {strange[0]} is not text, so no text softmax holds it; leave it out")
    starts = [_start_token(ids, vocabulary, start) for ids in captions]
    device, cells = device_of(model), base_codes_BM.shape[1]
    tokens_BS, positions_BS, roles_BS = (
        part.to(device) for part in _lay_out(captions, base_codes_BM, starts, model, vocabulary.pad)
    )
    with inference(model):
        hidden_BSD = model(tokens_BS, positions_BS, attention_mask(roles_BS))
        scored_BS = roles_BS[:, cells + 1 :] == _CAPTION
        hidden_PD = hidden_BSD[:, cells:-1][scored_BS]
        targets_P = tokens_BS[:, cells + 1 :][scored_BS]
        losses_P = _token_losses(model, hidden_PD, targets_P, vocabulary, softmax).cpu()
    parts = losses_P.split([len(ids) for ids in captions])
    return torch.stack([-(part.mean() if reduce == "mean" else part.sum()) for part in parts])


def rank(
    model: CogLM,
    text_ids: Sequence[int],
    base_codes_BM: torch.Tensor,
    vocabulary: Vocabulary,
    *,
    start: Start = "language",
    softmax: Softmax = "all",
    reduce: Reduce = "mean",
    batch: int = 16,
) -> Ranking:
    """Order candidate images of one text, the likeliest caption first; ties keep their order.

    Args:
        model, vocabulary, start, softmax, reduce: see `caption_log_likelihood`.
        text_ids: model ids of the text.
        base_codes_BM: int64, the candidates.
        batch: candidates scored together.
    """
    scores = torch.cat(
        [
            caption_log_likelihood(
                model,
                [text_ids] * len(codes),
                codes,
                vocabulary,
                start=start,
                softmax=softmax,
                reduce=reduce,
            )
            for codes in base_codes_BM.split(batch)
        ]
    )
    return Ranking(scores.argsort(descending=True, stable=True), scores)
