"""The image tokenizer: flat codes for every batch size, clamped pixels, conversion of pictures, refusals."""

import numpy as np
import pytest
import torch
from PIL import Image

from cogview2.pipeline.config.model import VQVAEConfig
from cogview2.pipeline.errors import ConfigError, DataError
from cogview2.pipeline.models.vqvae.model import RATES, VQVAE
from cogview2.pipeline.tokenizers.image import ImageTokenizer, to_pixels

CODES = 20


@pytest.fixture(scope="module")
def vqvae() -> VQVAE:
    torch.manual_seed(0)
    model = VQVAE(
        VQVAEConfig(
            base_channels=8,
            encoder_multipliers=(1, 1, 2),
            decoder_multipliers=((1, 1, 1, 1, 2), (1, 1, 1, 2), (1, 1, 2)),
            encoder_res_blocks=1,
            latent_channels=8,
            codebook_size=CODES,
            norm_groups=4,
        )
    )
    with torch.no_grad():
        model.quantizer.initialize(model(torch.rand(4, 3, 32, 32), quantize=False).latents)
    return model


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_batches_equal_single_pictures(vqvae: VQVAE, rate: int, batch: int) -> None:
    tokenizer = ImageTokenizer(vqvae, rate)
    pixels = torch.rand(batch, 3, 32, 32)
    codes = tokenizer.encode(pixels)
    assert codes.shape == (batch, (32 // rate) ** 2) and codes.dtype == torch.int64
    assert torch.equal(codes, torch.cat([tokenizer.encode(one[None]) for one in pixels]))
    assert torch.equal(codes, vqvae.encode(pixels, rate).flatten(1))
    decoded = tokenizer.decode(codes.to(torch.int32))
    assert decoded.shape == pixels.shape and not decoded.requires_grad
    torch.testing.assert_close(decoded, torch.cat([tokenizer.decode(one[None]) for one in codes]))


def test_decoded_pixels_are_not_clamped(vqvae: VQVAE) -> None:
    tokenizer = ImageTokenizer(vqvae, 8)
    codes = torch.arange(16)[None] % CODES
    raw = vqvae.decode(codes.view(1, 4, 4), 8).detach()
    scaled = VQVAE(vqvae.config.model_copy(update={"pixel_std": (50.0, 50.0, 50.0)}))
    scaled.load_state_dict(vqvae.state_dict())
    wild = ImageTokenizer(scaled, 8).decode(codes)
    assert wild.min() < 0 and wild.max() > 1
    assert torch.equal(tokenizer.decode(codes), raw)


def test_codebook(vqvae: VQVAE) -> None:
    tokenizer = ImageTokenizer(vqvae, 8)
    assert tokenizer.codebook.shape == (CODES, 8) and not vqvae.training


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.rand(1, 3, 32, 48), "square pictures, not 32x48"),
        (torch.rand(1, 3, 20, 20), "20x20 pixels must be multiples of 8"),
        (torch.rand(1, 3, 32, 32) * 255, "use to_pixels"),
        (torch.full((1, 3, 32, 32), float("nan")), r"must lie in \[0, 1\], not in \[nan"),
        (torch.rand(0, 3, 32, 32), "batch of 0 pictures"),
    ],
)
def test_bad_pixels(vqvae: VQVAE, pixels: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ImageTokenizer(vqvae, 8).encode(pixels)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(1, 15, dtype=torch.int64), r"square grid, not \[1, 15\]"),
        (torch.zeros(16, dtype=torch.int64), r"square grid, not \[16\]"),
        (torch.full((1, 16), CODES), r"lie in \[0, 20\), not in \[20, 20\]"),
        (torch.full((1, 16), -1), r"not in \[-1, -1\]"),
    ],
)
def test_bad_codes(vqvae: VQVAE, codes: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ImageTokenizer(vqvae, 8).decode(codes)


def test_unknown_rate(vqvae: VQVAE) -> None:
    with pytest.raises(ConfigError, match="no rate 7"):
        ImageTokenizer(vqvae, 7)


def test_to_pixels_of_pictures_and_arrays() -> None:
    array = np.random.default_rng(0).integers(0, 256, (2, 6, 4, 3), dtype=np.uint8)
    expected = torch.from_numpy(array.transpose(0, 3, 1, 2) / np.float32(255))
    for given in (array, [Image.fromarray(one) for one in array]):
        pixels = to_pixels(given)
        assert pixels.dtype == torch.float32 and pixels.is_contiguous()
        torch.testing.assert_close(pixels, expected)
    grey = to_pixels([Image.new("L", (4, 6), 255)])
    assert grey.shape == (1, 3, 6, 4) and grey.min() == 1


def test_to_pixels_refuses() -> None:
    with pytest.raises(DataError, match="none at all"):
        to_pixels([])
    with pytest.raises(DataError, match=r"not \[\(4, 4\), \(4, 5\)\]"):
        to_pixels([Image.new("RGB", (4, 4)), Image.new("RGB", (4, 5))])
    with pytest.raises(DataError, match=r"uint8 \[B, H, W, 3\], not float32"):
        to_pixels(np.zeros((1, 4, 4, 3), dtype=np.float32))
    with pytest.raises(DataError, match=r"not uint8 \[4, 4, 3\]"):
        to_pixels(np.zeros((4, 4, 3), dtype=np.uint8))
