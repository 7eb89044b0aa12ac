"""The page's engine over what a run has trained."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from cogview2.pipeline.config.data import Language
from cogview2.pipeline.sampling import editing, regions
from cogview2.pipeline.sampling.captioning import caption
from cogview2.pipeline.sampling.styles import NO_STYLE, load_styles
from cogview2.pipeline.sampling.text_to_image import TextToImage
from cogview2.pipeline.tokenizers.image import fit_square, to_pixels
from cogview2.stages._loading import load_text_to_image
from cogview2.stages.web.engine import Box, Description, Drawing, Facts, Report

_LANGUAGES: tuple[Language, ...] = ("en", "zh")


class RunEngine:
    """Draws, edits and captions with one cascade."""

    def __init__(self, name: str, cascade: TextToImage) -> None:
        """Take over the models; `name` is shown on the page."""
        self._cascade = cascade
        self._models = [
            model for model in (cascade.coglm, cascade.direct, cascade.iterative) if model is not None
        ]
        self._styles = load_styles()
        device = cascade.image_tokenizer.device
        self.facts = Facts(
            name=name,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
            side=editing.full_size(cascade),
            styles=tuple(sorted(self._styles, key=lambda style: style != NO_STYLE)),
        )

    def generate(
        self, text: str, style: str, seed: int, candidates: int, report: Report
    ) -> Sequence[Drawing]:
        """Draw all candidates to the end; several are ordered by the likelihood of the text as their caption."""
        with self._counted(report, self._runs(candidates)):
            drawn = self._cascade.draw(
                [text], seed, style=self._styles[style], candidates=candidates, keep=candidates
            )
            bytes_BHW3 = (
                (drawn.pixels() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
            )
        return [
            Drawing(Image.fromarray(pixels), seed, pick.candidate, pick.score)
            for pixels, pick in zip(bytes_BHW3, drawn.picks, strict=True)
        ]

    def edit(
        self,
        picture: Image.Image,
        box: Box,
        text: str,
        style: str,
        seed: int,
        candidates: int,
        report: Report,
    ) -> Sequence[Drawing]:
        """Redraw the box (`editing.edit`)."""
        with self._counted(report, None):
            edited = editing.edit(
                self._cascade,
                picture,
                regions.Box(*box),
                text,
                seed=seed,
                candidates=candidates,
                style=self._styles[style],
            )
        scores = [None] * candidates if edited.scores is None else edited.scores.tolist()
        return [
            Drawing(Image.fromarray(pixels), seed, number, score, edited.notes)
            for pixels, number, score in zip(edited.pictures, edited.numbers, scores, strict=True)
        ]

    def caption(self, picture: Image.Image, seed: int, report: Report) -> Sequence[Description]:
        """Describe the picture at the size of base pictures."""
        cascade = self._cascade
        base_side = cascade.base_grid * cascade.image_tokenizer.rate
        pixels_13HW = fit_square(to_pixels([picture]), base_side)
        with self._counted(report, None):
            codes_1M = cascade.image_tokenizer.encode(pixels_13HW)
            found = [
                (language, caption(cascade, codes_1M, language, cascade.sampling.captioning, seed)[0])
                for language in _LANGUAGES
            ]
        return [Description(language, best.text, best.score) for language, best in found]

    def _runs(self, candidates: int) -> int:
        """Return how often models run for pictures of one text."""
        cascade = self._cascade
        each = cascade.base_grid**2 + (candidates > 1) + (cascade.direct is not None)
        if cascade.iterative is not None:
            each += cascade.sampling.iterative.passes
        return each * math.ceil(candidates / cascade.sampling.batch)

    @contextmanager
    def _counted(self, report: Report, total: int | None) -> Iterator[None]:
        """Report before every run of a model, so that a job can be followed, and be stopped between two runs."""
        done = 0

        def count(*_: Any) -> None:
            nonlocal done
            report(done, total)
            done += 1

        with ExitStack() as hooks:
            for model in self._models:
                hooks.callback(model.register_forward_pre_hook(count).remove)
            yield


def load(path: Path) -> RunEngine:
    """Return the engine of a run or of a weights folder.

    Raises:
        CogView2Error: there is none, or it is not finished.
    """
    return RunEngine(path.resolve().name, load_text_to_image(path))
