"""How trained models draw, edit, caption and rank (spec 3, 4.4, 5.2, 7)."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cogview2.pipeline.config.base import Config

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Temperature = Annotated[float, Field(gt=0)]


class AutoregressiveSamplingConfig(Config):
    """Cluster sampling of the base codes (spec 3.3)."""

    temperature: Temperature = 1.15
    top_k_clusters: Positive = 16
    cluster_temperature: Temperature = 1.0
    text_attention_bias: float = 1.4
    """Added to every attention score on a text column (spec 3.2)."""


class DirectSRSamplingConfig(Config):
    """Cluster sampling of all high-resolution codes at once (spec 4.4)."""

    temperature: Temperature = 1.0
    top_k_clusters: Positive = 100
    cluster_temperature: Temperature = 0.89


class IterativeSRSamplingConfig(Config):
    """Local parallel autoregression (LoPAR, spec 5.2)."""

    schedule: Literal["released", "diagonal"] = "released"
    """`released`: the published 6x6 pattern, tiled, 6 rounds, 23 of 36 cells drawn again. `diagonal`: made from the three
    values below, as the paper describes it."""
    window: Positive = 6
    """Side of the tile of a diagonal schedule."""
    mask_ratio: Share = 0.75
    """Share of the cells that a diagonal schedule draws again."""
    rounds: Positive = 6
    """Model runs of a diagonal schedule."""
    temperature: Temperature = 1.0
    top_k: tuple[Positive, ...] = (40, 40, 40, 20, 20, 10)
    """Of each of the rounds; a single number counts for all."""

    @property
    def passes(self) -> int:
        """Model runs of the schedule."""
        return 6 if self.schedule == "released" else self.rounds

    @property
    def top_k_of_passes(self) -> tuple[int, ...]:
        """`top_k`, one number for each pass."""
        return self.top_k * self.passes if len(self.top_k) == 1 else self.top_k

    @model_validator(mode="after")
    def _rounds(self) -> "IterativeSRSamplingConfig":
        if len(self.top_k) not in (1, self.passes):
            raise ValueError(
                f"top_k has {len(self.top_k)} numbers, but schedule {self.schedule} has {self.passes} rounds; give "
                "one number or one for each round"
            )
        if self.schedule == "diagonal" and self.rounds > self.window**2:
            raise ValueError(
                f"{self.rounds} rounds need as many cells, but a window of {self.window} has {self.window**2}; use "
                "fewer rounds"
            )
        return self


class RankingConfig(Config):
    """How well a text fits a picture, by its likelihood as the picture's caption (spec 3.5)."""

    candidates: Positive = 1
    """Base pictures drawn for each prompt; only the best goes on to super-resolution."""
    applies: Literal["always", "base_only"] = "always"
    """When the scores decide which candidates are kept: always, or only when base pictures are the result; then
    super-resolution takes the candidates in the order in which they were drawn (released)."""
    start: Literal["language", "english", "chinese"] = "language"
    """Token before the text: that of its language, as trained, or always the one of English or Chinese (released: always
    <start_of_chinese>)."""
    softmax: Literal["all", "text"] = "all"
    """Ids among which the text must be likely: all (released), or text alone (CogView)."""
    reduce: Literal["mean", "sum"] = "mean"
    """Over the tokens of the text: mean (released) or sum (CogView)."""


class EditingConfig(Config):
    """Redrawing a region of a picture (spec 7)."""

    crop: Literal["region", "whole"] = "region"
    """What CogLM sees: a square around the region (released), or always the whole picture."""
    region_share: Share = 0.7
    """Side of the region / side of the square around it (released: 14 of 20 tokens)."""
    cells: Literal["nearest", "touched"] = "nearest"
    """Codes that are drawn again: those whose sampled pixel is marked (released), or all that a marked pixel touches, so
    that nothing of the old content stays."""
    known: Literal["all", "before"] = "all"
    """Known codes that a redrawn one sees: all (released), or those before it in raster order alone, as in training from
    text to image; small models obey the text better then, but cannot look ahead."""
    second_start_of_image: bool = False
    """Put a <start_of_image> at the end of the text too, as the released script does."""
    paste: Literal["crop", "region"] = "crop"
    """What is put back into the picture: the whole square (released), or the region alone."""
    harmonise: bool = True
    """Encode and decode the whole picture at the end, as released."""
    candidates: Positive = 1
    """Pictures to draw; those that fit the text best by caption score come first (released: 4, in no order)."""


class CaptioningConfig(Config):
    """Describing a picture (spec 7)."""

    max_tokens: Positive = 60
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 takes the likeliest token each time."""
    top_k: Positive = 16
    candidates: Positive = 1
    """Captions drawn for each picture; the likeliest is kept. More than one needs a temperature."""


class SamplingConfig(Config):
    """From a prompt to pixels."""

    clusters: Positive = 500
    """k-means clusters of the codebook (spec 3.3)."""
    cluster_labels: str | None = None
    """Path of an .npy with the cluster of every code (published: int64 [20000]), instead of fitting them."""
    base: AutoregressiveSamplingConfig = AutoregressiveSamplingConfig()
    direct: DirectSRSamplingConfig = DirectSRSamplingConfig()
    iterative: IterativeSRSamplingConfig = IterativeSRSamplingConfig()
    ranking: RankingConfig = RankingConfig()
    editing: EditingConfig = EditingConfig()
    captioning: CaptioningConfig = CaptioningConfig()
    batch: Positive = 16
    """Prompts drawn together."""
    offload: bool = False
    """The transformers wait in the host's memory and take turns on the GPU, where it does not hold them all (`cogview2 plan`)."""
