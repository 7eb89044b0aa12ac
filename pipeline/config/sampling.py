"""Temperatures and schedules of the three sampling passes (spec 3.1, 4.4, 5.2)."""

from typing import Annotated, Literal

from pydantic import Field

from cogview2.pipeline.config.base import Config

Positive = Annotated[int, Field(ge=1)]
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

    schedule: Literal["released"] = "released"
    """The published 6x6 pattern, tiled."""
    temperature: Temperature = 1.0
    top_k: tuple[Positive, Positive, Positive, Positive, Positive, Positive] = (40, 40, 40, 20, 20, 10)
    """Of each of the passes."""


class SamplingConfig(Config):
    """From a prompt to pixels."""

    clusters: Positive = 500
    """k-means clusters of the codebook (spec 3.3)."""
    base: AutoregressiveSamplingConfig = AutoregressiveSamplingConfig()
    direct: DirectSRSamplingConfig = DirectSRSamplingConfig()
    iterative: IterativeSRSamplingConfig = IterativeSRSamplingConfig()
    batch: Positive = 16
    """Prompts drawn together."""
