"""The VQVAE: rates and shapes, agreement of its entry points, memory formats, half precision, refusals."""

import pytest
import torch

from cogview2.pipeline.config.model import VQVAEConfig
from cogview2.pipeline.errors import ConfigError, DataError
from cogview2.pipeline.models.vqvae.autoencoder import AttnBlock, Downsample, ResidualDownsample
from cogview2.pipeline.models.vqvae.model import RATES, VQVAE

TINY = VQVAEConfig(
    base_channels=8,
    encoder_multipliers=(1, 1, 2),
    decoder_multipliers=((1, 1, 1, 1, 2), (1, 1, 1, 2), (1, 1, 2)),
    encoder_res_blocks=1,
    latent_channels=8,
    codebook_size=20,
    norm_groups=4,
)


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def vqvae(pixels: torch.Tensor) -> VQVAE:
    torch.manual_seed(0)
    model = VQVAE(TINY)
    with torch.no_grad():
        model.quantizer.initialize(model(pixels, quantize=False).latents)
    return model


def test_attention_equals_its_formula() -> None:
    block = AttnBlock(8, groups=2)
    x = torch.randn(2, 8, 3, 5)
    normed = block.norm(x)
    q, k, v = (conv(normed).flatten(2) for conv in (block.q, block.k, block.v))
    weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) * 8**-0.5, dim=-1)
    expected = x + block.proj_out(torch.einsum("bij,bcj->bci", weights, v).view_as(x))
    torch.testing.assert_close(block(x), expected)


def test_downsampling_pads_right_and_bottom_only() -> None:
    layer = Downsample(1)
    torch.nn.init.zeros_(layer.conv.weight)
    torch.nn.init.zeros_(layer.conv.bias)
    with torch.no_grad():
        layer.conv.weight[0, 0, 0, 0] = 1
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert layer(x).flatten().tolist() == [0, 2, 8, 10]
    residual = ResidualDownsample(1)
    residual.conv_down_sampler = layer
    assert residual(x).flatten().tolist() == [0 + 2.5, 2 + 4.5, 8 + 10.5, 10 + 12.5]


def test_only_the_decoder_of_rate_16_has_attention_outside_the_middle() -> None:
    names = {name.split(".attn.")[0] for name in VQVAE(TINY).state_dict() if ".attn." in name}
    assert names == {"decs.0.up.4"}


@pytest.mark.parametrize("rate", RATES)
def test_encode_and_decode_agree_with_forward(vqvae: VQVAE, pixels: torch.Tensor, rate: int) -> None:
    output = vqvae(pixels)
    codes = vqvae.encode(pixels, rate)
    assert codes.shape == (2, 32 // rate, 48 // rate) and codes.dtype == torch.int64
    start = sum(2 * (32 // before) * (48 // before) for before in RATES if before < rate)
    assert torch.equal(output.codes[start : start + codes.numel()], codes.flatten())
    torch.testing.assert_close(vqvae.decode(codes, rate), output.reconstructions[rate])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (TINY.pixel_mean, TINY.pixel_std))
    torch.testing.assert_close(output.reconstructions[rate], output.normalised[rate] * std + mean)
    assert output.reconstructions[rate].shape == pixels.shape


def test_commitment_is_the_sum_over_the_rates(vqvae: VQVAE, pixels: torch.Tensor) -> None:
    output = vqvae(pixels)
    squared = (vqvae.quantizer.lookup(output.codes) - output.latents).square()
    sizes = [2 * (32 // rate) * (48 // rate) for rate in RATES]
    assert output.latents.shape == (sum(sizes), 8)
    torch.testing.assert_close(output.commitment, sum(part.mean() for part in squared.split(sizes)))


def test_every_parameter_gets_a_gradient(vqvae: VQVAE, pixels: torch.Tensor) -> None:
    for quantize in (True, False):
        vqvae.zero_grad(set_to_none=True)
        output = vqvae(pixels, quantize=quantize)
        loss = output.commitment + sum(
            (image - pixels).abs().mean() for image in output.reconstructions.values()
        )
        loss.backward()
        without = [name for name, parameter in vqvae.named_parameters() if parameter.grad is None]
        assert without == []


def test_plain_autoencoder_ignores_the_codebook(vqvae: VQVAE, pixels: torch.Tensor) -> None:
    first = vqvae(pixels, quantize=False)
    vqvae.quantizer.embed.weight.fill_(float("nan"))
    second = vqvae(pixels, quantize=False)
    assert second.commitment == 0 and len(second.codes) == 0
    for rate in RATES:
        assert torch.equal(first.reconstructions[rate], second.reconstructions[rate])


def test_channels_last_gives_the_same(vqvae: VQVAE, pixels: torch.Tensor) -> None:
    expected = vqvae(pixels)
    vqvae.to(memory_format=torch.channels_last)
    output = vqvae(pixels.contiguous(memory_format=torch.channels_last))
    assert torch.equal(output.codes, expected.codes)
    for rate in RATES:
        torch.testing.assert_close(output.reconstructions[rate], expected.reconstructions[rate])
    output.reconstructions[8].mean().backward()


def test_bfloat16_weights_with_a_float32_codebook(vqvae: VQVAE, pixels: torch.Tensor) -> None:
    codebook = vqvae.quantizer.embed.weight.clone()
    expected = vqvae(pixels).reconstructions[4]
    vqvae.bfloat16()
    output = vqvae(pixels)
    assert torch.equal(vqvae.quantizer.embed.weight, codebook)
    assert output.latents.dtype == torch.bfloat16 and output.commitment.dtype == torch.float32
    assert output.reconstructions[4].dtype == torch.float32
    assert (output.reconstructions[4] - expected).abs().mean() < 0.05
    assert vqvae.decode(vqvae.encode(pixels, 8), 8).dtype == torch.float32


@pytest.mark.parametrize("rate", [0, 2, 5, 32])
def test_unknown_rate(vqvae: VQVAE, pixels: torch.Tensor, rate: int) -> None:
    for call in (lambda: vqvae.encode(pixels, rate), lambda: vqvae.decode(torch.zeros(1, 2, 2).long(), rate)):
        with pytest.raises(ConfigError, match=f"no rate {rate}; use one of 4, 8, 16"):
            call()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.rand(3, 32, 32), r"must be \[B, 3, H, W\]"),
        (torch.rand(1, 4, 32, 32), r"\[1, 4, 32, 32\]; convert the picture to RGB"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "floats in .*uint8; divide by 255"),
        (torch.rand(1, 3, 32, 40), "32x40 pixels must be multiples of 16"),
    ],
)
def test_bad_pixels(vqvae: VQVAE, bad: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        vqvae(bad)
