import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from cogview2.pipeline.errors import DataError
from cogview2.pipeline.metrics.blur import gaussian_blur


def pictures() -> torch.Tensor:
    return torch.randint(
        0, 256, (2, 3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def test_radius_zero_is_the_identity() -> None:
    assert torch.equal(gaussian_blur(pictures(), 0), pictures())


@pytest.mark.parametrize("radius", [1, 2, 8])
def test_it_is_pillows_blur_and_smooths(radius: int) -> None:
    blurred = gaussian_blur(pictures(), radius)
    assert blurred.dtype == torch.uint8 and blurred.shape == (2, 3, 20, 30)
    picture = Image.fromarray(pictures()[1].permute(1, 2, 0).numpy())
    expected = np.asarray(picture.filter(ImageFilter.GaussianBlur(radius)))
    np.testing.assert_array_equal(blurred[1].permute(1, 2, 0).numpy(), expected)
    assert blurred.float().std() < 0.6 * pictures().float().std()
    assert blurred.float().mean() == pytest.approx(float(pictures().float().mean()), abs=3)


def test_a_constant_picture_stays() -> None:
    constant = torch.full((1, 3, 9, 9), 77, dtype=torch.uint8)
    assert torch.equal(gaussian_blur(constant, 4), constant)
    assert gaussian_blur(constant[:0], 4).shape == (0, 3, 9, 9)


def test_wrong_input_is_refused() -> None:
    with pytest.raises(DataError, match="uint8"):
        gaussian_blur(pictures().float(), 1)
    with pytest.raises(DataError, match="negative"):
        gaussian_blur(pictures(), -1)
