"""A part of a picture drawn again from a text, the rest kept (spec 7).

Dims: N candidates, F side of the working picture in pixels, S side of the crop in pixels, M base codes, G
high-resolution codes, g side of the base grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as functional
from PIL import Image

from cogview2.pipeline.config.sampling import EditingConfig
from cogview2.pipeline.data.pixels import downsample
from cogview2.pipeline.sampling.infilling import infill
from cogview2.pipeline.sampling.noise import batch_uniforms
from cogview2.pipeline.sampling.regions import Box, Region, Workpiece, cells_of, crop_around, workpiece
from cogview2.pipeline.sampling.reranking import rank
from cogview2.pipeline.sampling.styles import Style
from cogview2.pipeline.sampling.superres import direct_superres, iterative_superres
from cogview2.pipeline.sampling.text_to_image import TextToImage
from cogview2.pipeline.tokenizers.image import to_rgb


@dataclass(frozen=True)
class Edited:
    """The candidates of one edit, best first."""

    pictures: np.ndarray
    """uint8 [N, F, F, 3]."""
    before: np.ndarray
    """uint8 [F, F, 3], the working picture."""
    mask: np.ndarray
    """bool [F, F], the marked part of it."""
    crop: Box
    """The square of the working picture that the models saw, and that was put back."""
    kept: Box
    """The square of the given picture that the working picture shows."""
    base_codes: torch.Tensor
    """int64 [N, M] on the CPU: the crop."""
    redrawn: np.ndarray
    """bool [g, g]: the base codes that were drawn."""
    fine_codes: torch.Tensor | None
    """int64 [N, G] on the CPU: the crop; None where base codes had enough pixels for it."""
    numbers: tuple[int, ...]
    """Of the candidates: each depends on the seed and its number alone."""
    scores: torch.Tensor | None
    """float32 [N], log likelihoods of the text as caption of the base codes; None with one candidate, or unranked."""
    notes: tuple[str, ...]
    """What was changed on the way, a sentence each."""


def full_size(cascade: TextToImage) -> int:
    """Return the side of working pictures in pixels: that of the pictures that the cascade draws."""
    ratio = cascade.direct.ratio if cascade.direct is not None else 1
    return cascade.base_grid * cascade.image_tokenizer.rate * ratio


def _pixels(picture: np.ndarray) -> torch.Tensor:
    """Return float32 [1, 3, H, W] in [0, 1] of uint8 [H, W, 3]."""
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 255


def _enlarged(pixels_13SS: torch.Tensor, side: int) -> torch.Tensor:
    return functional.interpolate(pixels_13SS, size=(side, side), mode="bilinear").clamp(0, 1)


class _Edit:
    """One picture, one region and one text, ready to draw any number of candidates."""

    def __init__(
        self, cascade: TextToImage, work: Workpiece, text_ids: list[int], config: EditingConfig
    ) -> None:
        self.cascade, self.work, self.config = cascade, work, config
        self.grid, self.rate = cascade.base_grid, cascade.image_tokenizer.rate
        self.text_ids = text_ids
        self.crop = crop_around(work.mask, config.region_share, whole=config.crop == "whole")
        self.mask_SS = work.mask[self.crop.slices]
        self.redrawn = cells_of(self.mask_SS, self.grid, config.cells)
        self.pixels_13SS = _pixels(work.pixels[self.crop.slices])
        base_pixels = downsample(self.pixels_13SS, self.grid * self.rate)
        self.codes_M = cascade.image_tokenizer.encode(base_pixels)[0]

    @property
    def _needs_superres(self) -> bool:
        return self.cascade.direct is not None and self.crop.width > self.grid * self.rate

    def base_codes(self, seed: int, numbers: Sequence[int]) -> torch.Tensor:
        """Return int64 [n, M] with the redrawn cells drawn from text and known codes."""
        cascade = self.cascade
        return infill(
            cascade.coglm,
            self.text_ids,
            self.codes_M,
            self.redrawn,
            batch_uniforms(seed, numbers, "edit base", self.grid**2, 2),
            vocabulary=cascade.vocabulary,
            labels=cascade.labels,
            config=cascade.sampling.base,
            known=self.config.known,
            second_start_of_image=self.config.second_start_of_image,
        )

    def fine_codes(self, base_BM: torch.Tensor, seed: int, numbers: Sequence[int]) -> torch.Tensor | None:
        """Return int64 [n, G]: new inside the region, the original's outside; None when base codes are enough."""
        cascade = self.cascade
        if cascade.direct is None or not self._needs_superres:
            return None
        fine = self.grid * cascade.direct.ratio
        ids = list(self.text_ids)
        if self.config.second_start_of_image:
            ids.append(cascade.vocabulary.start_of_image)
        texts = [ids] * len(numbers)
        direct_BG = direct_superres(
            cascade.direct,
            texts,
            base_BM,
            batch_uniforms(seed, numbers, "edit direct", fine**2, 2),
            vocabulary=cascade.vocabulary,
            labels=cascade.labels,
            config=cascade.sampling.direct,
        )
        original_1G = cascade.image_tokenizer.encode(_enlarged(self.pixels_13SS, fine * self.rate))
        inside = torch.from_numpy(cells_of(self.mask_SS, fine, self.config.cells))
        inside_1G = inside.flatten()[None].to(direct_BG.device)
        codes_BG = torch.where(inside_1G, direct_BG, original_1G.to(direct_BG.device))
        if cascade.iterative is None:
            return codes_BG
        return iterative_superres(
            cascade.iterative,
            texts,
            codes_BG,
            batch_uniforms(
                seed, numbers, "edit iterative", fine**2, cascade.sampling.iterative.passes
            ).permute(2, 0, 1),
            vocabulary=cascade.vocabulary,
            config=cascade.sampling.iterative,
            edit_mask=inside_1G,
        )

    def pictures(self, codes_BX: torch.Tensor) -> np.ndarray:
        """Decode crops and put them back; uint8 [n, F, F, 3].

        One at a time: at full size that bounds the memory, and rounding cannot depend on the batch.
        """
        return np.concatenate([self._picture(codes_1X) for codes_1X in codes_BX.split(1)])

    def _picture(self, codes_1X: torch.Tensor) -> np.ndarray:
        tokenizer, side = self.cascade.image_tokenizer, self.crop.width
        decoded = tokenizer.decode(codes_1X).cpu()
        new_13SS = functional.interpolate(decoded, size=(side, side), mode="nearest")
        if self.config.paste == "region":
            new_13SS = torch.where(torch.from_numpy(self.mask_SS), new_13SS, self.pixels_13SS)
        whole_13FF = _pixels(self.work.pixels)
        rows, columns = self.crop.slices
        whole_13FF[:, :, rows, columns] = new_13SS
        if self.config.harmonise:
            # Raw, as decoded: the tokenizer's own encode would refuse what lies outside of [0, 1].
            codes_1GG = tokenizer.vqvae.encode(whole_13FF.to(tokenizer.device), tokenizer.rate)
            whole_13FF = tokenizer.decode_grid(codes_1GG).cpu()
        return (whole_13FF.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()

    def draw(self, seed: int, numbers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor | None, np.ndarray]:
        """Return base codes, fine codes and pictures of the candidates of these numbers."""
        base_BM = self.base_codes(seed, numbers)
        fine_BG = self.fine_codes(base_BM, seed, numbers)
        pictures = self.pictures(base_BM if fine_BG is None else fine_BG)
        return base_BM.cpu(), None if fine_BG is None else fine_BG.cpu(), pictures


def edit(
    cascade: TextToImage,
    picture: Image.Image | np.ndarray,
    region: Region,
    text: str,
    *,
    seed: int = 0,
    number: int = 0,
    candidates: int = 1,
    ranked: bool = True,
    config: EditingConfig | None = None,
    style: Style | None = None,
) -> Edited:
    """Draw a part of a picture again (spec 7).

    The picture becomes square and as large as the cascade draws. A square around the part goes through the language
    model, whose codes inside the part are drawn from the text and the codes around it, and through super-resolution
    unless it has no more pixels than base codes give. It is put back, and the whole picture is encoded and decoded once
    so that it becomes one.

    Args:
        cascade: without super-resolution it edits pictures of the base size.
        picture: RGB, or uint8 [H, W, 3]; any size.
        region: what to draw again, on `picture`.
        text: what is to be seen in the square around the part.
        seed, number: candidate k depends on seed and number + k alone.
        candidates: to draw, `cascade.sampling.batch` at a time.
        ranked: score them by the likelihood of the text, without the style, as a caption, and put the best first.
        config: by default that of the cascade.
        style: what is added to the text and changed in `sampling`.

    Raises:
        DataError: an empty text, or a region that cannot be used (`regions.workpiece`).
    """
    if candidates < 1:
        raise ValueError(f"candidates {candidates}: draw at least 1")
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    style = style or Style()
    cascade = cascade.with_sampling(style.sampling_for(cascade.sampling))
    config = config or cascade.sampling.editing
    work = workpiece(to_rgb(image), region, full_size(cascade), cascade.image_tokenizer.rate)
    scored_ids = cascade.encode([text])[0]
    text_ids, note = cascade.encode_styled(text, style)
    task = _Edit(cascade, work, text_ids, config)
    numbers = list(range(number, number + candidates))
    batch = cascade.sampling.batch
    parts = [task.draw(seed, numbers[start : start + batch]) for start in range(0, candidates, batch)]
    base_NM = torch.cat([base for base, _, _ in parts])
    fine = [codes for _, codes, _ in parts if codes is not None]
    fine_NG = torch.cat(fine) if fine else None
    pictures = np.concatenate([found for _, _, found in parts])
    order, scores = torch.arange(candidates), None
    if ranked and candidates > 1:
        ranking = cascade.sampling.ranking
        order, scores = rank(
            cascade.coglm,
            scored_ids,
            base_NM,
            cascade.vocabulary,
            start=ranking.start,
            softmax=ranking.softmax,
            reduce=ranking.reduce,
            batch=batch,
        )
    return Edited(
        pictures=pictures[order.numpy()],
        before=work.pixels,
        mask=work.mask,
        crop=task.crop,
        kept=work.kept,
        base_codes=base_NM[order],
        redrawn=task.redrawn,
        fine_codes=None if fine_NG is None else fine_NG[order],
        numbers=tuple(numbers[k] for k in order.tolist()),
        scores=None if scores is None else scores[order],
        notes=work.notes + ((note,) if note is not None else ()),
    )
