"""Tokens one by one after what is known, with cached keys and values (spec 3.2, 3.3, 7).

Dims: B batch, S sequence, T keys, U unknown tokens, M base codes, V ids that can be drawn. The sequence of a base
picture is that of training: text_length slots, the text at their left, <start_of_image> in the last one, then the
codes. The slots between are hidden from everybody, so prompts of any lengths share a batch. Slots that no prompt of
the batch reaches are left out: what is hidden has weight 0, so that moves a sum by its rounding at most.
"""

from collections import abc
from dataclasses import dataclass

import torch

from cogview2.pipeline.config.model import CogLMConfig
from cogview2.pipeline.config.sampling import AutoregressiveSamplingConfig
from cogview2.pipeline.models.coglm.masks import CONTEXT, HIDDEN, IMAGE, attention_mask
from cogview2.pipeline.models.coglm.model import CogLM
from cogview2.pipeline.sampling.decoding import ClusterSampler
from cogview2.pipeline.sampling.inference import device_of, inference
from cogview2.pipeline.sampling.kv_cache import PreallocatedCache
from cogview2.pipeline.tokenizers.vocabulary import Vocabulary

UNKNOWN = -1
"""Stands in a sequence where a token is to be drawn."""

_SLOTS = 16
"""Text slots come in such blocks: shapes repeat, and vector units are full."""

Draw = abc.Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(float32 logits [B, V], uniforms [B, 2]) -> int64 [B], the drawn columns of the logits."""

Stop = abc.Callable[[torch.Tensor], bool]
"""(int64 [B, u], the ids drawn so far) -> True to end early."""


@dataclass(frozen=True)
class Sequence:
    """What the model is given, what it is to draw, and who sees whom."""

    tokens: torch.Tensor
    """int64 [B, S]; UNKNOWN where to draw, at the same places in each row and not at the first one."""
    position_ids: torch.Tensor
    """int64 [B, S]."""
    attention_mask: torch.Tensor
    """bool [B or 1, 1, S, S], True = visible; nothing may see what comes after the next unknown token."""
    attention_bias: torch.Tensor
    """float32, broadcastable to [B, 1, S, S]: W of spec 3.2."""


class _Head:
    """The tied output head over `ids` in float32, as published; its rows are converted once for all tokens."""

    def __init__(self, model: CogLM, ids: range) -> None:
        rows_VD = model.transformer.word_embeddings.weight.detach()[ids.start : ids.stop]
        # One product of few rows with many columns: CPUs read the columns side by side about twice as fast.
        self._columns_DV = (
            rows_VD.float().T.contiguous() if rows_VD.device.type == "cpu" else rows_VD.float().T
        )

    def __call__(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden_BD.device.type, enabled=False):
            return hidden_BD.float() @ self._columns_DV


def _unknown_places(sequence: Sequence, uniforms_BU2: torch.Tensor) -> list[int]:
    """Return where the unknown tokens are, after the checks of `fill_unknown`."""
    unknown_BS = sequence.tokens == UNKNOWN
    places = unknown_BS[0].nonzero()[:, 0].tolist()
    if not torch.equal(unknown_BS, unknown_BS[:1].expand_as(unknown_BS)):
        raise ValueError(
            "the rows of a batch need their unknown tokens at the same places; sample them apart"
        )
    if places[:1] == [0]:
        raise ValueError("the first token of a sequence cannot be drawn; put <start_of_image> before it")
    if uniforms_BU2.shape != (len(unknown_BS), len(places), 2):
        raise ValueError(
            f"{len(unknown_BS)} sequences of {len(places)} unknown tokens need uniforms of shape "
            f"{[len(unknown_BS), len(places), 2]}, got {list(uniforms_BU2.shape)}"
        )
    return places


def fill_unknown(
    model: CogLM,
    sequence: Sequence,
    uniforms_BU2: torch.Tensor,
    *,
    draw: Draw,
    ids: range | None = None,
    stop: Stop | None = None,
) -> torch.Tensor:
    """Draw the unknown tokens from left to right, each with one model run.

    The first run takes all known tokens before the first unknown one; every later run takes the token just drawn
    and the known ones up to the next unknown. Logits of a token come from the place before it.

    Args:
        model: on any device, in any mode; its mode is restored.
        sequence: on the model's device; not changed.
        uniforms_BU2: in [0, 1), for every unknown token.
        draw: chooses among the logits.
        ids: consecutive ids that can be drawn; all rows of the embedding by default.
        stop: asked after every token; what it leaves stays UNKNOWN.

    Returns:
        int64 [B, S], the tokens with the unknown ones filled in.

    Raises:
        ValueError: unknown tokens at other places in each row, at the very first, or uniforms of another shape.
    """
    device = device_of(model)
    places, uniforms_BU2 = _unknown_places(sequence, uniforms_BU2), uniforms_BU2.to(device)
    tokens_BS = sequence.tokens.clone()
    if not places:
        return tokens_BS
    # Nobody reads what comes after the last unknown token, nor that token.
    cache = PreallocatedCache(model.config.layers, places[-1])
    ids = ids or range(model.transformer.word_embeddings.num_embeddings)
    bias_B1SS = sequence.attention_bias.expand(len(tokens_BS), 1, *sequence.attention_mask.shape[2:])
    head, start = _Head(model, ids), 0
    with inference(model):
        for number, place in enumerate(places):
            hidden_BSD = model(
                tokens_BS[:, start:place],
                sequence.position_ids[:, start:place],
                sequence.attention_mask[:, :, start:place, :place],
                attention_bias=bias_B1SS[:, :, start:place, :place],
                cache=cache,
            )
            tokens_BS[:, place] = draw(head(hidden_BSD[:, -1]), uniforms_BU2[:, number]) + ids.start
            start = place
            if stop is not None and stop(tokens_BS[:, places[: number + 1]]):
                break
    return tokens_BS


def cluster_draw(labels_V: torch.Tensor, config: AutoregressiveSamplingConfig) -> Draw:
    """Return cluster sampling with the settings of the base codes; labels on the model's device (spec 3.3)."""
    return ClusterSampler(
        labels_V,
        temperature=config.temperature,
        top_k_clusters=config.top_k_clusters,
        cluster_temperature=config.cluster_temperature,
    )


def lay_out_prompts(
    text_ids: abc.Sequence[abc.Sequence[int]],
    *,
    config: CogLMConfig,
    cells: int,
    vocabulary: Vocabulary,
    text_attention_bias: float,
    device: torch.device,
) -> Sequence:
    """Lay prompts out as CogLM was trained on them, all codes unknown; the last `cells` tokens are the codes.

    Args:
        text_ids: model ids without <start_of_image>; cut to text_length - 1.
        config: gives text_length and image_position.
        cells: base codes to come.
        vocabulary: the id layout.
        text_attention_bias: W of spec 3.2, on the text columns of every row.
        device: of the result.
    """
    longest = max((len(ids) for ids in text_ids), default=0) + 1
    slots = min(-(-longest // _SLOTS) * _SLOTS, config.text_length)
    tokens_BS = torch.full((len(text_ids), slots + cells), vocabulary.pad)
    positions_BS = torch.zeros_like(tokens_BS)
    roles_BS = torch.full_like(positions_BS, HIDDEN)
    for row, ids in enumerate(text_ids):
        text = torch.tensor(list(ids)[: slots - 1], dtype=torch.int64)
        tokens_BS[row, : len(text)] = text
        positions_BS[row, : len(text)] = torch.arange(len(text))
        roles_BS[row, : len(text)] = CONTEXT
    tokens_BS[:, slots - 1] = vocabulary.start_of_image
    tokens_BS[:, slots:] = UNKNOWN
    positions_BS[:, slots - 1 :] = config.image_position + torch.arange(cells + 1)
    roles_BS[:, slots - 1 :] = IMAGE
    bias_B11S = (roles_BS == CONTEXT).float()[:, None, None] * text_attention_bias
    roles_BS = roles_BS.to(device)
    return Sequence(
        tokens_BS.to(device), positions_BS.to(device), attention_mask(roles_BS), bias_B11S.to(device)
    )


def sample_base_codes(
    model: CogLM,
    text_ids: abc.Sequence[abc.Sequence[int]],
    uniforms_BM2: torch.Tensor,
    *,
    grid: int,
    vocabulary: Vocabulary,
    labels: torch.Tensor,
    config: AutoregressiveSamplingConfig,
) -> torch.Tensor:
    """Draw the base codes of every prompt in grid * grid model runs: the prompt, then one code at a time.

    Args:
        model: on any device, in any mode; its mode is restored.
        text_ids: model ids of each prompt without <start_of_image>, of any lengths; the first
            text_length - 1 count, because text_length includes <start_of_image>.
        uniforms_BM2: in [0, 1), for every code of every image (`noise.batch_uniforms`).
        grid: side of the base grid.
        vocabulary: the id layout; only its image codes can be drawn.
        labels: int64 [image_codes], the clusters of the codes.
        config: temperatures and cluster top-k.

    Returns:
        int64 [B, grid^2] in raster order, on the model's device.
    """
    device = device_of(model)
    sequence = lay_out_prompts(
        text_ids,
        config=model.config,
        cells=grid * grid,
        vocabulary=vocabulary,
        text_attention_bias=config.text_attention_bias,
        device=device,
    )
    draw = cluster_draw(labels.to(device), config)
    filled_BS = fill_unknown(model, sequence, uniforms_BM2, draw=draw, ids=range(vocabulary.image_codes))
    return filled_BS[:, -grid * grid :]
