"""How close reconstructed pictures are to the originals: L1, PSNR and SSIM of each picture of a batch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cogview2.pipeline.errors import DataError

_WINDOW = 11
_SIGMA = 1.5
_C1, _C2 = 0.01**2, 0.03**2
MAX_PSNR = 100.0
"""Decibels reported for pictures that are equal up to rounding, where the ratio is not finite."""


def _pair(image_BCHW: Tensor, original_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    if image_BCHW.shape != original_BCHW.shape or image_BCHW.ndim != 4:
        raise DataError(
            f"pictures of shapes {tuple(image_BCHW.shape)} and {tuple(original_BCHW.shape)} cannot be "
            "compared; both must be [B, C, H, W]"
        )
    return image_BCHW.float(), original_BCHW.float()


def l1(image_BCHW: Tensor, original_BCHW: Tensor) -> Tensor:
    """Return the mean absolute difference [B]; values in [0, 1]."""
    image_BCHW, original_BCHW = _pair(image_BCHW, original_BCHW)
    return (image_BCHW - original_BCHW).abs().mean((1, 2, 3))


def psnr(image_BCHW: Tensor, original_BCHW: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio [B] in decibels, at most `MAX_PSNR`; values in [0, 1]."""
    image_BCHW, original_BCHW = _pair(image_BCHW, original_BCHW)
    error_B = (image_BCHW - original_BCHW).square().mean((1, 2, 3))
    return -10 * torch.log10(error_B.clamp(min=10 ** (-MAX_PSNR / 10)))


def ssim(image_BCHW: Tensor, original_BCHW: Tensor) -> Tensor:
    """Return the structural similarity [B]; values in [0, 1].

    Gaussian window of 11x11 with sigma 1.5 (smaller for smaller pictures), only where it lies inside.
    """
    image_BCHW, original_BCHW = _pair(image_BCHW, original_BCHW)
    channels, height, width = image_BCHW.shape[1:]
    size = min(_WINDOW, height - (1 - height % 2), width - (1 - width % 2))
    offsets = torch.arange(size, device=image_BCHW.device) - size // 2
    weights = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights = weights / weights.sum()
    window_C1HW = torch.outer(weights, weights).expand(channels, 1, size, size)

    def local_mean(values_BCHW: Tensor) -> Tensor:
        return F.conv2d(values_BCHW, window_C1HW, groups=channels)

    mean_x, mean_y = local_mean(image_BCHW), local_mean(original_BCHW)
    var_x = (local_mean(image_BCHW**2) - mean_x**2).clamp(min=0)
    var_y = (local_mean(original_BCHW**2) - mean_y**2).clamp(min=0)
    covariance = local_mean(image_BCHW * original_BCHW) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    structure = (2 * covariance + _C2) / (var_x + var_y + _C2)
    return (luminance * structure).mean((1, 2, 3))
