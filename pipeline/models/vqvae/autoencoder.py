"""Convolutional encoder, decoders and down-samplers of the hierarchical VQVAE (spec 1.3).

Attribute names are those of the published state dict (spec 10.4).
Dims: B batch, C channels, H height, W width, E code dim.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=NORM_EPS)


class ResBlock(nn.Module):
    """Two normalised 3x3 convolutions with a skip, which a 1x1 convolution adapts where channels change."""

    def __init__(self, channels_in: int, channels_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels_in, groups)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = _norm(channels_out, groups)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        if channels_in != channels_out:
            self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map [B, channels_in, H, W] to [B, channels_out, H, W]."""
        h_BCHW = self.conv1(F.silu(self.norm1(x_BCHW)))
        h_BCHW = self.conv2(F.silu(self.norm2(h_BCHW)))
        skip_BCHW = self.nin_shortcut(x_BCHW) if hasattr(self, "nin_shortcut") else x_BCHW
        return skip_BCHW + h_BCHW


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, with a skip; scores are scaled by C^-0.5."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = _norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map [B, C, H, W] to the same shape."""
        B, C, H, W = x_BCHW.shape
        h_BCHW = self.norm(x_BCHW)
        # The head axis of length 1 is what the fused kernels want: [B, 1, HW, C].
        q, k, v = (conv(h_BCHW).flatten(2).transpose(1, 2).unsqueeze(1) for conv in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return x_BCHW + self.proj_out(attended.transpose(1, 2).reshape(B, C, H, W))


class Downsample(nn.Module):
    """Halves the sides by a stride-2 convolution over a picture padded at the right and the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, C, H/2, W/2]."""
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))


class ResidualDownsample(nn.Module):
    """Average pooling plus a learned down-sampling; no norm, no activation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_down_sampler = Downsample(channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, C, H/2, W/2]."""
        return F.avg_pool2d(x_BCHW, 2) + self.conv_down_sampler(x_BCHW)


class Upsample(nn.Module):
    """Doubles the sides by repetition, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, C, 2H, 2W]."""
        return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    """ResBlock, attention, ResBlock at the lowest resolution."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResBlock(channels, channels, groups)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map [B, C, H, W] to the same shape."""
        return self.block_2(self.attn_1(self.block_1(x_BCHW)))


class Level(nn.Module):
    """One resolution: ResBlocks, each followed by attention where wanted, then a change of sides."""

    def __init__(self, channels: Sequence[int], groups: int, *, attention: bool, resize: str | None) -> None:
        """Build the level.

        Args:
            channels: the chain of channel counts; one ResBlock between each two.
            groups: groups of the norms.
            attention: whether each ResBlock is followed by attention.
            resize: "down", "up" or None; names the attribute (`downsample`, `upsample`).
        """
        super().__init__()
        self.block = nn.ModuleList(
            ResBlock(a, b, groups) for a, b in zip(channels, channels[1:], strict=False)
        )
        self.attn = nn.ModuleList(AttnBlock(b, groups) for b in channels[1:] if attention)
        if resize == "down":
            self.downsample = Downsample(channels[-1])
        elif resize == "up":
            self.upsample = Upsample(channels[-1])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map [B, channels[0], H, W] to [B, channels[-1], H', W']: sides halved, kept or doubled."""
        for index, block in enumerate(self.block):
            x_BCHW = block(x_BCHW)
            if len(self.attn):
                x_BCHW = self.attn[index](x_BCHW)
        if hasattr(self, "downsample"):
            return self.downsample(x_BCHW)
        return self.upsample(x_BCHW) if hasattr(self, "upsample") else x_BCHW


class Encoder(nn.Module):
    """Normalised pixels to features; the stride is 2^(levels - 1), 4 for the three published levels."""

    def __init__(
        self, base: int, multipliers: Sequence[int], res_blocks: int, latent_channels: int, groups: int
    ) -> None:
        super().__init__()
        widths = [base * multiplier for multiplier in multipliers]
        self.conv_in = nn.Conv2d(3, base, 3, padding=1)
        self.down = nn.ModuleList()
        for level, (before, width) in enumerate(zip([base, *widths], widths, strict=False)):
            resize = "down" if level < len(widths) - 1 else None
            self.down.append(Level([before] + [width] * res_blocks, groups, attention=False, resize=resize))
        self.mid = Middle(widths[-1], groups)
        self.norm_out = _norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], latent_channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map normalised pixels [B, 3, H, W] to [B, E, H/4, W/4]."""
        h_BCHW = self.conv_in(x_BCHW)
        for level in self.down:
            h_BCHW = level(h_BCHW)
        return self.conv_out(F.silu(self.norm_out(self.mid(h_BCHW))))


class Decoder(nn.Module):
    """Quantized latents of one rate to normalised pixels: one ResBlock a level, the coarsest first."""

    def __init__(
        self, base: int, multipliers: Sequence[int], latent_channels: int, groups: int, *, attention: bool
    ) -> None:
        """Build the decoder.

        Args:
            base: channels at multiplier 1.
            multipliers: by level, finest first; the rate is 2^(levels - 1).
            latent_channels: code dim E.
            groups: groups of the norms.
            attention: attention at the coarsest level too, not only in the middle (decoder of rate 16).
        """
        super().__init__()
        widths = [base * multiplier for multiplier in multipliers]
        deepest = len(widths) - 1
        self.conv_in = nn.Conv2d(latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups)
        self.up = nn.ModuleList()
        for level, width in enumerate(widths):
            before = widths[min(level + 1, deepest)]
            resize = "up" if level else None
            self.up.append(
                Level([before, width], groups, attention=attention and level == deepest, resize=resize)
            )
        self.norm_out = _norm(widths[0], groups)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z_BCHW: Tensor) -> Tensor:
        """Map [B, E, H/rate, W/rate] to normalised pixels [B, 3, H, W]."""
        h_BCHW = self.mid(self.conv_in(z_BCHW))
        for level in range(len(self.up) - 1, -1, -1):
            h_BCHW = self.up[level](h_BCHW)
        return self.conv_out(F.silu(self.norm_out(h_BCHW)))


def check_pixels(pixels_BCHW: Tensor, multiple: int) -> str | None:
    """Return what is wrong with a batch of pixels for a network of this stride, or None.

    Args:
        pixels_BCHW: float [B, 3, H, W].
        multiple: number that both sides must be a multiple of.
    """
    if pixels_BCHW.ndim != 4 or pixels_BCHW.shape[1] != 3:
        return f"pixels must be [B, 3, H, W], not {list(pixels_BCHW.shape)}; convert the picture to RGB first"
    if not torch.is_floating_point(pixels_BCHW):
        return f"pixels must be floats in [0, 1], not {pixels_BCHW.dtype}; divide by 255 first"
    H, W = pixels_BCHW.shape[2:]
    if H % multiple or W % multiple or not H or not W:
        return f"the sides of {H}x{W} pixels must be multiples of {multiple}; resize or crop the picture"
    return None
