import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from cogview2.pipeline.errors import DataError
from cogview2.pipeline.metrics.reconstruction import MAX_PSNR, l1, psnr, ssim


def pictures(size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    original_BCHW = torch.rand(3, 3, size, size + 5, generator=generator)
    noise = torch.randn(original_BCHW.shape, generator=generator) * torch.tensor([0.0, 0.05, 0.3]).view(
        3, 1, 1, 1
    )
    return (original_BCHW + noise).clamp(0, 1), original_BCHW


@pytest.mark.parametrize("size", [11, 24, 40])
def test_ssim_against_torchmetrics(size: int) -> None:
    image_BCHW, original_BCHW = pictures(size)
    _, map_BCHW = structural_similarity_index_measure(
        image_BCHW, original_BCHW, data_range=1.0, reduction="none", return_full_image=True
    )
    # torchmetrics reflects the picture at its edges; we only count windows inside it.
    expected = map_BCHW[..., 5:-5, 5:-5].mean((1, 2, 3))
    torch.testing.assert_close(ssim(image_BCHW, original_BCHW), expected, rtol=1e-4, atol=1e-5)


def test_known_values() -> None:
    zeros = torch.zeros(2, 3, 16, 16)
    torch.testing.assert_close(l1(zeros, zeros + 0.1), torch.full((2,), 0.1))
    torch.testing.assert_close(psnr(zeros, zeros + 0.1), torch.full((2,), 20.0))
    assert psnr(zeros, zeros).tolist() == [MAX_PSNR] * 2
    torch.testing.assert_close(ssim(zeros, zeros), torch.ones(2))
    flat = ssim(zeros, zeros + 1)
    torch.testing.assert_close(flat, torch.full((2,), 1e-4 / (1 + 1e-4)))


def test_each_picture_is_judged_alone() -> None:
    image_BCHW, original_BCHW = pictures()
    for metric in (l1, psnr, ssim):
        together = metric(image_BCHW, original_BCHW)
        alone = torch.cat([metric(image_BCHW[i : i + 1], original_BCHW[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(together, alone)
    assert ssim(image_BCHW, original_BCHW).diff().max() < 0


@pytest.mark.parametrize("size", [1, 2, 7, 10])
def test_small_pictures(size: int) -> None:
    image_BCHW = torch.rand(2, 3, size, size)
    torch.testing.assert_close(ssim(image_BCHW, image_BCHW), torch.ones(2))


def test_shapes_must_be_equal() -> None:
    with pytest.raises(DataError, match="cannot be compared"):
        l1(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9))
