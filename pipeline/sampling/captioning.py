"""Captions of pictures by the language model that draws them (spec 2.6 U, 7).

Dims: B pictures, R rows (pictures times candidates), S sequence, M base codes, V ids that can be drawn, U tokens of a
caption with its end. The sequence is that of understanding samples: [base codes | start of the language | caption],
the codes see each other, a text token sees all codes and the text before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from cogview2.pipeline.config.data import Language
from cogview2.pipeline.config.sampling import CaptioningConfig
from cogview2.pipeline.errors import ConfigError
from cogview2.pipeline.models.coglm.masks import CONTEXT, attention_mask, segment_role
from cogview2.pipeline.models.coglm.model import CogLM
from cogview2.pipeline.sampling import autoregressive
from cogview2.pipeline.sampling.autoregressive import UNKNOWN, fill_unknown
from cogview2.pipeline.sampling.decoding import draw_top_k
from cogview2.pipeline.sampling.inference import device_of
from cogview2.pipeline.sampling.noise import uniforms
from cogview2.pipeline.tokenizers.text import TextTokenizer
from cogview2.pipeline.tokenizers.vocabulary import CONTROL_PIECES

SENTENCE_ENDS = frozenset(
    ".!?\N{IDEOGRAPHIC FULL STOP}\N{FULLWIDTH EXCLAMATION MARK}\N{FULLWIDTH QUESTION MARK}"
)
_LEAST_KEPT = 8
"""Tokens: the mean of a few tokens says little."""
_LEAST_REPEATED = 3
"""Tokens that must come again before a caption counts as going round in circles."""


class Describer(Protocol):
    """What is needed of a cascade (text_to_image.TextToImage)."""

    tokenizer: TextTokenizer
    coglm: CogLM


@dataclass(frozen=True)
class Caption:
    """One caption of one picture."""

    text: str
    ids: tuple[int, ...]
    """Model ids of the text, without start and end."""
    score: float
    """Mean log likelihood of `ids` among text ids, in nats: `reranking.caption_log_likelihood` with softmax `text`."""
    ended: bool
    """Whether the model ended it itself; else see `end_of`."""


def allowed_ids(tokenizer: TextTokenizer, language: Language) -> torch.Tensor:
    """Return which text ids a caption may hold, bool [text_pieces]; index 0 is the id `image_codes`.

    The common range, the language's own, and <pad>, which ends a caption; no other control piece, and none that has no
    spelling.
    """
    vocabulary = tokenizer.vocabulary
    allowed = torch.zeros(vocabulary.text_pieces, dtype=torch.bool)
    first = vocabulary.image_codes
    for start, stop in (vocabulary.common, vocabulary.english if language == "en" else vocabulary.chinese):
        allowed[start - first : stop - first] = True
    allowed[tokenizer.pieces :] = False
    allowed[: len(CONTROL_PIECES)] = False
    allowed[vocabulary.boundary - first] = True
    for token in range(first + len(CONTROL_PIECES), vocabulary.common[1]):
        if allowed[token - first] and not tokenizer.decode([token]):
            allowed[token - first] = False
    allowed[vocabulary.pad - first] = True
    return allowed


def end_of(ids: Sequence[int], log_likelihoods: Sequence[float], tokenizer: TextTokenizer) -> int:
    """Return how many tokens of a caption without a predicted end are kept; a rule of thumb.

    The published models never learned to end a caption. In this order: up to and with the first sentence end; up to
    where a block of tokens starts to come again and again; the length of the largest mean log likelihood, from
    `_LEAST_KEPT` tokens on.

    Args:
        ids: model ids, at least one.
        log_likelihoods: in nats, of each of them.
        tokenizer: spells the ids.
    """
    for index, token in enumerate(ids):
        if index and tokenizer.decode([token]).strip() in SENTENCE_ENDS:
            return index + 1
    for end in range(1, len(ids)):
        for period in range(1, min(end, len(ids) - end) + 1):
            repeated = max(period, _LEAST_REPEATED)
            if all(ids[k : k + 1] == ids[k - period : k - period + 1] for k in range(end, end + repeated)):
                return end
    least = min(_LEAST_KEPT, len(ids))
    means = [sum(log_likelihoods[:length]) / length for length in range(least, len(ids) + 1)]
    return least + max(range(len(means)), key=means.__getitem__)


def lay_out(base_codes_RM: torch.Tensor, start: int, tokens: int, model: CogLM) -> autoregressive.Sequence:
    """Return [base codes | start token | `tokens` unknown], on the device of the codes.

    Args:
        base_codes_RM: int64.
        start: <start_of_english> or <start_of_chinese>.
        tokens: to be drawn.
        model: gives the positions.
    """
    rows, cells = base_codes_RM.shape
    tail = base_codes_RM.new_full((rows, 1 + tokens), UNKNOWN)
    tail[:, 0] = start
    roles_1S = torch.full((1, cells + 1 + tokens), segment_role(2))
    roles_1S[:, :cells] = CONTEXT
    positions_1S = torch.cat(
        [model.config.image_position + 1 + torch.arange(cells), torch.arange(1 + tokens)]
    )[None]
    device = base_codes_RM.device
    return autoregressive.Sequence(
        torch.cat([base_codes_RM, tail], 1),
        positions_1S.expand(rows, -1).to(device),
        attention_mask(roles_1S).to(device),
        torch.zeros(1, 1, 1, 1, device=device),
    )


def _check(config: CaptioningConfig, base_codes_BM: torch.Tensor) -> None:
    if config.candidates > 1 and not config.temperature:
        raise ConfigError(
            f"{config.candidates} candidates at temperature 0 would be {config.candidates} times the same caption; "
            "give a temperature"
        )
    if base_codes_BM.ndim != 2:
        raise ValueError(f"base codes must be [B, M], not {list(base_codes_BM.shape)}")


def _draw_rows(
    describer: Describer,
    base_codes_RM: torch.Tensor,
    uniforms_RU2: torch.Tensor,
    language: Language,
    config: CaptioningConfig,
) -> list[Caption]:
    """Return one caption for each row; U of the uniforms is the most tokens with the end."""
    tokenizer, model = describer.tokenizer, describer.coglm
    vocabulary, device = tokenizer.vocabulary, device_of(model)
    allowed_V = allowed_ids(tokenizer, language).to(device)
    end = vocabulary.pad - vocabulary.image_codes
    likelihoods: list[torch.Tensor] = []

    def draw(logits_RV: torch.Tensor, uniforms_R2: torch.Tensor) -> torch.Tensor:
        open_V = allowed_V.clone()
        open_V[end] &= bool(likelihoods)  # an empty caption says nothing
        masked_RV = logits_RV.masked_fill(~open_V, -torch.inf)
        if config.temperature:
            drawn_R = draw_top_k(masked_RV, uniforms_R2[:, 0], config.top_k, config.temperature)
        else:
            drawn_R = masked_RV.argmax(1)
        likelihoods.append(logits_RV.log_softmax(1).gather(1, drawn_R[:, None])[:, 0])
        return drawn_R

    filled_RS = fill_unknown(
        model,
        lay_out(base_codes_RM.to(device), vocabulary.start_of(language), uniforms_RU2.shape[1], model),
        uniforms_RU2,
        draw=draw,
        ids=range(vocabulary.image_codes, vocabulary.text_end),
        stop=lambda drawn_Ru: bool((drawn_Ru == vocabulary.pad).any(1).all()),
    )
    texts = filled_RS[:, base_codes_RM.shape[1] + 1 :].tolist()
    captions = []
    for ids, scores in zip(texts, torch.stack(likelihoods, 1).tolist(), strict=True):
        ended = vocabulary.pad in ids
        longest = uniforms_RU2.shape[1] - 1
        kept = ids.index(vocabulary.pad) if ended else end_of(ids[:longest], scores[:longest], tokenizer)
        text = tokenizer.decode(ids[:kept]).strip()
        captions.append(Caption(text, tuple(ids[:kept]), sum(scores[:kept]) / kept, ended))
    return captions


def caption_candidates(
    describer: Describer,
    base_codes_BM: torch.Tensor,
    language: Language,
    config: CaptioningConfig,
    seed: int = 0,
    *,
    numbers: Sequence[int] | None = None,
    batch: int = 16,
) -> list[list[Caption]]:
    """Return `config.candidates` captions of each picture, the likeliest first.

    Args:
        describer: a cascade, or anything with its `tokenizer` and `coglm`.
        base_codes_BM: int64, on any device.
        language: "en" or "zh"; other ids than its own and common ones are never drawn.
        config: see CaptioningConfig.
        seed: of the draws; without effect at temperature 0.
        numbers: of the pictures, 0, 1, ... by default; a caption depends on seed and number, not on its batch.
        batch: captions drawn together.

    Raises:
        ConfigError: several candidates at temperature 0.
        DataError: another language.
    """
    _check(config, base_codes_BM)
    numbers = range(len(base_codes_BM)) if numbers is None else numbers
    tokens = min(config.max_tokens, describer.coglm.config.text_length - 1) + 1
    plan = [(row, candidate) for row in range(len(base_codes_BM)) for candidate in range(config.candidates)]
    drawn: list[Caption] = []
    for start in range(0, len(plan), batch):
        part = plan[start : start + batch]
        uniforms_RU2 = torch.stack(
            [
                uniforms(seed, numbers[row], f"caption {language} {candidate}", tokens, 2)
                for row, candidate in part
            ]
        )
        codes_RM = base_codes_BM[[row for row, _ in part]]
        drawn += _draw_rows(describer, codes_RM, uniforms_RU2, language, config)
    count = config.candidates
    return [
        sorted(drawn[start : start + count], key=lambda found: -found.score)
        for start in range(0, len(drawn), count)
    ]


def caption(
    describer: Describer,
    base_codes_BM: torch.Tensor,
    language: Language,
    config: CaptioningConfig,
    seed: int = 0,
    *,
    numbers: Sequence[int] | None = None,
    batch: int = 16,
) -> list[Caption]:
    """Return the likeliest caption of each picture; see `caption_candidates`."""
    found = caption_candidates(describer, base_codes_BM, language, config, seed, numbers=numbers, batch=batch)
    return [candidates[0] for candidates in found]
