"""The quantizer: nearest codes, moving averages, restart, initialisation, a codebook that stays float32."""

import numpy as np
import pytest
import torch

from cogview2.pipeline.errors import ConfigError
from cogview2.pipeline.models.vqvae import quantizer as module
from cogview2.pipeline.models.vqvae.quantizer import VectorQuantizer

CODES, DIM = 12, 5


@pytest.fixture
def quantizer() -> VectorQuantizer:
    torch.manual_seed(0)
    built = VectorQuantizer(DIM, CODES)
    built.embed.weight.normal_()
    built.cluster_size.uniform_(0.5, 4.0)
    built.embed_avg.copy_(built.embed.weight * built.cluster_size[:, None])
    return built


def _slow_nearest(latents: np.ndarray, table: np.ndarray) -> list[int]:
    return [int(np.argmin([((row - code) ** 2).sum() for code in table])) for row in latents]


@pytest.mark.parametrize("chunk", [1, CODES * 7, 2**26])
def test_nearest_equals_loop(quantizer: VectorQuantizer, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DISTANCES_PER_CHUNK", chunk)
    latents = torch.randn(40, DIM)
    assert quantizer.nearest(latents).tolist() == _slow_nearest(
        latents.numpy(), quantizer.embed.weight.numpy()
    )


def test_codes_are_computed_in_float32(quantizer: VectorQuantizer) -> None:
    # Codes closer together than bfloat16 can tell apart: half-precision distances would mix them up.
    quantizer.embed.weight.copy_(1 + torch.arange(CODES)[:, None] * torch.full((1, DIM), 2.0**-7))
    latents = quantizer.embed.weight.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes = quantizer.nearest(latents)
    assert codes.tolist() == list(range(CODES))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_straight_through(quantizer: VectorQuantizer, dtype: torch.dtype) -> None:
    quantizer.to(dtype)
    features = torch.randn(2, DIM, 3, 4, dtype=dtype, requires_grad=True)
    output = quantizer(features)
    codes = output.codes.view(2, 3, 4)
    assert torch.equal(output.vectors, quantizer.lookup(codes).permute(0, 3, 1, 2).to(dtype))
    assert output.latents.shape == (24, DIM) and not output.latents.requires_grad
    expected = (quantizer.lookup(output.codes) - output.latents.float()).square().mean()
    torch.testing.assert_close(output.commitment, expected)
    upstream = torch.randn_like(output.vectors)
    (through,) = torch.autograd.grad((output.vectors * upstream).sum(), features, retain_graph=True)
    (direct,) = torch.autograd.grad((quantizer.proj(features) * upstream).sum(), features)
    torch.testing.assert_close(through, direct)
    (towards_code,) = torch.autograd.grad(output.commitment, features)
    assert towards_code.abs().sum() > 0


def test_without_quantization(quantizer: VectorQuantizer) -> None:
    features = torch.randn(1, DIM, 2, 3)
    output = quantizer(features, quantize=False)
    torch.testing.assert_close(output.vectors, quantizer.proj(features))
    assert output.commitment.item() == 0 and output.codes.shape == (0,) and output.latents.shape == (6, DIM)


def test_statistics_equal_loop_and_add_up(quantizer: VectorQuantizer) -> None:
    latents = torch.randn(30, DIM)
    codes = quantizer.nearest(latents)
    counts, sums = quantizer.statistics(latents, codes)
    for code in range(CODES):
        mine = latents[codes == code]
        assert counts[code] == len(mine)
        torch.testing.assert_close(sums[code], mine.sum(dim=0))
    halves = [quantizer.statistics(latents[part], codes[part]) for part in (slice(0, 11), slice(11, None))]
    torch.testing.assert_close(halves[0][0] + halves[1][0], counts)
    torch.testing.assert_close(halves[0][1] + halves[1][1], sums)


def test_ema_equals_numpy_loop(quantizer: VectorQuantizer) -> None:
    decay, eps = 0.9, 1e-5
    size = quantizer.cluster_size.double().numpy().copy()
    average = quantizer.embed_avg.double().numpy().copy()
    for _ in range(3):
        latents = torch.randn(20, DIM)
        codes = quantizer.nearest(latents)
        quantizer.ema_update(*quantizer.statistics(latents, codes), decay)
        for code in range(CODES):
            chosen = latents.double().numpy()[codes.numpy() == code]
            size[code] = decay * size[code] + (1 - decay) * len(chosen)
            average[code] = decay * average[code] + (1 - decay) * chosen.sum(axis=0)
        total = size.sum()
        expected = np.stack(
            [average[code] / ((size[code] + eps) / (total + CODES * eps) * total) for code in range(CODES)]
        )
        np.testing.assert_allclose(quantizer.cluster_size.numpy(), size, rtol=1e-5)
        np.testing.assert_allclose(quantizer.embed_avg.numpy(), average, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(quantizer.embed.weight.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_ema_leaves_codes_that_were_never_used() -> None:
    fresh = VectorQuantizer(DIM, CODES)
    before = fresh.embed.weight.clone()
    fresh.ema_update(torch.zeros(CODES), torch.zeros(CODES, DIM), 0.99)
    assert torch.equal(fresh.embed.weight, before)
    counts, sums = torch.zeros(CODES), torch.zeros(CODES, DIM)
    counts[3], sums[3] = 100, 200
    fresh.ema_update(counts, sums, 0.99)
    others = torch.arange(CODES) != 3
    assert torch.equal(fresh.embed.weight[others], before[others])
    torch.testing.assert_close(fresh.embed.weight[3], torch.full((DIM,), 2.0), rtol=0.05, atol=0)


def test_restart_moves_only_dead_codes(quantizer: VectorQuantizer) -> None:
    before = quantizer.embed.weight.clone()
    dead = torch.zeros(CODES, dtype=torch.bool)
    dead[[2, 7]] = True
    replacements = torch.randn(CODES, DIM)
    quantizer.restart(dead, replacements)
    assert torch.equal(quantizer.embed.weight[dead], replacements[dead])
    assert torch.equal(quantizer.embed.weight[~dead], before[~dead])
    # The averages agree with the new place: an update without data leaves the code there.
    quantizer.ema_update(torch.zeros(CODES), torch.zeros(CODES, DIM), 0.99)
    torch.testing.assert_close(quantizer.embed.weight[dead], replacements[dead], rtol=1e-3, atol=1e-3)
    with pytest.raises(ConfigError, match=r"one row for each code, \[12, 5\], not \[2, 5\]"):
        quantizer.restart(dead, replacements[dead])


def test_initialize_finds_clusters(quantizer: VectorQuantizer) -> None:
    centres = torch.eye(DIM) * 10
    latents = centres.repeat(20, 1) + torch.randn(20 * DIM, DIM) * 0.01
    quantizer.initialize(latents, torch.Generator().manual_seed(3))
    torch.testing.assert_close(quantizer.lookup(quantizer.nearest(centres)), centres, rtol=0, atol=0.05)
    torch.testing.assert_close(quantizer.embed_avg / quantizer.cluster_size[:, None], quantizer.embed.weight)
    # Equal small weights: a code that stands for many latents must follow the encoder as fast as the others.
    assert torch.equal(quantizer.cluster_size, torch.ones(CODES))


def test_lloyd_iterations_lower_the_error(quantizer: VectorQuantizer) -> None:
    latents = torch.randn(300, DIM)
    errors = []
    for iterations in (0, 1, 5):
        quantizer.initialize(latents, torch.Generator().manual_seed(3), iterations)
        errors.append((quantizer.lookup(quantizer.nearest(latents)) - latents).square().mean().item())
    assert errors[0] > errors[1] > errors[2]


def test_initialize_is_deterministic_and_draws_from_its_generator_only(quantizer: VectorQuantizer) -> None:
    latents = torch.randn(100, DIM)
    tables = []
    for seed in (1, 1, 2):
        torch.rand(7)
        quantizer.initialize(latents, torch.Generator().manual_seed(seed), iterations=1)
        tables.append(quantizer.embed.weight.clone())
    assert torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])


@pytest.mark.parametrize("count", [1, 4, CODES])
def test_initialize_with_few_latents(quantizer: VectorQuantizer, count: int) -> None:
    latents = torch.randn(count, DIM)
    quantizer.initialize(latents)
    assert torch.isfinite(quantizer.embed.weight).all() and (quantizer.cluster_size >= 1).all()
    torch.testing.assert_close(quantizer.lookup(quantizer.nearest(latents)), latents, rtol=0, atol=1e-4)


def test_initialize_with_many_equal_latents_spends_few_codes_on_them(quantizer: VectorQuantizer) -> None:
    background = torch.zeros(500, DIM)
    things = torch.randn(CODES - 1, DIM) * 5
    quantizer.initialize(torch.cat([background, things]))
    share, _ = quantizer.usage(quantizer.cluster_size)
    used = quantizer.nearest(torch.cat([background[:1], things])).unique().numel()
    assert used >= CODES - 2 and share == 1.0


@pytest.mark.parametrize("shape", [(0, DIM), (4, DIM + 1), (4,)])
def test_initialize_refuses(quantizer: VectorQuantizer, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"latents must be \[M, 5\]"):
        quantizer.initialize(torch.zeros(shape))


@pytest.mark.parametrize(
    ("counts", "share", "perplexity"),
    [([0, 0, 0, 0], 0, 0), ([5, 0, 0, 0], 0.25, 1), ([3, 3, 0, 0], 0.5, 2), ([7, 7, 7, 7], 1, 4)],
)
def test_usage(counts: list[int], share: float, perplexity: float) -> None:
    assert VectorQuantizer.usage(torch.tensor(counts)) == pytest.approx((share, perplexity))


CASTS = {
    "bfloat16": lambda m: m.bfloat16(),
    "half": lambda m: m.half(),
    "to": lambda m: m.to(torch.bfloat16),
    "type": lambda m: m.type(torch.bfloat16),
    "to_device_and_dtype": lambda m: m.to("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS)
def test_casts_leave_the_codebook_in_float32(quantizer: VectorQuantizer, cast: str) -> None:
    before = {name: buffer.clone() for name, buffer in quantizer.named_buffers()}
    CASTS[cast](torch.nn.Sequential(quantizer))
    assert quantizer.proj.weight.dtype == (torch.float16 if cast == "half" else torch.bfloat16)
    assert set(before) == {"embed.weight", "cluster_size", "embed_avg"}
    for name, buffer in quantizer.named_buffers():
        assert buffer.dtype == torch.float32 and torch.equal(buffer, before[name]), name


def test_moves_of_device_are_honoured(quantizer: VectorQuantizer) -> None:
    quantizer.to("meta", torch.bfloat16)
    assert {tensor.device.type for tensor in quantizer.state_dict().values()} == {"meta"}
    assert quantizer.embed.weight.dtype == torch.float32
    quantizer.to_empty(device="cpu")
    assert {tensor.device.type for tensor in quantizer.state_dict().values()} == {"cpu"}


def test_the_codebook_is_no_parameter(quantizer: VectorQuantizer) -> None:
    assert [name for name, _ in quantizer.named_parameters()] == ["proj.weight", "proj.bias"]
