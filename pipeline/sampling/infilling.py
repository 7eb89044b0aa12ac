"""Some base codes of a picture drawn again from text and the other codes: the completion sequence (spec 7).

Dims: B rows (candidates of one picture), S sequence, M base codes, U of them redrawn, g side of the base grid.
"""

from collections import abc

import numpy as np
import torch

from cogview2.pipeline.config.model import CogLMConfig
from cogview2.pipeline.config.sampling import AutoregressiveSamplingConfig
from cogview2.pipeline.models.coglm.model import CogLM
from cogview2.pipeline.sampling.autoregressive import UNKNOWN, Sequence, fill_unknown
from cogview2.pipeline.sampling.decoding import ClusterSampler
from cogview2.pipeline.sampling.inference import device_of
from cogview2.pipeline.tokenizers.vocabulary import Vocabulary


def infilling_order(redrawn_gg: np.ndarray) -> tuple[list[int], list[int]]:
    """Return the cells of the context and those of the region, each in raster order.

    The region holds the redrawn cells, and each known cell whose right neighbour in its row is redrawn: it leaves the
    context so that it can predict that neighbour.

    Args:
        redrawn_gg: bool.
    """
    leads_gg = np.zeros_like(redrawn_gg)
    leads_gg[:, :-1] = redrawn_gg[:, 1:]
    region_M = (redrawn_gg | leads_gg).ravel()
    return np.flatnonzero(~region_M).tolist(), np.flatnonzero(region_M).tolist()


def lay_out_infilling(
    text_ids: abc.Sequence[int],
    codes_M: abc.Sequence[int],
    redrawn_gg: np.ndarray,
    *,
    config: CogLMConfig,
    vocabulary: Vocabulary,
    text_attention_bias: float,
    known: str = "all",
    second_start_of_image: bool = False,
) -> Sequence:
    """Return text | <start_of_image> | context | region for one picture (B = 1), every token at its true position.

    All tokens after <start_of_image> see the context; the text sees itself, and all see the text; the rest is causal.

    Args:
        text_ids: model ids without <start_of_image>; cut so that they fit into text_length - 1 slots.
        codes_M: base codes in raster order; those of redrawn cells do not matter.
        redrawn_gg: bool, at least one.
        config: gives text_length and image_position.
        vocabulary: gives <start_of_image>.
        text_attention_bias: W of spec 3.2, on the text columns of every row.
        known: `all` known codes are context or lead the region (released); `before`: plain raster order, in which a
            code sees those before it alone, as in training from text to image.
        second_start_of_image: end the text with a <start_of_image> of its own, which belongs to the text (released).
    """
    if known == "before":
        cells = list(range(int(np.flatnonzero(redrawn_gg)[-1]) + 1))
        context: list[int] = []
    else:
        context, region = infilling_order(redrawn_gg)
        cells = context + region
    extra = [vocabulary.start_of_image] if second_start_of_image else []
    text = [*list(text_ids)[: config.text_length - 1 - len(extra)], *extra]
    redrawn_M = redrawn_gg.ravel()
    codes = [UNKNOWN if redrawn_M[cell] else int(codes_M[cell]) for cell in cells]
    first = len(text) + 1
    tokens = torch.tensor([[*text, vocabulary.start_of_image, *codes]])
    positions = torch.tensor(
        [[*range(len(text)), config.image_position, *(config.image_position + 1 + cell for cell in cells)]]
    )
    length = tokens.shape[1]
    mask_SS = torch.ones(length, length, dtype=torch.bool).tril()
    mask_SS[first:, first : first + len(context)] = True
    mask_SS[: len(text), : len(text)] = True
    bias_S = torch.zeros(length)
    bias_S[: len(text)] = text_attention_bias
    return Sequence(tokens, positions, mask_SS[None, None], bias_S[None, None, None])


def infill(
    model: CogLM,
    text_ids: abc.Sequence[int],
    codes_M: torch.Tensor,
    redrawn_gg: np.ndarray,
    uniforms_BM2: torch.Tensor,
    *,
    vocabulary: Vocabulary,
    labels: torch.Tensor,
    config: AutoregressiveSamplingConfig,
    known: str = "all",
    second_start_of_image: bool = False,
) -> torch.Tensor:
    """Draw the redrawn codes of B candidates, each code with one model run.

    Args:
        model: on any device, in any mode; its mode is restored.
        text_ids: model ids without <start_of_image>.
        codes_M: int64 [M], the codes of the picture.
        redrawn_gg: bool, at least one.
        uniforms_BM2: in [0, 1), for every cell of the grid, redrawn or not.
        vocabulary: the id layout; only its image codes can be drawn.
        labels: int64 [image_codes], the clusters of the codes.
        config: temperatures, cluster top-k and the weight of the text.
        known, second_start_of_image: see `lay_out_infilling`.

    Returns:
        int64 [B, M] in raster order on the model's device; known cells as they were.

    Raises:
        ValueError: nothing to redraw, or sizes that do not belong together.
    """
    if redrawn_gg.size != len(codes_M) or uniforms_BM2.shape[1:] != (len(codes_M), 2):
        raise ValueError(
            f"{len(codes_M)} codes need a mask of as many cells and uniforms of shape [B, {len(codes_M)}, 2], got "
            f"{list(redrawn_gg.shape)} and {list(uniforms_BM2.shape)}"
        )
    if not redrawn_gg.any():
        raise ValueError("no cell is to be redrawn; mark at least one")
    device, rows = device_of(model), len(uniforms_BM2)
    sequence = lay_out_infilling(
        text_ids,
        codes_M.tolist(),
        redrawn_gg,
        config=model.config,
        vocabulary=vocabulary,
        text_attention_bias=config.text_attention_bias,
        known=known,
        second_start_of_image=second_start_of_image,
    )
    batch = Sequence(
        sequence.tokens.expand(rows, -1).to(device),
        sequence.position_ids.expand(rows, -1).to(device),
        sequence.attention_mask.to(device),
        sequence.attention_bias.to(device),
    )
    first_position = model.config.image_position + 1
    unknown_S = sequence.tokens[0] == UNKNOWN
    cells_U = sequence.position_ids[0][unknown_S] - first_position
    drawn_BS = fill_unknown(
        model,
        batch,
        uniforms_BM2[:, cells_U],
        draw=ClusterSampler(
            labels.to(device),
            temperature=config.temperature,
            top_k_clusters=config.top_k_clusters,
            cluster_temperature=config.cluster_temperature,
        ),
        ids=range(vocabulary.image_codes),
    )
    codes_BM = codes_M.to(device).repeat(rows, 1)
    codes_BM[:, cells_U.to(device)] = drawn_BS[:, unknown_S.to(device)]
    return codes_BM
