"""The hierarchical VQVAE: one encoder and codebook, and a decoder for each of the rates 4, 8, 16 (spec 1.3).

Dims: B batch, C channels, H height, W width (pixels, or codes where said), E code dim, M latents.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cogview2.pipeline.config.model import VQVAEConfig
from cogview2.pipeline.errors import ConfigError, DataError
from cogview2.pipeline.models.vqvae.autoencoder import Decoder, Encoder, ResidualDownsample, check_pixels
from cogview2.pipeline.models.vqvae.quantizer import VectorQuantizer

RATES = (4, 8, 16)
"""Pixels per code, each way; the order of all outputs over rates."""


@dataclass(frozen=True)
class VQVAEOutput:
    """One training forward."""

    reconstructions: dict[int, Tensor]
    """By rate: float32 pixels [B, 3, H, W] on the scale of the input, not clamped."""
    normalised: dict[int, Tensor]
    """By rate: what the decoder returned, before the pixel normalisation was undone."""
    commitment: Tensor
    """float32 scalar: the sum over the rates."""
    latents: Tensor
    """[M, E] projected latents of the rates, the finest first, cut off from the graph."""
    codes: Tensor
    """int64 [M], one for each latent; empty without quantization."""


class VQVAE(nn.Module):
    """Image tokenizer network; its state dict has exactly the published keys (spec 10.4)."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config = config
        latent, groups, base = config.latent_channels, config.norm_groups, config.base_channels
        self.enc = Encoder(base, config.encoder_multipliers, config.encoder_res_blocks, latent, groups)
        # In the published order: rates 16, 8, 4.
        self.decs = nn.ModuleList(
            Decoder(base, multipliers, latent, groups, attention=rate == RATES[-1])
            for rate, multipliers in zip(reversed(RATES), config.decoder_multipliers, strict=True)
        )
        self.quantize = VectorQuantizer(latent, config.codebook_size)
        self.down_samplers = nn.ModuleList(ResidualDownsample(latent) for _ in RATES[1:])

    @property
    def quantizer(self) -> VectorQuantizer:
        """The quantizer, under its glossary name (`quantize` is the published one)."""
        return self.quantize

    def decoder(self, rate: int) -> Decoder:
        """Return the decoder of a rate.

        Raises:
            ConfigError: there is none.
        """
        decoder = self.decs[len(RATES) - 1 - _rate_index(rate)]
        assert isinstance(decoder, Decoder)
        return decoder

    def normalise(self, pixels_BCHW: Tensor) -> Tensor:
        """Map pixels in [0, 1] to mean 0 and deviation 1 of each channel, in the weights' dtype."""
        mean_C11, std_C11 = self._pixel_scale(pixels_BCHW)
        return ((pixels_BCHW.float() - mean_C11) / std_C11).to(self.enc.conv_in.weight.dtype)

    def denormalise(self, normalised_BCHW: Tensor) -> Tensor:
        """Undo `normalise`; returns float32, not clamped."""
        mean_C11, std_C11 = self._pixel_scale(normalised_BCHW)
        return normalised_BCHW.float() * std_C11 + mean_C11

    def _pixel_scale(self, like: Tensor) -> tuple[Tensor, Tensor]:
        # From the config each time: buffers would be cast with the weights, and lost on a meta device.
        scale = torch.tensor([self.config.pixel_mean, self.config.pixel_std], device=like.device).view(
            2, 3, 1, 1
        )
        return scale[0], scale[1]

    @torch.no_grad()
    def encode(self, pixels_BCHW: Tensor, rate: int) -> Tensor:
        """Return the codes of pictures.

        Args:
            pixels_BCHW: float [B, 3, H, W] in [0, 1]; sides are multiples of `rate`.
            rate: 4, 8 or 16.

        Returns:
            int64 [B, H/rate, W/rate].

        Raises:
            ConfigError: no such rate.
            DataError: pixels of another shape or dtype.
        """
        depth = _rate_index(rate)
        self._check(pixels_BCHW, rate)
        features_BEHW = self.enc(self.normalise(pixels_BCHW))
        for down_sampler in self.down_samplers[:depth]:
            features_BEHW = down_sampler(features_BEHW)
        latents_BHWE = self.quantize.project(features_BEHW)
        return self.quantize.nearest(latents_BHWE.flatten(0, 2)).view(latents_BHWE.shape[:3])

    def decode(self, codes_BHW: Tensor, rate: int) -> Tensor:
        """Return the pictures of codes.

        Args:
            codes_BHW: int64 [B, H/rate, W/rate].
            rate: 4, 8 or 16; that of the codes.

        Returns:
            float32 pixels [B, 3, H, W], not clamped.

        Raises:
            ConfigError: no such rate.
        """
        decoder = self.decoder(rate)
        vectors_BEHW = self.quantize.lookup(codes_BHW).permute(0, 3, 1, 2)
        return self.denormalise(decoder(vectors_BEHW.to(decoder.conv_in.weight.dtype)))

    def forward(
        self, pixels_BCHW: Tensor, quantize: bool = True, rates: tuple[int, ...] = RATES
    ) -> VQVAEOutput:
        """Encode once, quantize and decode at every rate.

        Args:
            pixels_BCHW: float [B, 3, H, W] in [0, 1]; sides are multiples of 16.
            quantize: False trains a plain autoencoder: latents go to the decoders as they are, the
                commitment is 0 and `codes` is empty.
            rates: which rates to quantize and decode; the output holds these alone.

        Raises:
            DataError: pixels of another shape or dtype.
        """
        self._check(pixels_BCHW, RATES[-1])
        features_BEHW = self.enc(self.normalise(pixels_BCHW))
        normalised: dict[int, Tensor] = {}
        commitments, latents, codes = [], [], []
        for index, rate in enumerate(RATES[: RATES.index(max(rates)) + 1]):
            if index:
                features_BEHW = self.down_samplers[index - 1](features_BEHW)
            if rate not in rates:
                continue
            quantized = self.quantize(features_BEHW, quantize)
            normalised[rate] = self.decoder(rate)(quantized.vectors)
            commitments.append(quantized.commitment)
            latents.append(quantized.latents)
            codes.append(quantized.codes)
        return VQVAEOutput(
            reconstructions={rate: self.denormalise(output) for rate, output in normalised.items()},
            normalised=normalised,
            commitment=torch.stack(commitments).sum(),
            latents=torch.cat(latents),
            codes=torch.cat(codes),
        )

    @staticmethod
    def _check(pixels_BCHW: Tensor, multiple: int) -> None:
        problem = check_pixels(pixels_BCHW, multiple)
        if problem is not None:
            raise DataError(problem)


def _rate_index(rate: int) -> int:
    if rate not in RATES:
        raise ConfigError(f"the VQVAE has no rate {rate}; use one of {', '.join(map(str, RATES))}")
    return RATES.index(rate)
