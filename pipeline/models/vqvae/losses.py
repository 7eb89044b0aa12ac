"""Reconstruction losses of the VQVAE: L1, multi-scale structural similarity, perceptual distance (spec 1.3).

All take pixels [B, 3, H, W] on the scale [0, 1] and return float32.
Dims: B batch, C channels, H height, W width.
"""

import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from cogview2.pipeline.errors import CheckpointError, DataError

logger = logging.getLogger(__name__)

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2
SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
SSIM_FLOOR = 1e-4
"""Smallest similarity that is raised to a power: at 0 the slope of x^0.04 is infinite."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
VGG_CHANNELS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""VGG16's convolutions, by block: features come from the last ReLU of each, pooling lies between."""
FEATURE_EPS = 1e-10


def l1_loss(x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
    """Return the mean absolute difference, a scalar."""
    return (x_BCHW.float() - y_BCHW.float()).abs().mean()


def ms_ssim_scales(side: int) -> int:
    """Return how many of the 5 scales fit a picture with this shorter side in pixels: side > 10 * 2^(s-1).

    Raises:
        DataError: not even one window fits.
    """
    fitting = sum(side > (SSIM_WINDOW - 1) * 2**scale for scale in range(len(SSIM_WEIGHTS)))
    if not fitting:
        raise DataError(
            f"structural similarity needs pictures of at least {SSIM_WINDOW} pixels a side, not {side}"
        )
    return fitting


def ms_ssim(x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
    """Return the multi-scale structural similarity of each pair, float32 [B] in (0, 1]; 1 means equal.

    Gaussian window 11, sigma 1.5. Five scales with the standard weights where they fit (`ms_ssim_scales`),
    else fewer; the weights are scaled to sum 1. Contrast terms are averaged where the whole window is inside
    the picture; the similarity at the coarsest scale covers the whole picture, with reflected borders. Terms
    below 1e-4, negative ones too, count as 1e-4, so that the gradient stays finite.

    Raises:
        DataError: shapes differ, or the pictures are smaller than a window.
    """
    if x_BCHW.shape != y_BCHW.shape or x_BCHW.ndim != 4:
        raise DataError(f"both must be [B, C, H, W], not {list(x_BCHW.shape)} and {list(y_BCHW.shape)}")
    scales = ms_ssim_scales(min(x_BCHW.shape[2:]))
    weights = [weight / sum(SSIM_WEIGHTS[:scales]) for weight in SSIM_WEIGHTS[:scales]]
    similarity_B = torch.ones(len(x_BCHW), device=x_BCHW.device)
    # The variances are small differences of large numbers: half precision (autocast) would leave noise.
    with torch.autocast(device_type=x_BCHW.device.type, enabled=False):
        x_BCHW, y_BCHW = x_BCHW.float(), y_BCHW.float()
        for scale, weight in enumerate(weights):
            last = scale == scales - 1
            term_B = _ssim_term(x_BCHW, y_BCHW, with_luminance=last)
            similarity_B = similarity_B * term_B.clamp(min=SSIM_FLOOR) ** weight
            if not last:
                x_BCHW, y_BCHW = F.avg_pool2d(x_BCHW, 2), F.avg_pool2d(y_BCHW, 2)
    return similarity_B


def ms_ssim_loss(x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
    """Return 1 - the mean of `ms_ssim`, a scalar in [0, 1)."""
    return 1 - ms_ssim(x_BCHW, y_BCHW).mean()


def _ssim_term(x_BCHW: Tensor, y_BCHW: Tensor, *, with_luminance: bool) -> Tensor:
    """Return the mean [B] of contrast x structure; x luminance too if asked, over reflected borders."""
    if with_luminance:
        border = [SSIM_WINDOW // 2] * 4
        x_BCHW, y_BCHW = F.pad(x_BCHW, border, mode="reflect"), F.pad(y_BCHW, border, mode="reflect")
    stacked = torch.cat([x_BCHW, y_BCHW, x_BCHW * x_BCHW, y_BCHW * y_BCHW, x_BCHW * y_BCHW])
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = _blur(stacked).chunk(5)
    variances = (mean_xx - mean_x**2).clamp(min=0) + (mean_yy - mean_y**2).clamp(min=0)
    term = (2 * (mean_xy - mean_x * mean_y) + SSIM_C2) / (variances + SSIM_C2)
    if with_luminance:
        term = term * (2 * mean_x * mean_y + SSIM_C1) / (mean_x**2 + mean_y**2 + SSIM_C1)
    return term.mean(dim=(1, 2, 3))


def _blur(x_BCHW: Tensor) -> Tensor:
    """Apply the Gaussian window where it is wholly inside, as a column and a row pass."""
    C = x_BCHW.shape[1]
    offsets = torch.arange(SSIM_WINDOW, device=x_BCHW.device, dtype=torch.float32) - SSIM_WINDOW // 2
    kernel = torch.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    kernel = (kernel / kernel.sum()).expand(C, 1, SSIM_WINDOW)
    columns_BCHW = F.conv2d(x_BCHW, kernel[..., :, None], groups=C)
    return F.conv2d(columns_BCHW, kernel[..., None, :], groups=C)


class GradientPerceptual(nn.Module):
    """Stand-in where no VGG16 weights are at hand: L1 between image gradients at three scales."""

    name = "gradient"
    scales = 3

    def forward(self, x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
        """Return the distance, a float32 scalar: 0 for equal pictures; a constant offset does not count."""
        difference_BCHW = x_BCHW.float() - y_BCHW.float()
        total = torch.zeros((), device=x_BCHW.device)
        for scale in range(self.scales):
            if scale:
                difference_BCHW = F.avg_pool2d(difference_BCHW, 2)
            # Gradients and pooling are linear: the gradient of the difference is the difference of gradients.
            total = total + sum(difference_BCHW.diff(dim=dim).abs().mean() for dim in (2, 3))
        return total / self.scales


class VGGPerceptual(nn.Module):
    """Distance between unit-normalised VGG16 features after relu1_2, 2_2, 3_3, 4_3, 5_3 (LPIPS type), frozen.

    Squared differences are summed over channels with the weights of a head vector (all 1 without heads),
    averaged over positions, and summed over the five layers. Needs sides of at least 16 pixels.
    """

    def __init__(self, state: dict[str, Tensor]) -> None:
        """Build the trunk.

        Args:
            state: `features.N.weight` and `.bias` of torchvision's vgg16; other keys are ignored, but for
                `linK.model.1.weight` [1, C, 1, 1], K = 0..4: the head vectors of the published LPIPS weights.

        Raises:
            CheckpointError: tensors are missing or have other shapes; all are named.
        """
        super().__init__()
        expected = _vgg_shapes()
        head_shapes = {f"lin{k}.model.1.weight": (1, block[-1], 1, 1) for k, block in enumerate(VGG_CHANNELS)}
        self.name = "vgg16"
        if any(name in state for name in head_shapes):
            expected |= head_shapes
            self.name = "vgg16-lpips"
        _check_state(state, expected)
        for name in expected:
            self.register_buffer(_attribute(name), state[name].detach().float().clone(), persistent=False)
        self.with_heads = self.name == "vgg16-lpips"
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    def features(self, x_BCHW: Tensor) -> list[Tensor]:
        """Return the five feature maps of pixels in [0, 1], each of unit length over channels."""
        h_BCHW = (x_BCHW.float() - self.get_buffer("mean")) / self.get_buffer("std")
        maps = []
        index = 0
        for block, widths in enumerate(VGG_CHANNELS):
            if block:
                h_BCHW = F.max_pool2d(h_BCHW, 2)
                index += 1
            for _ in widths:
                weight, bias = (
                    self.get_buffer(_attribute(f"features.{index}.{kind}")) for kind in ("weight", "bias")
                )
                h_BCHW = F.relu(F.conv2d(h_BCHW, weight, bias, padding=1))
                index += 2
            # rsqrt of a positive number: the root alone has no gradient where all features are 0.
            maps.append(h_BCHW * (h_BCHW.float().square().sum(dim=1, keepdim=True) + FEATURE_EPS).rsqrt())
        return maps

    def forward(self, x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
        """Return the distance of `x_BCHW` (with gradient) from `y_BCHW` (without), a float32 scalar."""
        with torch.no_grad():
            targets = self.features(y_BCHW)
        total = torch.zeros((), device=x_BCHW.device)
        for k, (ours, theirs) in enumerate(zip(self.features(x_BCHW), targets, strict=True)):
            squared_BCHW = (ours.float() - theirs.float()).square()
            if self.with_heads:
                squared_BCHW = squared_BCHW * self.get_buffer(_attribute(f"lin{k}.model.1.weight"))
            total = total + squared_BCHW.sum(dim=1).mean()
        return total


def build_perceptual(path: str | None) -> VGGPerceptual | GradientPerceptual:
    """Return the perceptual loss for a VGG16 file (torch pickle or safetensors), or the named stand-in.

    Raises:
        CheckpointError: the file is missing, unreadable, or not a VGG16 state dict.
    """
    if path is None:
        logger.warning(
            "no VGG16 weights are configured: the perceptual loss is %r, image gradients at %d scales; "
            "set vqvae.perceptual_network to a file for the published kind of loss",
            GradientPerceptual.name,
            GradientPerceptual.scales,
        )
        return GradientPerceptual()
    try:
        if Path(path).suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the readers raise, the file cannot be used
        raise CheckpointError(
            f"cannot read VGG16 weights from {path}: {error}; save vgg16().state_dict() there"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{path} holds a {type(state).__name__}, not a state dict; save vgg16().state_dict()"
        )
    try:
        return VGGPerceptual(state)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _vgg_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    index, before = 0, 3
    for widths in VGG_CHANNELS:
        for width in widths:
            shapes[f"features.{index}.weight"] = (width, before, 3, 3)
            shapes[f"features.{index}.bias"] = (width,)
            index, before = index + 2, width
        index += 1
    return shapes


def _check_state(state: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    missing = [name for name in expected if not isinstance(state.get(name), Tensor)]
    wrong = [
        f"{name} is {list(state[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name not in missing and tuple(state[name].shape) != shape
    ]
    if missing or wrong:
        problems = [f"missing: {', '.join(missing)}"] * bool(missing) + wrong
        raise CheckpointError(
            f"not the weights of torchvision's vgg16 ({'; '.join(problems)}); save vgg16().state_dict()"
        )


def _attribute(name: str) -> str:
    return name.replace(".", "_")
