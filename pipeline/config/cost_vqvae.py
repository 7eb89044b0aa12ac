"""Parameters, operations and kept activations of the VQVAE, by formula: a walk over its layers (spec 1.3).

It mirrors pipeline/models/vqvae/autoencoder.py, and a test compares both. Everything is for one square picture.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

from cogview2.pipeline.config.model import VQVAEConfig

RATES = (4, 8, 16)
"""Pixels per code, each way."""
_VGG_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""VGG16's convolutions, by block; pooling lies between the blocks."""


@dataclass(frozen=True)
class Layer:
    """One operation of a network on one picture."""

    parameters: int = 0
    flops: int = 0
    """Forward."""
    kept: int = 0
    """Numbers kept for the backward pass: its input, unless another layer keeps that already."""
    first: bool = False
    """Its input is the picture, whose gradient nobody needs."""
    outputs: int = 0
    """Of a convolution: its channels, one bias each."""
    shared: str | None = None
    """Layers of one name have one set of parameters."""


def _conv(inputs: int, outputs: int, kernel: int, side: int, kept: int | None = None) -> Layer:
    """A convolution whose result has `side`; by default its input has the same."""
    weights = inputs * outputs * kernel**2
    return Layer(
        weights + outputs,
        2 * weights * side**2,
        inputs * side**2 if kept is None else kept,
        inputs == 3,
        outputs,
    )


def _norm(channels: int, side: int) -> Layer:
    return Layer(2 * channels, 0, channels * side**2)


def _norm_silu(channels: int, side: int) -> Iterator[Layer]:
    yield _norm(channels, side)
    yield Layer(kept=channels * side**2)


def _res_block(inputs: int, outputs: int, side: int) -> Iterator[Layer]:
    yield from _norm_silu(inputs, side)
    yield _conv(inputs, outputs, 3, side)
    yield from _norm_silu(outputs, side)
    yield _conv(outputs, outputs, 3, side)
    if inputs != outputs:
        yield _conv(inputs, outputs, 1, side, kept=0)  # the first norm keeps this input


def _attention(channels: int, side: int) -> Iterator[Layer]:
    yield _norm(channels, side)
    yield _conv(channels, channels, 1, side)
    for _ in ("key", "value"):
        yield _conv(channels, channels, 1, side, kept=0)
    # Queries, keys, values and the result, which the last convolution reads.
    yield Layer(0, 4 * side**4 * channels, 4 * channels * side**2)
    yield _conv(channels, channels, 1, side, kept=0)


def _middle(channels: int, side: int) -> Iterator[Layer]:
    yield from _res_block(channels, channels, side)
    yield from _attention(channels, side)
    yield from _res_block(channels, channels, side)


def _down(channels: int, side: int) -> Layer:
    """Halves `side`; what it keeps has one more row and column."""
    return _conv(channels, channels, 3, side // 2, kept=channels * (side + 1) ** 2)


def encoder_layers(config: VQVAEConfig, side: int) -> Iterator[Layer]:
    """Yield the encoder's layers on a picture of `side` pixels."""
    widths = [config.base_channels * multiplier for multiplier in config.encoder_multipliers]
    yield _conv(3, config.base_channels, 3, side)
    before = config.base_channels
    for level, width in enumerate(widths):
        for _ in range(config.encoder_res_blocks):
            yield from _res_block(before, width, side)
            before = width
        if level < len(widths) - 1:
            yield _down(width, side)
            side //= 2
    yield from _middle(before, side)
    yield from _norm_silu(before, side)
    yield _conv(before, config.latent_channels, 3, side)


def decoder_layers(config: VQVAEConfig, rate: int, side: int) -> Iterator[Layer]:
    """Yield the layers of the decoder of `rate` for a picture of `side` pixels."""
    multipliers: Sequence[int] = config.decoder_multipliers[len(RATES) - 1 - RATES.index(rate)]
    widths = [config.base_channels * multiplier for multiplier in multipliers]
    side //= rate
    before = widths[-1]
    yield _conv(config.latent_channels, before, 3, side)
    yield from _middle(before, side)
    for level in range(len(widths) - 1, -1, -1):
        yield from _res_block(before, widths[level], side)
        before = widths[level]
        if rate == RATES[-1] and level == len(widths) - 1:
            yield from _attention(before, side)
        if level:
            side *= 2
            yield _conv(before, before, 3, side)
    yield from _norm_silu(before, side)
    yield _conv(before, 3, 3, side)


def quantizer_layer(config: VQVAEConfig, rate: int, side: int) -> Layer:
    """Return the projection before the search of the nearest code."""
    layer = _conv(config.latent_channels, config.latent_channels, 1, side // rate)
    return replace(layer, shared="projection")


def down_sampler_layer(config: VQVAEConfig, side: int) -> Layer:
    """Return a residual down-sampling of a feature map of `side`."""
    return _down(config.latent_channels, side)


def search_flops(config: VQVAEConfig, rate: int, side: int) -> int:
    """Return the FLOPs of the search of the nearest codes; it has no backward pass."""
    return 2 * (side // rate) ** 2 * config.codebook_size * config.latent_channels


def training_layers(config: VQVAEConfig, side: int, rates: Sequence[int] = RATES) -> Iterator[Layer]:
    """Yield all layers of one training forward pass at `rates`, without the search."""
    yield from encoder_layers(config, side)
    for rate in RATES[: RATES.index(max(rates)) + 1]:
        if rate != RATES[0]:
            yield down_sampler_layer(config, side // (rate // 2))
        if rate in rates:
            yield quantizer_layer(config, rate, side)
            yield from decoder_layers(config, rate, side)


@cache
def trained_parameters(config: VQVAEConfig) -> int:
    """Return the parameters with a gradient: all weights but the codebook, which is a moving average."""
    side = RATES[-1]  # parameters do not depend on it
    shared = (len(RATES) - 1) * quantizer_layer(config, RATES[0], side).parameters  # one for all rates
    return sum(layer.parameters for layer in training_layers(config, side)) - shared


def parameters(config: VQVAEConfig) -> int:
    """Return the parameters as published: with the codebook."""
    return trained_parameters(config) + config.codebook_size * config.latent_channels


def buffer_numbers(config: VQVAEConfig) -> int:
    """Return the float32 numbers of the buffers: codes, their sums, uses, and the use in training."""
    return config.codebook_size * (2 * config.latent_channels + 3)


def perceptual_flops(side: int) -> int:
    """Return the forward FLOPs of VGG16's convolutions on a picture of `side` pixels."""
    total, before = 0, 3
    for widths in _VGG_WIDTHS:
        for width in widths:
            total += 2 * 9 * before * width * side**2
            before = width
        side //= 2
    return total


def perceptual_kept(side: int) -> int:
    """Return the numbers that VGG16 keeps of one picture: the results of its activations, and its five feature maps."""
    total = 0
    for widths in _VGG_WIDTHS:
        total += (sum(widths) + 2 * widths[-1]) * side**2
        side //= 2
    return total


@dataclass(frozen=True)
class PassCost:
    """Operations of a forward pass and of a whole training pass on one picture."""

    forward: float
    train: float


@cache
def pass_cost(config: VQVAEConfig, side: int, rates: tuple[int, ...], *, perceptual: bool) -> PassCost:
    """Return the operations of one picture of `side` pixels, trained at `rates`.

    The other losses are left out: a thousandth. With `perceptual` VGG16 runs twice for each rate, once with the
    gradient of its input.
    """
    forward = train = 0
    for layer in training_layers(config, side, rates):
        forward += layer.flops
        train += (2 if layer.first else 3) * layer.flops
    once = sum(search_flops(config, rate, side) for rate in rates)
    vgg = perceptual_flops(side) * len(rates) * perceptual
    return PassCost(forward + once + 2 * vgg, train + once + 3 * vgg)
