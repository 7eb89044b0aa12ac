"""What pictures and texts there are, and the grids that they are cut into."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from cogview2.pipeline.config.base import Config

Language = Literal["en", "zh"]
GENERATED_SOURCE = "drawings"


class DrawingsConfig(Config):
    """The generated data set: objects with colour, shape, size and place on a background."""

    count: Annotated[int, Field(ge=1)] = 4000
    """Training pictures."""
    max_objects: Annotated[int, Field(ge=1, le=3)] = 2
    """Most objects in one picture."""
    held_out_pairs: Annotated[float, Field(ge=0.0, lt=0.7)] = 0.3
    """Share of the (colour, shape) pairs that never occur in training."""
    jitter: Annotated[float, Field(ge=0, le=0.03)] = 0.015
    """Largest shift of an object's centre / side of the picture, each way."""


class ImageRulesConfig(Config):
    """Which pictures are accepted (pipeline/data/images.py)."""

    max_pixels: Annotated[int, Field(ge=1)] = 64_000_000
    """Refused from the header when width x height is above this (decompression bombs)."""
    max_aspect: Annotated[float, Field(ge=1)] = 4.0
    """Longer side / shorter side."""
    min_side: Annotated[int, Field(ge=1)] | None = None
    """Shorter side in pixels; by default the base image size, so that nothing is enlarged for CogLM."""
    max_file_bytes: Annotated[int, Field(ge=1)] = 64 * 1024 * 1024


class CaptionRulesConfig(Config):
    """Which captions are accepted."""

    max_characters: Annotated[int, Field(ge=1)] = 2000


class TextCorpusConfig(Config):
    """One plain-text file, UTF-8, one sentence a line."""

    path: str
    for_tokenizer: bool = True
    """Use it to train the tokenizer."""
    for_objective: bool = True
    """Pack it into text samples for the text objective of CogLM."""


class DataConfig(Config):
    """Sources, languages, and the two image sizes."""

    source: str = GENERATED_SOURCE
    """`drawings`, or a folder: with captions.jsonl, with <name>.txt beside each picture, or of raw webdataset tars."""
    languages: tuple[Language, ...] = ("en", "zh")
    base_size: Annotated[int, Field(ge=8)] = 160
    """Side in pixels of the picture that CogLM draws (spec 2.5: 160)."""
    compression_rate: Literal[4, 8, 16] = 8
    """Pixels per code, each way."""
    superres_ratio: Annotated[int, Field(ge=2, le=8)] = 3
    """High-resolution grid side / base grid side (spec 4.1: 20 -> 60)."""
    held_out: Annotated[int, Field(ge=1)] = 200
    """Pictures kept from training, for evaluation. Chosen by a hash of the key, never by position."""
    drawings: DrawingsConfig = DrawingsConfig()
    images: ImageRulesConfig = ImageRulesConfig()
    captions: CaptionRulesConfig = CaptionRulesConfig()
    text: tuple[TextCorpusConfig, ...] = ()

    @field_validator("source")
    @classmethod
    def _local_source(cls, value: str) -> str:
        if "://" in value or value.startswith("pipe:"):
            raise ValueError(
                f"data.source {value!r} is not a local path; copy the data to a file system and name the folder"
            )
        return value

    @model_validator(mode="after")
    def _grids(self) -> "DataConfig":
        if self.base_size % self.compression_rate:
            raise ValueError(
                f"base_size {self.base_size} is not a multiple of compression_rate {self.compression_rate}; "
                f"use {self.base_size // self.compression_rate * self.compression_rate or self.compression_rate}"
            )
        if self.base_size % 16:
            raise ValueError(
                f"base_size {self.base_size} is not a multiple of 16, the coarsest rate of the VQVAE"
            )
        return self

    @property
    def base_grid(self) -> int:
        """Side of the base grid, in codes."""
        return self.base_size // self.compression_rate

    @property
    def superres_grid(self) -> int:
        """Side of the high-resolution grid, in codes."""
        return self.base_grid * self.superres_ratio

    @property
    def superres_size(self) -> int:
        """Side of the final picture, in pixels."""
        return self.base_size * self.superres_ratio
