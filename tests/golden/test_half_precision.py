"""CogLM, both super-resolution models and the VQVAE in float16 and bfloat16 on a CPU, against float32.

Golden weights and inputs. The error is the root mean square of the difference over that of the result. Allowed are 0.4 %
in float16 and 3 % in bfloat16, about four times what is measured.
"""

import copy
import json
from collections.abc import Callable
from math import isqrt
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cogview2.pipeline.config.model import CogLMConfig, DirectSRConfig, IterativeSRConfig, VQVAEConfig
from cogview2.pipeline.models.coglm.model import CogLM
from cogview2.pipeline.models.sr.direct import DirectSR
from cogview2.pipeline.models.sr.iterative import IterativeSR
from cogview2.pipeline.models.vqvae.model import RATES, VQVAE

pytestmark = pytest.mark.golden
TOLERANCE = {torch.float16: 0.004, torch.bfloat16: 0.03}
DTYPES = list(TOLERANCE)
Stored = dict[str, torch.Tensor]


def _load(fixtures: Path, name: str) -> tuple[dict, Stored, Stored]:
    """Return (sizes, state dict, other tensors)."""
    sizes = json.loads((fixtures / f"golden/{name}.json").read_text())
    stored = load_file(fixtures / f"golden/{name}.safetensors")
    state = {key.removeprefix("state/"): value for key, value in stored.items() if key.startswith("state/")}
    return sizes, state, {key: value for key, value in stored.items() if not key.startswith("state/")}


def _base(sizes: dict, relaxed: bool) -> CogLMConfig:
    return CogLMConfig(
        layers=sizes["num_layers"],
        hidden=sizes["hidden_size"],
        heads=sizes["num_attention_heads"],
        max_positions=sizes["max_sequence_length"],
        attention_pb_relax=32.0 if relaxed else 0.0,
        layernorm_pb_relax=relaxed,
    )


def _assert_near(
    model: nn.Module, state: Stored, run: Callable[[nn.Module], torch.Tensor], dtype: torch.dtype
) -> None:
    model.load_state_dict(state, strict=True)
    model.eval()
    with torch.no_grad():
        exact, rounded = run(model), run(copy.deepcopy(model).to(dtype))
    assert exact.dtype == rounded.dtype == torch.float32
    error = (rounded - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 0 < float(error) < TOLERANCE[dtype], float(error)


@pytest.mark.parametrize("relaxed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_coglm(fixtures: Path, dtype: torch.dtype, relaxed: bool) -> None:
    sizes, state, stored = _load(fixtures, "coglm")

    def run(model: nn.Module) -> torch.Tensor:
        assert isinstance(model, CogLM)
        bias = stored["log_attention_weights"]
        return model.logits(
            model(stored["tokens"], stored["position_ids"], stored["mask"] > 0, attention_bias=bias)
        )

    _assert_near(CogLM(_base(sizes, relaxed), sizes["vocab_size"]), state, run, dtype)


@pytest.mark.parametrize("relaxed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_direct_sr(fixtures: Path, dtype: torch.dtype, relaxed: bool) -> None:
    sizes, state, stored = _load(fixtures, "dsr")
    text, level0, length = sizes["layout"]
    size, cross = sizes["kernel_size"], sizes["kernel_size2"]
    config = DirectSRConfig(text_length=text, local_kernel=(2 * size - 1, size), cross_kernel=(cross, cross))
    grid = isqrt(level0 - text)
    model = DirectSR(_base(sizes, relaxed), config, grid, isqrt(length - level0) // grid, sizes["vocab_size"])
    tokens = stored["tokens"]
    mask = (stored["mask"] > 0).expand(tokens.shape[0], 1, -1, -1)

    def run(model: nn.Module) -> torch.Tensor:
        assert isinstance(model, DirectSR)
        return model.logits(model(tokens, stored["position_ids"].expand_as(tokens), mask), rows=20_000)

    _assert_near(model, state, run, dtype)


@pytest.mark.parametrize("relaxed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_iterative_sr(fixtures: Path, dtype: torch.dtype, relaxed: bool) -> None:
    sizes, state, stored = _load(fixtures, "itersr")
    text, length = sizes["layout"]
    size = sizes["kernel_size"]
    config = IterativeSRConfig(text_length=text, local_kernel=(2 * size - 1, size))
    model = IterativeSR(_base(sizes, relaxed), config, isqrt(length - text), sizes["vocab_size"])
    tokens = stored["tokens"]
    real = (stored["mask"] > 0).reshape(1, text).expand(tokens.shape[0], -1)

    def run(model: nn.Module) -> torch.Tensor:
        assert isinstance(model, IterativeSR)
        return model.logits(model(tokens, stored["position_ids"].expand_as(tokens), real), rows=20_000)

    _assert_near(model, state, run, dtype)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_vqvae(fixtures: Path, dtype: torch.dtype, rate: int) -> None:
    sizes, state, stored = _load(fixtures, "hvqvae")
    config = VQVAEConfig(
        base_channels=sizes["base_channels"],
        encoder_multipliers=sizes["encoder_mult"],
        decoder_multipliers=sizes["decoder_mult"],
        latent_channels=sizes["z_channels"],
        codebook_size=sizes["codebook_size"],
    )
    model = VQVAE(config)
    model.load_state_dict(state)
    codes = model.encode(stored["pixels"], rate)

    def decode(model: nn.Module) -> torch.Tensor:
        assert isinstance(model, VQVAE)
        return model.decode(codes, rate)

    _assert_near(model, state, decode, dtype)
    # Codes are discrete: where two are nearly as near, rounding may choose the other.
    agreement = (copy.deepcopy(model).to(dtype).encode(stored["pixels"], rate) == codes).float().mean()
    assert float(agreement) >= (0.95 if dtype == torch.float16 else 0.6)
