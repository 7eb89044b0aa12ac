"""The Gaussian blur of the blurred Frechet distances FID-k (spec 9)."""

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from cogview2.pipeline.errors import DataError


def gaussian_blur(images_BCHW: Tensor, radius: int) -> Tensor:
    """Blur pictures with Pillow's GaussianBlur(radius), the protocol of FID-k; radius 0 changes nothing.

    Args:
        images_BCHW: uint8 [B, 3, H, W].
        radius: in pixels, 0 or more; published figures use pictures of 256x256.

    Returns:
        uint8 [B, 3, H, W] on the same device.

    Raises:
        DataError: another dtype or shape, or a negative radius.
    """
    if images_BCHW.dtype != torch.uint8 or images_BCHW.ndim != 4 or images_BCHW.shape[1] != 3:
        raise DataError(
            f"pictures to blur are {images_BCHW.dtype} {tuple(images_BCHW.shape)}; "
            "they must be uint8 [B, 3, H, W]"
        )
    if radius < 0:
        raise DataError(f"blur radius {radius} is negative; use 0 for none")
    if radius == 0:
        return images_BCHW
    blurred = [
        torch.from_numpy(np.array(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius))))
        for picture in images_BCHW.permute(0, 2, 3, 1).cpu().numpy()
    ]
    if not blurred:
        return images_BCHW
    return torch.stack(blurred).permute(0, 3, 1, 2).contiguous().to(images_BCHW.device)
