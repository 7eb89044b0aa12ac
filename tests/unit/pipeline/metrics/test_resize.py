import numpy as np
import pytest
import torch
from PIL import Image

from cogview2.pipeline.metrics.resize import RESIZERS, ResizeMode, resize_clean, resize_tf1


def pictures(height: int, width: int, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)


def slow_tf1(image_HW: np.ndarray, side: int) -> np.ndarray:
    """TensorFlow 1's rule, pixel by pixel: source = index * in / out, bilinear, last pixel repeated."""
    height, width = image_HW.shape
    result = np.empty((side, side))
    for row in range(side):
        for column in range(side):
            y, x = row * height / side, column * width / side
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            v, u = y - top, x - left
            above = image_HW[top, left] * (1 - u) + image_HW[top, right] * u
            below = image_HW[bottom, left] * (1 - u) + image_HW[bottom, right] * u
            result[row, column] = above * (1 - v) + below * v
    return result


@pytest.mark.parametrize(
    ("height", "width", "side"), [(16, 16, 29), (40, 25, 29), (7, 60, 30), (30, 30, 30), (1, 1, 5)]
)
def test_tf1_against_the_explicit_loop(height: int, width: int, side: int) -> None:
    images_BCHW = pictures(height, width)
    resized = resize_tf1(images_BCHW, side)
    for index in (0, 1):
        expected = slow_tf1(images_BCHW[index, 2].double().numpy(), side)
        np.testing.assert_allclose(resized[index, 2].numpy(), expected, atol=2e-2 if height > 30 else 5e-3)


def test_clean_is_pillows_bicubic_on_floats_clipped() -> None:
    images_BCHW = pictures(50, 40)
    images_BCHW[:, :, ::5] = 255
    resized = resize_clean(images_BCHW, 30)
    plane = Image.fromarray(images_BCHW[1, 0].numpy().astype(np.float32))
    raw = np.asarray(plane.resize((30, 30), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(resized[1, 0].numpy(), raw.clip(0, 255))
    assert raw.max() > 255 >= resized.max() and resized.min() >= 0


@pytest.mark.parametrize("mode", list(RESIZERS))
def test_all_modes_keep_constants_shape_and_independence(mode: ResizeMode) -> None:
    constant = RESIZERS[mode](torch.full((1, 3, 33, 48), 90, dtype=torch.uint8), 20)
    assert constant.shape == (1, 3, 20, 20) and constant.dtype == torch.float32
    torch.testing.assert_close(constant, torch.full_like(constant, 90.0))
    images_BCHW = pictures(33, 48)
    torch.testing.assert_close(RESIZERS[mode](images_BCHW, 20)[1:], RESIZERS[mode](images_BCHW[1:], 20))


def test_the_modes_differ() -> None:
    """A one-pixel checkerboard: TensorFlow 1 aliases, the other two average it away."""
    board = ((torch.arange(64)[:, None] + torch.arange(64)) % 2 * 255).to(torch.uint8).expand(1, 3, 64, 64)
    spread = {mode: float(resize(board, 16).std()) for mode, resize in RESIZERS.items()}
    assert spread["tf1"] == 0 and float(RESIZERS["tf1"](board, 16).mean()) == 0
    assert float(RESIZERS["clean"](board, 16).mean()) == pytest.approx(127.5, abs=1)
    assert float(RESIZERS["antialias"](board, 16).mean()) == pytest.approx(127.5, abs=1)
    images_BCHW = pictures(64, 64)
    assert (RESIZERS["clean"](images_BCHW, 20) - RESIZERS["antialias"](images_BCHW, 20)).abs().max() > 1
