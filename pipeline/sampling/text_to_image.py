"""From prompts to pictures: base codes, direct and iterative super-resolution, pixels (spec 0)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from cogview2.pipeline.config.sampling import SamplingConfig
from cogview2.pipeline.errors import ConfigError, DataError
from cogview2.pipeline.models.coglm.model import CogLM
from cogview2.pipeline.models.sr.direct import DirectSR
from cogview2.pipeline.models.sr.iterative import IterativeSR
from cogview2.pipeline.models.sr.layout import PASSES
from cogview2.pipeline.sampling.autoregressive import sample_base_codes
from cogview2.pipeline.sampling.noise import batch_uniforms
from cogview2.pipeline.sampling.superres import direct_superres, iterative_superres
from cogview2.pipeline.tokenizers.image import ImageTokenizer
from cogview2.pipeline.tokenizers.text import TextTokenizer

Picture = Literal["base", "direct", "final"]


@dataclass(frozen=True)
class Drawn:
    """The codes of drawn pictures, int64 on the CPU, in the order of the prompts."""

    base_codes: torch.Tensor
    """[B, base_grid^2]."""
    direct_codes: torch.Tensor | None
    """[B, fine_grid^2], before iterative super-resolution; None without direct super-resolution."""
    final_codes: torch.Tensor
    """Those of the last pass that ran: `base_codes` without super-resolution."""
    image_tokenizer: ImageTokenizer
    batch: int
    """Pictures decoded together."""

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """The names that `pixels` knows here."""
        return ("base", "final") if self.direct_codes is None else ("base", "direct", "final")

    def pixels(self, name: Picture = "final") -> torch.Tensor:
        """Return one picture for each prompt, float32 [B, 3, H, W] in [0, 1] on the CPU; H is grid * rate.

        Raises:
            DataError: a picture that was not drawn.
        """
        if name not in self.pictures:
            raise DataError(f"there is no picture {name!r}; drawn were {', '.join(self.pictures)}")
        codes = {"base": self.base_codes, "direct": self.direct_codes, "final": self.final_codes}[name]
        assert codes is not None
        return torch.cat([self.image_tokenizer.decode(part).cpu() for part in codes.split(self.batch)])


class TextToImage:
    """Trained models that draw pictures for prompts.

    A picture depends on its prompt, the seed and its number alone, not on the others drawn with it. What is
    left is rounding: a matrix product of another batch size may differ in the last bits of float32, and with
    it, rarely, a draw at the very edge between two codes.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        coglm: CogLM,
        direct: DirectSR | None,
        iterative: IterativeSR | None,
        image_tokenizer: ImageTokenizer,
        *,
        base_grid: int,
        sampling: SamplingConfig,
        labels: torch.Tensor,
    ) -> None:
        """Bind the parts; each model stays on its device and keeps its mode.

        Args:
            tokenizer: of the prompts; its vocabulary is the id layout of all models.
            coglm: draws the base codes.
            direct: first half of super-resolution; None draws base pictures only.
            iterative: second half; needs `direct`.
            image_tokenizer: codes to pixels.
            base_grid: side of the base grid.
            sampling: section `sampling` of the recipe.
            labels: int64 [codebook size], the clusters of the codes (`clusters.fit_clusters`).

        Raises:
            ConfigError: parts that do not belong together.
        """
        self.tokenizer, self.vocabulary = tokenizer, tokenizer.vocabulary
        self.coglm, self.direct, self.iterative = coglm, direct, iterative
        self.image_tokenizer, self.base_grid = image_tokenizer, base_grid
        self.sampling, self.labels = sampling, labels
        self._check()

    def _check(self) -> None:
        codes = self.vocabulary.image_codes
        if len(self.labels) != codes or len(self.image_tokenizer.codebook) != codes:
            raise ConfigError(
                f"the vocabulary has {codes} image codes, the codebook {len(self.image_tokenizer.codebook)} "
                f"and the clusters {len(self.labels)}; take all three from one run"
            )
        if self.iterative is not None and self.direct is None:
            raise ConfigError("iterative super-resolution refines direct codes; give the direct model too")
        if self.direct is not None and self.direct.base_grid != self.base_grid:
            raise ConfigError(
                f"direct super-resolution starts from a grid of {self.direct.base_grid}, CogLM draws "
                f"{self.base_grid}; take both from one run"
            )
        if self.direct is not None and self.iterative is not None:
            fine = self.direct.base_grid * self.direct.ratio
            if self.iterative.grid != fine:
                raise ConfigError(
                    f"direct super-resolution gives a grid of {fine}, iterative needs {self.iterative.grid}; "
                    "take both from one run"
                )

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the model ids of each prompt.

        Raises:
            DataError: a prompt without any token.
        """
        text_ids = [self.tokenizer.encode(prompt) for prompt in prompts]
        for number, (prompt, ids) in enumerate(zip(prompts, text_ids, strict=True)):
            if not ids:
                raise DataError(f"prompt {number} is empty ({prompt!r}); say what to draw")
        return text_ids

    def draw(self, prompts: Sequence[str], seed: int, first_number: int = 0) -> Drawn:
        """Draw one picture for each prompt, `sampling.batch` at a time.

        Args:
            prompts: texts.
            seed: equal seeds draw equal pictures.
            first_number: number of the first picture; the others count on. Ranks that share a list of prompts
                give each its place in it.

        Raises:
            DataError: no prompts, or an empty one.
        """
        if not prompts:
            raise DataError("there is nothing to draw; give at least one prompt")
        text_ids = self.encode(prompts)
        batches = []
        for start in range(0, len(text_ids), self.sampling.batch):
            part = text_ids[start : start + self.sampling.batch]
            numbers = range(first_number + start, first_number + start + len(part))
            batches.append(self._draw_batch(part, seed, numbers))
        base, direct, final = zip(*batches, strict=True)
        return Drawn(
            base_codes=torch.cat(base),
            direct_codes=None if self.direct is None else torch.cat(direct),
            final_codes=torch.cat(final),
            image_tokenizer=self.image_tokenizer,
            batch=self.sampling.batch,
        )

    def _draw_batch(
        self, text_ids: list[list[int]], seed: int, numbers: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return base, direct and final codes of one batch; passes without a model repeat those before."""
        final = direct = base = sample_base_codes(
            self.coglm,
            text_ids,
            batch_uniforms(seed, numbers, "base", self.base_grid**2, 2),
            grid=self.base_grid,
            vocabulary=self.vocabulary,
            labels=self.labels,
            config=self.sampling.base,
        )
        if self.direct is not None:
            cells = (self.direct.base_grid * self.direct.ratio) ** 2
            final = direct = direct_superres(
                self.direct,
                text_ids,
                base,
                batch_uniforms(seed, numbers, "direct", cells, 2),
                vocabulary=self.vocabulary,
                labels=self.labels,
                config=self.sampling.direct,
            )
        if self.iterative is not None:
            cells = self.iterative.grid**2
            final = iterative_superres(
                self.iterative,
                text_ids,
                direct,
                batch_uniforms(seed, numbers, "iterative", cells, PASSES).permute(2, 0, 1),
                vocabulary=self.vocabulary,
                config=self.sampling.iterative,
            )
        return base.cpu(), direct.cpu(), final.cpu()
