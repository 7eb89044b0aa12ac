"""The frozen VQVAE as image tokenizer: pixels to flat codes and back, for any batch size (spec 1.3).

Dims: B batch, C channels, H height, W width, G codes of a square grid in raster order.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cogview2.pipeline.errors import DataError
from cogview2.pipeline.models.vqvae.model import VQVAE

PIXEL_TOLERANCE = 1e-3
"""How far a resampling filter may overshoot [0, 1]."""


class ImageTokenizer:
    """Codes of square pictures at one rate; puts the network into evaluation mode and builds no graph."""

    def __init__(self, vqvae: VQVAE, rate: int) -> None:
        """Bind a network and a rate.

        Args:
            vqvae: network with its weights, on the device where it shall run.
            rate: pixels per code, each way: 4, 8 or 16.

        Raises:
            ConfigError: the network has no such rate.
        """
        vqvae.decoder(rate)
        self.vqvae = vqvae.eval()
        self.rate = rate

    @property
    def codebook(self) -> Tensor:
        """The code vectors, float32 [n, E]."""
        return self.vqvae.quantizer.embed.weight

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.codebook.device

    @torch.no_grad()
    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the codes of square pictures.

        Args:
            pixels_BCHW: float [B, 3, H, H] in [0, 1], on any device; H is a multiple of the rate.

        Returns:
            int64 [B, (H/rate)^2] in raster order, on the network's device.

        Raises:
            DataError: pixels of another shape, dtype or range.
        """
        if pixels_BCHW.ndim == 4 and pixels_BCHW.shape[2] != pixels_BCHW.shape[3]:
            height, width = pixels_BCHW.shape[2:]
            raise DataError(f"flat codes need square pictures, not {height}x{width}; crop them first")
        if not len(pixels_BCHW):
            raise DataError("a batch of 0 pictures has no codes; pass at least one")
        pixels_BCHW = pixels_BCHW.to(self.device)
        low, high = (bound.item() for bound in pixels_BCHW.aminmax())
        if not (low >= -PIXEL_TOLERANCE and high <= 1 + PIXEL_TOLERANCE):
            raise DataError(
                f"pixels must lie in [0, 1], not in [{low:g}, {high:g}]; use to_pixels on 8-bit pictures"
            )
        return self.vqvae.encode(pixels_BCHW, self.rate).flatten(1)

    @torch.no_grad()
    def decode(self, codes_BG: Tensor) -> Tensor:
        """Return the pictures of flat codes.

        Args:
            codes_BG: integers [B, g*g] in raster order, on any device.

        Returns:
            float32 pixels [B, 3, g*rate, g*rate], clamped to [0, 1].

        Raises:
            DataError: not a square grid, or a code outside the codebook.
        """
        side = math.isqrt(codes_BG.shape[-1])
        if codes_BG.ndim != 2 or side**2 != codes_BG.shape[1] or not codes_BG.numel():
            raise DataError(f"codes must be [B, g*g] for a square grid, not {list(codes_BG.shape)}")
        codes_BG = codes_BG.to(self.device, torch.int64)
        low, high = (bound.item() for bound in codes_BG.aminmax())
        if low < 0 or high >= len(self.codebook):
            raise DataError(
                f"codes must lie in [0, {len(self.codebook)}), not in [{low}, {high}]; "
                "text and special ids have no pixels"
            )
        return self.vqvae.decode(codes_BG.view(-1, side, side), self.rate).clamp(0, 1)


def to_pixels(images: Sequence[Image.Image] | np.ndarray) -> Tensor:
    """Return float32 pixels [B, 3, H, W] in [0, 1].

    Args:
        images: pictures of one size (converted to RGB), or uint8 [B, H, W, 3].

    Raises:
        DataError: no pictures, several sizes, or an array of another shape or dtype.
    """
    if not isinstance(images, np.ndarray):
        sizes = sorted({image.size for image in images})
        if len(sizes) != 1:
            raise DataError(
                f"a batch needs pictures of one size, not {sizes or 'none at all'}; resize them first"
            )
        images = np.stack([np.asarray(image.convert("RGB")) for image in images])
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise DataError(f"pictures must be uint8 [B, H, W, 3], not {images.dtype} {list(images.shape)}")
    return torch.from_numpy(images.copy()).permute(0, 3, 1, 2).contiguous().float() / 255
