"""Pictures of any size as base codes."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from cogview2.pipeline.data.images import square, to_array
from cogview2.pipeline.data.pixels import downsample
from cogview2.pipeline.sampling.pictures import base_pixels, encode_pictures


def _noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(32, 32), (48, 48), (90, 60), (40, 70)])
def test_same_way_as_training(size: tuple[int, int]) -> None:
    """Training reduces to the full size first; a picture of that size takes one step."""
    picture = _noise(*size)
    side = min(size)
    full = torch.from_numpy(to_array(square(picture, side)))[None].float() / 255
    assert torch.equal(base_pixels(picture, 32), downsample(full, 32)[0])


def test_large_and_small_pictures() -> None:
    picture = _noise(400, 300)
    full = torch.from_numpy(to_array(square(picture, 96)))[None].float() / 255
    assert torch.equal(base_pixels(picture, 32), downsample(full, 32)[0])
    assert base_pixels(_noise(5, 9), 32).shape == (3, 32, 32)
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert base_pixels(clear, 32).min() == 1


def test_encode_pictures() -> None:
    class _Tokenizer:
        rate = 8

        def encode(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
            assert pixels_BCHW.shape == (2, 3, 32, 32)
            return pixels_BCHW.mean((1, 2, 3), keepdim=True)[:, 0, 0].expand(-1, 16)

    cascade = SimpleNamespace(image_tokenizer=_Tokenizer(), base_grid=4)
    pictures = [Image.new("RGB", (50, 40), "white"), Image.new("L", (32, 32), 0)]
    codes = encode_pictures(cast(Any, cascade), pictures)
    assert codes.shape == (2, 16) and codes[:, 0].tolist() == [1, 0]
