"""Base codes one by one after the text, with cached keys and values (spec 3.2, 3.3).

Dims: B batch, S sequence, T keys, M base codes. The sequence is that of training: text_length slots, the text
at their left, <start_of_image> in the last one, then the codes. The slots between are hidden from everybody,
so prompts of any lengths share a batch, and no shape depends on who else is in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cogview2.pipeline.config.model import CogLMConfig
from cogview2.pipeline.config.sampling import AutoregressiveSamplingConfig
from cogview2.pipeline.models.coglm.masks import CONTEXT, HIDDEN, IMAGE, attention_mask
from cogview2.pipeline.models.coglm.model import CogLM
from cogview2.pipeline.sampling.decoding import draw_cluster
from cogview2.pipeline.sampling.inference import device_of, inference
from cogview2.pipeline.sampling.kv_cache import PreallocatedCache
from cogview2.pipeline.tokenizers.vocabulary import Vocabulary


@dataclass(frozen=True)
class Prompts:
    """What the model is given before the first code, and who sees whom in the whole sequence."""

    tokens: torch.Tensor
    """int64 [B, text_length], text slots up to and with <start_of_image>."""
    position_ids: torch.Tensor
    """int64 [B, S], of the whole sequence."""
    attention_mask: torch.Tensor
    """bool [B, 1, S, S]."""
    attention_bias: torch.Tensor
    """float32 [B, 1, 1, S], `text_attention_bias` on the text columns of every row, else 0."""


def lay_out_prompts(
    text_ids: Sequence[Sequence[int]],
    *,
    config: CogLMConfig,
    cells: int,
    vocabulary: Vocabulary,
    text_attention_bias: float,
    device: torch.device,
) -> Prompts:
    """Lay prompts out as CogLM was trained on them.

    Args:
        text_ids: model ids without <start_of_image>; cut to text_length - 1.
        config: gives text_length and image_position.
        cells: base codes to come.
        vocabulary: the id layout.
        text_attention_bias: W of spec 3.2.
        device: of the result.
    """
    slots = config.text_length
    tokens_BL = torch.full((len(text_ids), slots), vocabulary.pad)
    positions_BS = torch.zeros(len(text_ids), slots + cells, dtype=torch.int64)
    roles_BS = torch.full_like(positions_BS, HIDDEN)
    for row, ids in enumerate(text_ids):
        text = torch.tensor(list(ids)[: slots - 1], dtype=torch.int64)
        tokens_BL[row, : len(text)] = text
        positions_BS[row, : len(text)] = torch.arange(len(text))
        roles_BS[row, : len(text)] = CONTEXT
    tokens_BL[:, -1] = vocabulary.start_of_image
    positions_BS[:, slots - 1 :] = config.image_position + torch.arange(cells + 1)
    roles_BS[:, slots - 1 :] = IMAGE
    bias_B11S = (roles_BS == CONTEXT).float()[:, None, None] * text_attention_bias
    roles_BS = roles_BS.to(device)
    return Prompts(
        tokens_BL.to(device), positions_BS.to(device), attention_mask(roles_BS), bias_B11S.to(device)
    )


def sample_base_codes(
    model: CogLM,
    text_ids: Sequence[Sequence[int]],
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
    cells, device = grid * grid, device_of(model)
    if uniforms_BM2.shape != (len(text_ids), cells, 2):
        raise ValueError(
            f"{len(text_ids)} prompts on a grid of {grid} need uniforms of shape "
            f"{[len(text_ids), cells, 2]}, got {list(uniforms_BM2.shape)}"
        )
    labels_V, uniforms_BM2 = labels.to(device), uniforms_BM2.to(device)
    # The last code is drawn but never read, so the sequence ends one before it.
    prompts = lay_out_prompts(
        text_ids,
        config=model.config,
        cells=cells - 1,
        vocabulary=vocabulary,
        text_attention_bias=config.text_attention_bias,
        device=device,
    )
    slots = model.config.text_length
    cache = PreallocatedCache(model.config.layers, slots + cells - 1)
    codes_BM = torch.empty(len(text_ids), cells, dtype=torch.int64, device=device)
    tokens_BS = prompts.tokens
    start = 0
    with inference(model):
        for cell in range(cells):
            stop = slots + cell
            hidden_BSD = model(
                tokens_BS,
                prompts.position_ids[:, start:stop],
                prompts.attention_mask[:, :, start:stop, :stop],
                attention_bias=prompts.attention_bias[..., :stop],
                cache=cache,
            )
            codes_BM[:, cell] = draw_cluster(
                model.logits(hidden_BSD[:, -1], vocabulary.image_codes),
                labels_V,
                uniforms_BM2[:, cell],
                temperature=config.temperature,
                top_k_clusters=config.top_k_clusters,
                cluster_temperature=config.cluster_temperature,
            )
            tokens_BS, start = codes_BM[:, cell : cell + 1], stop
    return codes_BM
