"""The three named ways to bring pictures to the feature network's size; each gives other figures (spec 9)."""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

ResizeMode = Literal["tf1", "clean", "antialias"]


def _source_coordinates(source: int, target: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each target index the source indices before and after it, and the weight of the latter."""
    position = torch.arange(target, dtype=torch.float32, device=device) * (source / target)
    low = position.long().clamp(max=source - 1)
    return low, (low + 1).clamp(max=source - 1), position - low


def resize_tf1(images_BCHW: Tensor, side: int) -> Tensor:
    """Resize as TensorFlow 1 did: bilinear between the nearest pixels, corners at index 0, no antialiasing.

    Papers' Frechet distances were measured this way.
    """
    images_BCHW = images_BCHW.float()
    top, bottom, row_weight = _source_coordinates(images_BCHW.shape[2], side, images_BCHW.device)
    left, right, column_weight = _source_coordinates(images_BCHW.shape[3], side, images_BCHW.device)
    wide_BCHW = torch.lerp(
        images_BCHW.index_select(3, left),
        images_BCHW.index_select(3, right),
        column_weight.expand(1, 1, 1, -1),
    )
    return torch.lerp(
        wide_BCHW.index_select(2, top), wide_BCHW.index_select(2, bottom), row_weight.view(1, 1, -1, 1)
    )


def resize_clean(images_BCHW: Tensor, side: int) -> Tensor:
    """Resize as clean-fid does: Pillow bicubic with antialiasing on float channels, clipped to [0, 255]."""
    batch, channels, height, width = images_BCHW.shape
    planes = images_BCHW.reshape(-1, height, width).to("cpu", torch.float32).numpy()
    resized = np.empty((len(planes), side, side), dtype=np.float32)
    for target, plane in zip(resized, planes, strict=True):
        target[:] = np.asarray(Image.fromarray(plane).resize((side, side), Image.Resampling.BICUBIC))
    return torch.from_numpy(resized.clip(0, 255)).view(batch, channels, side, side).to(images_BCHW.device)


def resize_antialias(images_BCHW: Tensor, side: int) -> Tensor:
    """Resize as torchmetrics does by default: bilinear with antialiasing."""
    return F.interpolate(
        images_BCHW.float(), (side, side), mode="bilinear", align_corners=False, antialias=True
    )


RESIZERS: dict[ResizeMode, Callable[[Tensor, int], Tensor]] = {
    "tf1": resize_tf1,
    "clean": resize_clean,
    "antialias": resize_antialias,
}
"""Mode -> function of images [B, C, H, W] in [0, 255] and a side, to float32 [B, C, side, side]."""
