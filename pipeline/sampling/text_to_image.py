"""From prompts to pictures: base codes, direct and iterative super-resolution, pixels (spec 0)."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import nn

from cogview2.pipeline.config.sampling import SamplingConfig
from cogview2.pipeline.errors import ConfigError, DataError
from cogview2.pipeline.models.coglm.model import CogLM
from cogview2.pipeline.models.sr.direct import DirectSR
from cogview2.pipeline.models.sr.iterative import IterativeSR
from cogview2.pipeline.sampling.autoregressive import sample_base_codes
from cogview2.pipeline.sampling.meter import Meter, measured
from cogview2.pipeline.sampling.noise import uniforms
from cogview2.pipeline.sampling.reranking import caption_log_likelihood
from cogview2.pipeline.sampling.styles import Style
from cogview2.pipeline.sampling.superres import direct_superres, iterative_superres
from cogview2.pipeline.tokenizers.image import ImageTokenizer
from cogview2.pipeline.tokenizers.text import TextTokenizer

Picture = Literal["base", "direct", "final"]


class Pick(NamedTuple):
    """Which prompt a picture belongs to, and which of its candidates it is."""

    prompt: int
    candidate: int = 0
    score: float | None = None
    """Log likelihood of the prompt as its caption, in nats; None when there was nothing to choose from."""


@dataclass(frozen=True)
class Drawn:
    """The codes of drawn pictures, int64 on the CPU, in the order of the prompts.

    B counts pictures: one for each prompt, or those kept of each prompt's candidates side by side.
    """

    base_codes: torch.Tensor
    """[B, base_grid^2]."""
    direct_codes: torch.Tensor | None
    """[B, fine_grid^2], before iterative super-resolution; None without direct super-resolution."""
    final_codes: torch.Tensor
    """Those of the last pass that ran: `base_codes` without super-resolution."""
    image_tokenizer: ImageTokenizer
    batch: int
    """Pictures decoded together."""
    picks: tuple[Pick, ...] = ()
    """Of each picture."""
    meter: Meter | None = None
    """Counts what decoding costs."""
    notes: tuple[str, ...] = ()
    """What was changed on the way, a sentence each."""

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """The names that `pixels` knows here."""
        return ("base", "final") if self.direct_codes is None else ("base", "direct", "final")

    def pixels(self, name: Picture = "final") -> torch.Tensor:
        """Return the pictures, float32 [B, 3, H, W] in [0, 1] on the CPU; H is grid * rate.

        Raises:
            DataError: a picture that was not drawn.
        """
        if name not in self.pictures:
            raise DataError(f"there is no picture {name!r}; drawn were {', '.join(self.pictures)}")
        codes = {"base": self.base_codes, "direct": self.direct_codes, "final": self.final_codes}[name]
        assert codes is not None
        parts = []
        for part in codes.split(self.batch):
            with measured(self.meter, "decode", self._decoder, len(part)):
                parts.append(self.image_tokenizer.decode(part).clamp(0, 1).cpu())
        return torch.cat(parts)

    def _decoder(self) -> nn.Module:
        return self.image_tokenizer.vqvae.decoder(self.image_tokenizer.rate)


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

    def encode_styled(self, prompt: str, style: Style) -> tuple[list[int], str | None]:
        """Return the model ids of a prompt in a style, and a sentence if the prompt is too long for CogLM.

        A prompt loses its own end then, never the style.
        """
        ids, most = self.encode([style.prompt(prompt)])[0], self.coglm.config.text_length - 1
        if len(ids) <= most:
            return ids, None
        total = len(ids)
        if style.prompt(""):
            low, high = 0, len(prompt)
            while low + 1 < high:  # the most characters that leave room for the style
                middle = (low + high) // 2
                fits = len(self.encode([style.prompt(prompt[:middle])])[0]) <= most
                low, high = (middle, high) if fits else (low, middle)
            ids = self.encode([style.prompt(prompt[:low])])[0]
        return ids[:most], (
            f"the text {prompt[:40]!r}... takes {total} ids, CogLM has room for {most}; its end was left out"
        )

    def with_sampling(self, sampling: SamplingConfig) -> "TextToImage":
        """Return the same models with other settings; this object stays as it is."""
        other = copy.copy(self)
        other.sampling = sampling
        return other

    def draw(
        self,
        prompts: Sequence[str],
        seed: int,
        first_number: int = 0,
        *,
        style: Style | None = None,
        candidates: int | None = None,
        keep: int = 1,
        meter: Meter | None = None,
    ) -> Drawn:
        """Draw pictures for each prompt, `sampling.batch` at a time.

        With several candidates, base pictures are scored by the likelihood of the prompt, without the style, as
        their caption (spec 3.5), and only the best go on to super-resolution. Candidate 0 is the picture that is
        drawn without others.

        Args:
            prompts: texts.
            seed: equal seeds draw equal pictures.
            first_number: number of the first prompt's picture; the others count on. Ranks that share a list of
                prompts give each its place in it.
            style: what is added to the prompts and changed in `sampling`.
            candidates: base pictures for each prompt; `sampling.ranking.candidates` by default.
            keep: how many of them each prompt ends with, best first.
            meter: counts what the stages cost.

        Raises:
            DataError: no prompts, an empty one, or more to keep than candidates.
        """
        if not prompts:
            raise DataError("there is nothing to draw; give at least one prompt")
        style = style or Style()
        task = _Task(self.with_sampling(style.sampling_for(self.sampling)), seed, meter)
        candidates = task.cascade.sampling.ranking.candidates if candidates is None else candidates
        if not 1 <= keep <= candidates:
            raise DataError(
                f"{keep} of {candidates} candidates cannot be kept; keep at least 1 and at most all"
            )
        queries = self.encode(prompts)
        text_ids, notes = zip(*(self.encode_styled(prompt, style) for prompt in prompts), strict=True)
        picks = [Pick(prompt, candidate) for prompt in range(len(prompts)) for candidate in range(candidates)]
        base_RM = task.base(picks, list(text_ids), first_number)
        if candidates > 1:
            scores_R = task.scores(picks, queries, base_RM)
            picks = [pick._replace(score=float(score)) for pick, score in zip(picks, scores_R, strict=True)]
            rows = task.kept(picks, keep)
            picks, base_RM = [picks[row] for row in rows], base_RM[rows]
        direct_RG, final_RX = task.superres(picks, list(text_ids), base_RM, first_number)
        return Drawn(
            base_codes=base_RM,
            direct_codes=direct_RG,
            final_codes=final_RX,
            image_tokenizer=self.image_tokenizer,
            batch=self.sampling.batch,
            picks=tuple(picks),
            meter=meter,
            notes=tuple(note for note in notes if note is not None),
        )


@dataclass(frozen=True)
class _Task:
    """One call of `draw`: its settings, its seed, and the batches of each stage."""

    cascade: TextToImage
    seed: int
    meter: Meter | None

    def _batches(self, stage: str, model: nn.Module, rows: int) -> Iterator[slice]:
        """Yield the rows of each batch, measured while the caller works on them."""
        batch = self.cascade.sampling.batch
        for start in range(0, rows, batch):
            part = slice(start, min(start + batch, rows))
            with measured(self.meter, stage, lambda: model, part.stop - part.start):
                yield part

    def _noise(
        self, picks: Sequence[Pick], first_number: int, stage: str, count: int, columns: int
    ) -> torch.Tensor:
        """Return float32 [R, count, columns]; the first candidate has the noise of a prompt without candidates."""
        return torch.stack(
            [
                uniforms(
                    self.seed,
                    first_number + pick.prompt,
                    f"{stage}/candidate {pick.candidate}" if pick.candidate else stage,
                    count,
                    columns,
                )
                for pick in picks
            ]
        )

    def base(self, picks: list[Pick], text_ids: list[list[int]], first_number: int) -> torch.Tensor:
        """Return base codes, int64 [R, M] on the CPU."""
        cascade, parts = self.cascade, []
        for part in self._batches("base", cascade.coglm, len(picks)):
            codes = sample_base_codes(
                cascade.coglm,
                [text_ids[pick.prompt] for pick in picks[part]],
                self._noise(picks[part], first_number, "base", cascade.base_grid**2, 2),
                grid=cascade.base_grid,
                vocabulary=cascade.vocabulary,
                labels=cascade.labels,
                config=cascade.sampling.base,
            )
            parts.append(codes.cpu())
        return torch.cat(parts)

    def scores(self, picks: list[Pick], queries: list[list[int]], base_RM: torch.Tensor) -> torch.Tensor:
        """Return how well each base picture fits its prompt, float32 [R] on the CPU."""
        cascade, parts = self.cascade, []
        for part in self._batches("rank", cascade.coglm, len(picks)):
            scores = caption_log_likelihood(
                cascade.coglm,
                [queries[pick.prompt] for pick in picks[part]],
                base_RM[part],
                cascade.vocabulary,
                start=cascade.sampling.ranking.start,
                softmax=cascade.sampling.ranking.softmax,
                reduce=cascade.sampling.ranking.reduce,
            )
            parts.append(scores)
        return torch.cat(parts)

    def kept(self, picks: list[Pick], keep: int) -> list[int]:
        """Return the rows that go on, those of a prompt together, best first; ties keep their order."""
        ranking, cascade = self.cascade.sampling.ranking, self.cascade
        counts = ranking.applies == "always" or cascade.direct is None
        rows = sorted(
            range(len(picks)),
            key=lambda row: (picks[row].prompt, -(picks[row].score or 0.0) if counts else 0.0, row),
        )
        places: dict[int, int] = {}
        chosen = []
        for row in rows:
            places[picks[row].prompt] = places.get(picks[row].prompt, 0) + 1
            if places[picks[row].prompt] <= keep:
                chosen.append(row)
        return chosen

    def superres(
        self, picks: list[Pick], text_ids: list[list[int]], base_RM: torch.Tensor, first_number: int
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return direct and final codes, int64 [R, G] on the CPU; passes without a model repeat those before."""
        cascade = self.cascade
        texts = [text_ids[pick.prompt] for pick in picks]
        if cascade.direct is None:
            return None, base_RM
        cells = (cascade.direct.base_grid * cascade.direct.ratio) ** 2
        parts = []
        for part in self._batches("direct", cascade.direct, len(picks)):
            codes = direct_superres(
                cascade.direct,
                texts[part],
                base_RM[part],
                self._noise(picks[part], first_number, "direct", cells, 2),
                vocabulary=cascade.vocabulary,
                labels=cascade.labels,
                config=cascade.sampling.direct,
            )
            parts.append(codes.cpu())
        direct_RG = torch.cat(parts)
        if cascade.iterative is None:
            return direct_RG, direct_RG
        parts = []
        for part in self._batches("iterative", cascade.iterative, len(picks)):
            passes = cascade.sampling.iterative.passes
            codes = iterative_superres(
                cascade.iterative,
                texts[part],
                direct_RG[part],
                self._noise(picks[part], first_number, "iterative", cells, passes).permute(2, 0, 1),
                vocabulary=cascade.vocabulary,
                config=cascade.sampling.iterative,
            )
            parts.append(codes.cpu())
        return direct_RG, torch.cat(parts)
