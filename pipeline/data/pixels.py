"""Pictures as arrays at the two sizes of the cascade."""

import numpy as np
import torch

from cogview2.pipeline.config.data import DataConfig
from cogview2.pipeline.data.images import open_image, square, to_array
from cogview2.pipeline.data.sources import Source


def downsample(pixels_BCHW: torch.Tensor, side: int) -> torch.Tensor:
    """Reduce square pictures with antialiasing; float in, float out, clamped to [0, 1]."""
    small = torch.nn.functional.interpolate(pixels_BCHW, size=(side, side), mode="bilinear", antialias=True)
    return small.clamp(0, 1)


def load_pixels(source: Source, index: int, data: DataConfig) -> np.ndarray:
    """Return record `index` as uint8 [3, S, S] at full size.

    Raises:
        RefusedError: the picture cannot be used.
    """
    pair = source.read(index)
    image = open_image(pair.image, data.images, data.images.min_side or data.base_size)
    return to_array(square(image, data.superres_size))
