"""From base codes to high-resolution codes: one direct pass, then LoPAR passes (spec 4.4, 5.2).

Dims: B batch, M base codes, G high-resolution codes, D hidden.
"""

from collections.abc import Callable, Sequence

import torch

from cogview2.pipeline.config.sampling import DirectSRSamplingConfig, IterativeSRSamplingConfig
from cogview2.pipeline.models.sr.direct import DirectSR
from cogview2.pipeline.models.sr.iterative import IterativeSR
from cogview2.pipeline.models.sr.layout import direct_inputs, iterative_inputs, lopar_masks
from cogview2.pipeline.sampling.decoding import ClusterSampler, draw_top_k
from cogview2.pipeline.sampling.inference import device_of, inference
from cogview2.pipeline.tokenizers.vocabulary import Vocabulary

_ROWS = 1024
"""Positions whose logits exist at one time: 1024 x 20000 float64 are 160 MB."""

Draw = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _draw_in_chunks(hidden_PD: torch.Tensor, uniforms_PX: torch.Tensor, draw: Draw) -> torch.Tensor:
    """Draw one code for each of P rows; their logits would not fit into memory together. int64 [P]."""
    parts = [
        draw(hidden, uniforms)
        for hidden, uniforms in zip(hidden_PD.split(_ROWS), uniforms_PX.split(_ROWS), strict=True)
    ]
    return torch.cat(parts)


def _check_uniforms(uniforms: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(uniforms.shape) != shape:
        raise ValueError(
            f"these prompts and this grid need uniforms of shape {list(shape)}, got {list(uniforms.shape)}"
        )


def direct_superres(
    model: DirectSR,
    text_ids: Sequence[Sequence[int]],
    base_codes_BM: torch.Tensor,
    uniforms_BG2: torch.Tensor,
    *,
    vocabulary: Vocabulary,
    labels: torch.Tensor,
    config: DirectSRSamplingConfig,
) -> torch.Tensor:
    """Draw all high-resolution codes independently after one model run (spec 4.4).

    Args:
        model: on any device, in any mode; its mode is restored.
        text_ids: model ids of each prompt without <start_of_image>; the first text_length - 1 count.
        base_codes_BM: int64.
        uniforms_BG2: in [0, 1), for every high-resolution code.
        vocabulary: the id layout; only its image codes can be drawn.
        labels: int64 [image_codes], the clusters of the codes.
        config: temperatures and cluster top-k.

    Returns:
        int64 [B, G] in raster order, on the model's device.
    """
    device, cells = device_of(model), (model.base_grid * model.ratio) ** 2
    _check_uniforms(uniforms_BG2, (len(text_ids), cells, 2))
    inputs = direct_inputs(
        text_ids,
        base_codes_BM.to(device),
        config=model.config,
        coglm=model.base,
        ratio=model.ratio,
        base_grid=model.base_grid,
        start_of_image=vocabulary.start_of_image,
    )

    sampler = ClusterSampler(
        labels.to(device),
        temperature=config.temperature,
        top_k_clusters=config.top_k_clusters,
        cluster_temperature=config.cluster_temperature,
    )

    def draw(hidden_PD: torch.Tensor, uniforms_P2: torch.Tensor) -> torch.Tensor:
        return sampler(model.logits(hidden_PD, vocabulary.image_codes), uniforms_P2)

    with inference(model):
        hidden_PD = model(*inputs)[:, -cells:].flatten(0, 1)
        codes_P = _draw_in_chunks(hidden_PD, uniforms_BG2.to(device).flatten(0, 1), draw)
    return codes_P.view(len(text_ids), cells)


def iterative_superres(
    model: IterativeSR,
    text_ids: Sequence[Sequence[int]],
    codes_BG: torch.Tensor,
    uniforms_PBG: torch.Tensor,
    *,
    vocabulary: Vocabulary,
    config: IterativeSRSamplingConfig,
    edit_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draw the open cells again in each LoPAR pass (spec 5.2).

    Before pass m every cell of value m or more is masked; all of them are drawn at once, so a cell of value m
    is final after pass m. Cells of value 0 or less keep the code they came with. A pass without any open cell
    needs no model run.

    Args:
        model: on any device, in any mode; its mode is restored.
        text_ids: model ids of each prompt without <start_of_image>; the first text_length count.
        codes_BG: int64, from direct super-resolution; not changed.
        uniforms_PBG: in [0, 1), for every pass, image and cell.
        vocabulary: the id layout; only its image codes can be drawn.
        config: schedule, temperature and the top-k of each pass.
        edit_mask: bool [B or 1, G]; cells outside it keep their code too (spec 7).

    Returns:
        int64 [B, G] in raster order, on the model's device.
    """
    device, cells = device_of(model), model.grid**2
    _check_uniforms(uniforms_PBG, (config.passes, len(text_ids), cells))
    codes_BG, uniforms_PBG = codes_BG.to(device, copy=True), uniforms_PBG.to(device)
    editable_BG = torch.ones_like(codes_BG, dtype=torch.bool)
    if edit_mask is not None:
        if edit_mask.dtype != torch.bool or edit_mask.shape not in ((1, cells), (len(text_ids), cells)):
            raise ValueError(
                f"an edit mask is bool [{len(text_ids)} or 1, {cells}], got {edit_mask.dtype} {list(edit_mask.shape)}"
            )
        editable_BG &= edit_mask.to(device)
    with inference(model):
        for step, mask in enumerate(lopar_masks(model.grid, config)):
            open_BG = mask.to(device).flatten() & editable_BG
            if not open_BG.any():
                continue
            inputs = iterative_inputs(
                text_ids,
                codes_BG.masked_fill(open_BG, vocabulary.start_of_image),
                config=model.config,
                coglm=model.base,
                grid=model.grid,
            )
            top_k = config.top_k_of_passes[step]

            def draw(hidden_PD: torch.Tensor, uniforms_P: torch.Tensor, top_k: int = top_k) -> torch.Tensor:
                return draw_top_k(
                    model.logits(hidden_PD, vocabulary.image_codes), uniforms_P, top_k, config.temperature
                )

            hidden_BGD = model(*inputs)[:, -cells:]
            codes_BG[open_BG] = _draw_in_chunks(hidden_BGD[open_BG], uniforms_PBG[step][open_BG], draw)
    return codes_BG
