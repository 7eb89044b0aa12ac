"""Sizes of the networks. Defaults are the published ones (spec 1.3, 2.1, 4, 5)."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cogview2.pipeline.config.base import Config

Positive = Annotated[int, Field(ge=1, le=2**26)]
Width = Annotated[int, Field(ge=1, le=2**17)]
Count = Annotated[int, Field(ge=1, le=2**10)]
"""Upper bounds keep the sizes that a stranger's file claims from filling the memory before they are compared."""


class VQVAEConfig(Config):
    """The hierarchical VQVAE: one encoder and codebook, a decoder for each of the rates 4, 8, 16 (spec 1.3)."""

    base_channels: Width = 128
    encoder_multipliers: tuple[Count, ...] = (1, 2, 4)
    encoder_res_blocks: Count = 2
    decoder_multipliers: tuple[tuple[Count, ...], tuple[Count, ...], tuple[Count, ...]] = (
        (1, 1, 1, 2, 4),
        (1, 1, 2, 4),
        (1, 2, 4),
    )
    """For the decoders of rates 16, 8, 4, in this order (the order of `decs` in the published layout)."""
    latent_channels: Width = 256
    codebook_size: Positive = 20_000
    norm_groups: Width = 32
    pixel_mean: tuple[float, float, float] = (0.79093, 0.76271, 0.75340)
    pixel_std: tuple[float, float, float] = (0.30379, 0.32279, 0.32800)

    @model_validator(mode="after")
    def _shapes(self) -> "VQVAEConfig":
        if len(self.encoder_multipliers) != 3:
            raise ValueError("encoder_multipliers needs 3 levels: the encoder's stride is 4")
        for rate, multipliers in zip((16, 8, 4), self.decoder_multipliers, strict=True):
            levels = rate.bit_length()
            if len(multipliers) != levels:
                raise ValueError(
                    f"the decoder of rate {rate} needs {levels} multipliers, not {len(multipliers)}"
                )
        if self.base_channels % self.norm_groups:
            raise ValueError(
                f"base_channels {self.base_channels} is not a multiple of norm_groups {self.norm_groups}"
            )
        return self


class VocabularyConfig(Config):
    """Sizes of the id ranges: image codes first, then text pieces, then special tokens (spec 1.1)."""

    text_pieces: Positive = 130_000
    rows: Positive | None = None
    """Rows of the embedding; by default just enough. The published models have 150,010."""


class CogLMConfig(Config):
    """The transformer (spec 2.1) and its sequence layout (spec 2.5)."""

    layers: Count = 48
    hidden: Width = 3072
    heads: Width = 48
    feed_forward_multiplier: Count = 4
    max_positions: Width = 1024
    text_length: Width = 112
    """Slots before the image codes; the last one becomes <start_of_image>."""
    image_position: Width = 512
    """Position id of <start_of_image>; image code k has image_position + 1 + k."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    layernorm_eps: float = 1e-5
    init_std: float = 0.02
    branch_norm_init: Annotated[float, Field(gt=0)] = 1.0
    """Initial weight of the two layer norms on branch outputs (published: 1). At 1 each branch starts as large as a
    normalised vector and drowns embeddings of std `init_std`; narrow models learn faster from a smaller one."""
    attention_pb_relax: Annotated[float, Field(ge=0)] = 0.0
    """alpha of softmax((S / alpha - max(S / alpha)) alpha) (spec 2.3); 0, off, as released. CogView had 32. The local
    attention of super-resolution keeps its scores in float32 and needs none."""
    layernorm_pb_relax: bool = False
    """Divide the input of every layer norm by max|x| / 8 first (spec 2.2); off as released."""
    vocabulary: VocabularyConfig = VocabularyConfig(rows=150_010)

    @model_validator(mode="after")
    def _shapes(self) -> "CogLMConfig":
        if self.hidden % self.heads:
            raise ValueError(f"hidden {self.hidden} is not a multiple of heads {self.heads}")
        if self.text_length > self.image_position:
            raise ValueError(f"text_length {self.text_length} is above image_position {self.image_position}")
        return self


class DirectSRConfig(Config):
    """Direct super-resolution on top of a frozen CogLM (spec 4)."""

    text_length: Width = 96
    local_kernel: tuple[Count, Count] = (9, 5)
    """Rows x columns of the window on the high-resolution grid (released: 9x5; paper: 9x9)."""
    cross_kernel: tuple[Count, Count] = (5, 5)
    """Rows x columns of the window on the base grid."""
    freeze_base: bool = True
    """Train only the second attention set and the new positions (spec 4.2)."""
    position_init: Literal["tiled", "nearest"] = "tiled"
    """How the new position rows start: the released periodic tiling, or the base cell under each fine cell."""


class IterativeSRConfig(Config):
    """Iterative super-resolution: masked prediction with local attention (spec 5)."""

    text_length: Width = 16
    local_kernel: tuple[Count, Count] = (9, 5)
    mask_ratios: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 0.9)
    """One is drawn for each training sample (spec 5.2)."""
    init: Literal["coglm", "direct"] = "coglm"
    """Whose weights training starts from (published: CogLM's). Direct SR, when its base was trained too, knows the
    high-resolution codes already, and half the steps suffice; its positions are taken too."""
    position_init: Literal["tiled", "nearest"] = "tiled"
