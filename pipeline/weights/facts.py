"""weights.json: what a weights folder says of its models, and the classes that these facts build."""

from collections.abc import Iterator
from math import isqrt
from typing import Literal

from pydantic import ConfigDict, Field, model_validator
from torch import nn

from cogview2.pipeline.config.base import Config
from cogview2.pipeline.config.model import (
    CogLMConfig,
    Count,
    DirectSRConfig,
    IterativeSRConfig,
    Positive,
    VQVAEConfig,
)
from cogview2.pipeline.config.sampling import SamplingConfig
from cogview2.pipeline.models.coglm.model import CogLM
from cogview2.pipeline.models.sr.direct import DirectSR
from cogview2.pipeline.models.sr.iterative import IterativeSR
from cogview2.pipeline.models.vqvae.model import VQVAE
from cogview2.pipeline.tokenizers.vocabulary import SPECIAL_TOKENS, Vocabulary

PUBLISHED_BASE_GRID, PUBLISHED_RATIO = 20, 3


class StoredFile(Config):
    """A file of the folder."""

    file: str = ""
    sha256: str = ""
    bytes: int = 0
    dtype: str = ""
    """Of most numbers."""
    parameters: int = 0
    """Without the moving averages of the VQVAE's codebook."""
    source: str = ""
    """Where it was imported from."""
    iteration: int | None = None
    """Training step that the source names."""


class CogLMFacts(StoredFile):
    """CogLM."""

    config: CogLMConfig
    rows: Positive
    """Rows of the word embeddings."""

    def build(self) -> nn.Module:
        """Return the model with fresh weights."""
        return CogLM(self.config, self.rows)


class DirectFacts(StoredFile):
    """Direct super-resolution."""

    config: DirectSRConfig
    coglm: CogLMConfig
    rows: Positive
    base_grid: Count
    """Side of the base grid."""
    ratio: Count
    """High-resolution side / base side."""

    def build(self) -> nn.Module:
        """Return the model with fresh weights."""
        return DirectSR(self.coglm, self.config, self.base_grid, self.ratio, self.rows)


class IterativeFacts(StoredFile):
    """Iterative super-resolution."""

    config: IterativeSRConfig
    coglm: CogLMConfig
    rows: Positive
    grid: Count
    """Side of the high-resolution grid."""

    def build(self) -> nn.Module:
        """Return the model with fresh weights."""
        return IterativeSR(self.coglm, self.config, self.grid, self.rows)


class ImageFacts(StoredFile):
    """The VQVAE."""

    config: VQVAEConfig

    def build(self) -> nn.Module:
        """Return the model with fresh weights."""
        return VQVAE(self.config)


class TextFacts(StoredFile):
    """The SentencePiece model and its id layout."""

    vocabulary: Vocabulary


NetworkFacts = CogLMFacts | DirectFacts | IterativeFacts | ImageFacts
NETWORKS: dict[str, type[CogLMFacts] | type[DirectFacts] | type[IterativeFacts] | type[ImageFacts]] = {
    "icetk-image": ImageFacts,
    "coglm": CogLMFacts,
    "direct-sr": DirectFacts,
    "iterative-sr": IterativeFacts,
}
"""Kind -> class of its facts, for the kinds that are networks."""


class Models(Config):
    """The models of a folder by kind."""

    model_config = ConfigDict(validate_by_name=True, serialize_by_alias=True)

    icetk_text: TextFacts | None = Field(default=None, alias="icetk-text")
    icetk_image: ImageFacts | None = Field(default=None, alias="icetk-image")
    coglm: CogLMFacts | None = None
    direct_sr: DirectFacts | None = Field(default=None, alias="direct-sr")
    iterative_sr: IterativeFacts | None = Field(default=None, alias="iterative-sr")

    def get(self, kind: str) -> TextFacts | NetworkFacts | None:
        """Return the facts of a kind (weights_manifest.KINDS), None where the folder lacks it."""
        found: TextFacts | NetworkFacts | None = getattr(self, kind.replace("-", "_"))
        return found


class DataSizes(Config):
    """Sizes of pictures, as in the recipe's section `data`."""

    base_size: int = PUBLISHED_BASE_GRID * 8
    compression_rate: Literal[4, 8, 16] = 8
    superres_ratio: int = PUBLISHED_RATIO

    @property
    def base_grid(self) -> int:
        """Side of the base grid, in codes."""
        return self.base_size // self.compression_rate

    @property
    def superres_grid(self) -> int:
        """Side of the high-resolution grid, in codes."""
        return self.base_grid * self.superres_ratio


class Facts(Config):
    """The content of weights.json."""

    format: Literal[1] = 1
    models: Models = Models()
    data: DataSizes = DataSizes()
    sampling: SamplingConfig = SamplingConfig()
    seed: int = 1234
    clusters: str | None = None
    """File with the cluster of each image code."""

    @model_validator(mode="after")
    def _plain_name(self) -> "Facts":
        if self.clusters is not None and ("/" in self.clusters or self.clusters in ("", ".", "..")):
            raise ValueError(f"clusters {self.clusters!r} is no plain file name")
        return self


def data_sizes(models: Models, rate: Literal[4, 8, 16]) -> DataSizes:
    """Return the sizes of pictures that the models were made for.

    Direct super-resolution knows its grids; without it the published ones count, or for a smaller CogLM the
    largest base grid that its positions have room for.
    """
    grid, ratio = PUBLISHED_BASE_GRID, PUBLISHED_RATIO
    if models.direct_sr is not None:
        grid, ratio = models.direct_sr.base_grid, models.direct_sr.ratio
    elif models.coglm is not None:
        config = models.coglm.config
        grid = min(grid, isqrt(max(1, config.max_positions - config.image_position - 1)))
    if models.direct_sr is None and models.iterative_sr is not None:
        if models.iterative_sr.grid % ratio == 0:
            grid = models.iterative_sr.grid // ratio
    return DataSizes(base_size=grid * rate, compression_rate=rate, superres_ratio=ratio)


def contradictions(models: Models) -> Iterator[str]:
    """Yield in words which models of a folder do not fit each other; such a folder cannot draw pictures."""
    text, image, coglm = models.icetk_text, models.icetk_image, models.coglm
    direct, iterative = models.direct_sr, models.iterative_sr
    if text is not None and image is not None:
        codes, layout = image.config.codebook_size, text.vocabulary.image_codes
        if codes != layout:
            yield f"icetk-image has {codes:,} codes, but the text ids of icetk-text begin after {layout:,}"
    for kind in ("coglm", "direct-sr", "iterative-sr"):
        facts = models.get(kind)
        if text is None or facts is None:
            continue
        assert isinstance(facts, CogLMFacts | DirectFacts | IterativeFacts)
        needed = text.vocabulary.text_end + len(SPECIAL_TOKENS)
        if facts.rows < needed:
            yield f"{kind} has embeddings for {facts.rows:,} ids, but icetk-text needs {needed:,}"
    if direct is not None and iterative is not None and direct.base_grid * direct.ratio != iterative.grid:
        yield (
            f"direct-sr draws a grid of {direct.base_grid * direct.ratio} codes, "
            f"but iterative-sr works on {iterative.grid}"
        )
    if direct is not None and coglm is not None:
        needed = coglm.config.image_position + 1 + direct.base_grid**2
        if coglm.config.max_positions < needed:
            yield f"coglm has {coglm.config.max_positions} positions, but direct-sr's base grid needs {needed}"
