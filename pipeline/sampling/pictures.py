"""Pictures of any size as base codes, on the way that training took (spec 2.6)."""

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from cogview2.pipeline.data.images import square
from cogview2.pipeline.data.pixels import downsample
from cogview2.pipeline.tokenizers.image import ImageTokenizer, to_rgb

_LARGE = 3
"""Larger pictures are first reduced to so many base sizes, the full size of the published cascade."""


class _Encoder(Protocol):
    """What is needed of a cascade (text_to_image.TextToImage)."""

    image_tokenizer: ImageTokenizer
    base_grid: int


def base_pixels(picture: Image.Image, side: int) -> torch.Tensor:
    """Return the middle square of a picture at the base size, float32 [3, side, side] in [0, 1].

    Args:
        picture: any size; smaller ones are enlarged.
        side: in pixels.
    """
    given = min(picture.size)
    cut = square(to_rgb(picture), given if given <= _LARGE * side else _LARGE * side)
    pixels = torch.from_numpy(np.asarray(cut).copy()).permute(2, 0, 1)[None].float() / 255
    return downsample(pixels, side)[0]


def encode_pictures(cascade: _Encoder, pictures: Iterable[Image.Image]) -> torch.Tensor:
    """Return the base codes of the middle squares of pictures, int64 [B, M] on the CPU.

    Args:
        cascade: gives the image tokenizer and the base grid.
        pictures: at least one; they are encoded together.
    """
    side = cascade.base_grid * cascade.image_tokenizer.rate
    pixels_B3HW = torch.stack([base_pixels(picture, side) for picture in pictures])
    return cascade.image_tokenizer.encode(pixels_B3HW).cpu()
