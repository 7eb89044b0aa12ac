"""The frozen VQVAE as image tokenizer: pixels to flat codes and back, for any batch size (spec 1.3).

Dims: B batch, C channels, H height, W width, G codes of a square grid in raster order.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
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
            float32 pixels [B, 3, g*rate, g*rate], not clamped (spec 1.3).

        Raises:
            DataError: not a square grid, or a code outside the codebook.
        """
        side = math.isqrt(codes_BG.shape[-1]) if codes_BG.ndim else 0
        if codes_BG.ndim != 2 or side**2 != codes_BG.shape[1] or not codes_BG.numel():
            raise DataError(f"codes must be [B, g*g] for a square grid, not {list(codes_BG.shape)}")
        return self.decode_grid(codes_BG.view(-1, side, side))

    @torch.no_grad()
    def decode_grid(self, codes_BHW: Tensor) -> Tensor:
        """Return the pictures of codes on a grid.

        Args:
            codes_BHW: integers, at least one, on any device.

        Returns:
            float32 pixels [B, 3, H*rate, W*rate], not clamped: whoever writes a file clamps (spec 1.3).

        Raises:
            DataError: another shape or dtype, or a code outside the codebook.
        """
        if codes_BHW.ndim != 3 or not codes_BHW.numel():
            raise DataError(f"codes on a grid must be [B, H, W], not {list(codes_BHW.shape)}")
        if codes_BHW.is_floating_point() or codes_BHW.dtype == torch.bool:
            raise DataError(f"codes must be integers, not {codes_BHW.dtype}")
        codes_BHW = codes_BHW.to(self.device, torch.int64)
        low, high = (bound.item() for bound in codes_BHW.aminmax())
        if low < 0 or high >= len(self.codebook):
            raise DataError(
                f"codes must lie in [0, {len(self.codebook)}), not in [{low}, {high}]; "
                "text and special ids have no pixels"
            )
        return self.vqvae.decode(codes_BHW, self.rate)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a picture in RGB, transparency put on white.

    Raises:
        DataError: a mode with more than 8 bits, which has no agreed black and white.
    """
    if image.mode[0] in "IF":
        raise DataError(f"pixel mode {image.mode} has more than 8 bits; scale the picture to 8 bits first")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layers = image.convert("RGBA")
    white = Image.new("RGB", layers.size, (255, 255, 255))
    white.paste(layers, mask=layers.getchannel("A"))
    return white


def fit_square(pixels_BCHW: Tensor, size: int) -> Tensor:
    """Resize the shorter side to `size` pixels, antialiased, and cut out the centre (spec 1.3).

    Args:
        pixels_BCHW: uint8, or float in [0, 1].
        size: in pixels.

    Returns:
        [B, C, size, size] of the same dtype; uint8 is rounded.
    """
    height, width = pixels_BCHW.shape[2:]
    short = min(height, width)
    sides = (max(size, size * height // short), max(size, size * width // short))
    resized = F.interpolate(pixels_BCHW.float(), size=sides, mode="bilinear", antialias=True)
    top, left = (round((side - size) / 2) for side in sides)
    cut = resized[:, :, top : top + size, left : left + size]
    if pixels_BCHW.dtype == torch.uint8:
        return cut.round().clamp(0, 255).to(torch.uint8)
    return cut.clamp(0, 1).to(pixels_BCHW.dtype)


def to_pixels(images: Sequence[Image.Image] | np.ndarray) -> Tensor:
    """Return float32 pixels [B, 3, H, W] in [0, 1].

    Args:
        images: pictures of one size, see `to_rgb`, or uint8 [B, H, W, 3].

    Raises:
        DataError: no pictures, several sizes, or an array of another shape or dtype.
    """
    if not isinstance(images, np.ndarray):
        sizes = sorted({image.size for image in images})
        if len(sizes) != 1:
            raise DataError(
                f"a batch needs pictures of one size, not {sizes or 'none at all'}; resize them first"
            )
        images = np.stack([np.asarray(to_rgb(image)) for image in images])
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise DataError(f"pictures must be uint8 [B, H, W, 3], not {images.dtype} {list(images.shape)}")
    return torch.from_numpy(images.copy()).permute(0, 3, 1, 2).contiguous().float() / 255
