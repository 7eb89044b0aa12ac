"""The VQVAE against the reference implementation: published keys and sizes, and a tiny network's outputs."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cogview2.pipeline.config.model import VQVAEConfig
from cogview2.pipeline.models.vqvae.model import RATES, VQVAE
from cogview2.pipeline.tokenizers.image import ImageTokenizer

pytestmark = pytest.mark.golden

PUBLISHED_PARAMETERS = 97_439_497
PART_PARAMETERS = {
    "enc.": 23_503_488,
    "decs.0.": 23_667_715,
    "decs.1.": 22_172_803,
    "decs.2.": 21_729_539,
    "quantize.": 5_185_792,
    "down_samplers.": 1_180_160,
}
AVERAGES = ("quantize.cluster_size", "quantize.embed_avg")
TOLERANCE = 1e-4


def _assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def tensors(fixtures: Path) -> dict[str, torch.Tensor]:
    return load_file(fixtures / "golden" / "hvqvae.safetensors")


@pytest.fixture(scope="module")
def vqvae(fixtures: Path, tensors: dict[str, torch.Tensor]) -> VQVAE:
    sizes = json.loads((fixtures / "golden" / "hvqvae.json").read_text())
    model = VQVAE(
        VQVAEConfig(
            base_channels=sizes["base_channels"],
            encoder_multipliers=sizes["encoder_mult"],
            decoder_multipliers=sizes["decoder_mult"],
            latent_channels=sizes["z_channels"],
            codebook_size=sizes["codebook_size"],
        )
    )
    prefix = "state/"
    published = {
        name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)
    }
    model.load_state_dict(published, strict=True)
    return model.eval()


def test_full_size_keys_and_shapes(fixtures: Path) -> None:
    with torch.device("meta"):
        state = VQVAE(VQVAEConfig()).state_dict()
    expected = {}
    for line in (fixtures / "golden" / "hvqvae_keys.txt").read_text().splitlines():
        name, shape = line.split(" ", 1)
        expected[name] = tuple(int(size) for size in re.findall(r"\d+", shape))
    assert {name: tuple(value.shape) for name, value in state.items()} == expected


def test_full_size_parameter_counts() -> None:
    with torch.device("meta"):
        state = VQVAE(VQVAEConfig()).state_dict()
    sizes = {name: value.numel() for name, value in state.items() if name not in AVERAGES}
    assert sum(sizes.values()) == PUBLISHED_PARAMETERS
    for prefix, count in PART_PARAMETERS.items():
        assert sum(size for name, size in sizes.items() if name.startswith(prefix)) == count, prefix


@pytest.mark.parametrize("rate", RATES)
def test_codes_and_pixels(vqvae: VQVAE, tensors: dict[str, torch.Tensor], rate: int) -> None:
    codes = vqvae.encode(tensors["pixels"], rate)
    assert torch.equal(codes, tensors[f"rate{rate}/ids"])
    with torch.no_grad():
        decoded = vqvae.decode(tensors[f"rate{rate}/ids"], rate)
    _assert_close(decoded, tensors[f"rate{rate}/decoded"])


@pytest.mark.parametrize("rate", RATES)
def test_commitment(vqvae: VQVAE, tensors: dict[str, torch.Tensor], rate: int) -> None:
    with torch.no_grad():
        features = vqvae.enc(vqvae.normalise(tensors["pixels"]))
        for down_sampler in vqvae.down_samplers[: RATES.index(rate)]:
            features = down_sampler(features)
        commitment = vqvae.quantizer(features).commitment
    _assert_close(commitment, tensors[f"rate{rate}/commitment"][0])


def test_training_forward(vqvae: VQVAE, tensors: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        output = vqvae(tensors["pixels"])
    for index, rate in enumerate(RATES):
        _assert_close(output.normalised[rate], tensors[f"training_forward/{index}"])
        _assert_close(output.reconstructions[rate].clamp(0, 1), tensors[f"rate{rate}/decoded"].clamp(0, 1))
    _assert_close(output.commitment, tensors["total_commitment"][0])
    assert torch.equal(output.codes, torch.cat([tensors[f"rate{rate}/ids"].flatten() for rate in RATES]))


def test_tokenizer_flattens_in_raster_order(vqvae: VQVAE, tensors: dict[str, torch.Tensor]) -> None:
    tokenizer = ImageTokenizer(vqvae, 8)
    codes = tokenizer.encode(tensors["pixels"])
    assert torch.equal(codes, tensors["rate8/ids"].flatten(1))
    _assert_close(tokenizer.decode(codes), tensors["rate8/decoded"])
