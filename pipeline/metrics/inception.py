"""Inception-v3 as ported from the TensorFlow model of 2015-12-05: the network of published FID and IS.

It differs from later Inception-v3 models: average pools leave padding out of the mean, the last block pools
by maximum, and there are 1008 classes. Module names are those of the published state dict.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogview2.pipeline.metrics.resize import RESIZERS, ResizeMode
from cogview2.pipeline.metrics.small_features import check_images

SIDE = 299
FEATURES = 2048
CLASSES = 1008


class Conv(NamedTuple):
    """One convolution with batch norm and ReLU."""

    name: str
    out: int
    kernel: tuple[int, int]
    stride: int = 1
    same: bool = True
    """Padded to keep the size; strided and stem convolutions are not."""


Step = Conv | str | tuple[Conv, ...]
"""A convolution, a pool ("average", "max", "halve"), or convolutions side by side on one input."""
Branch = tuple[Step, ...]


def _conv(name: str, out: int, height: int, width: int | None = None) -> Conv:
    return Conv(name, out, (height, height if width is None else width))


def _halving(name: str, out: int) -> Conv:
    return Conv(name, out, (3, 3), stride=2, same=False)


def _block_35(pool: int) -> tuple[Branch, ...]:
    return (
        (_conv("branch1x1", 64, 1),),
        (_conv("branch5x5_1", 48, 1), _conv("branch5x5_2", 64, 5)),
        (_conv("branch3x3dbl_1", 64, 1), _conv("branch3x3dbl_2", 96, 3), _conv("branch3x3dbl_3", 96, 3)),
        ("average", _conv("branch_pool", pool, 1)),
    )


def _block_17(inner: int) -> tuple[Branch, ...]:
    return (
        (_conv("branch1x1", 192, 1),),
        (
            _conv("branch7x7_1", inner, 1),
            _conv("branch7x7_2", inner, 1, 7),
            _conv("branch7x7_3", 192, 7, 1),
        ),
        (
            _conv("branch7x7dbl_1", inner, 1),
            _conv("branch7x7dbl_2", inner, 7, 1),
            _conv("branch7x7dbl_3", inner, 1, 7),
            _conv("branch7x7dbl_4", inner, 7, 1),
            _conv("branch7x7dbl_5", 192, 1, 7),
        ),
        ("average", _conv("branch_pool", 192, 1)),
    )


def _block_8(pool: str) -> tuple[Branch, ...]:
    return (
        (_conv("branch1x1", 320, 1),),
        (
            _conv("branch3x3_1", 384, 1),
            (_conv("branch3x3_2a", 384, 1, 3), _conv("branch3x3_2b", 384, 3, 1)),
        ),
        (
            _conv("branch3x3dbl_1", 448, 1),
            _conv("branch3x3dbl_2", 384, 3),
            (_conv("branch3x3dbl_3a", 384, 1, 3), _conv("branch3x3dbl_3b", 384, 3, 1)),
        ),
        (pool, _conv("branch_pool", 192, 1)),
    )


_TO_17: tuple[Branch, ...] = (
    (_halving("branch3x3", 384),),
    (_conv("branch3x3dbl_1", 64, 1), _conv("branch3x3dbl_2", 96, 3), _halving("branch3x3dbl_3", 96)),
    ("halve",),
)
_TO_8: tuple[Branch, ...] = (
    (_conv("branch3x3_1", 192, 1), _halving("branch3x3_2", 320)),
    (
        _conv("branch7x7x3_1", 192, 1),
        _conv("branch7x7x3_2", 192, 1, 7),
        _conv("branch7x7x3_3", 192, 7, 1),
        _halving("branch7x7x3_4", 192),
    ),
    ("halve",),
)
_STEM: Branch = (
    _halving("Conv2d_1a_3x3", 32),
    Conv("Conv2d_2a_3x3", 32, (3, 3), same=False),
    _conv("Conv2d_2b_3x3", 64, 3),
    "halve",
    _conv("Conv2d_3b_1x1", 80, 1),
    Conv("Conv2d_4a_3x3", 192, (3, 3), same=False),
    "halve",
)
_BLOCKS: dict[str, tuple[Branch, ...]] = {
    "Mixed_5b": _block_35(32),
    "Mixed_5c": _block_35(64),
    "Mixed_5d": _block_35(64),
    "Mixed_6a": _TO_17,
    "Mixed_6b": _block_17(128),
    "Mixed_6c": _block_17(160),
    "Mixed_6d": _block_17(160),
    "Mixed_6e": _block_17(192),
    "Mixed_7a": _TO_8,
    "Mixed_7b": _block_8("average"),
    "Mixed_7c": _block_8("max"),
}


def _pool(kind: str, x_BCHW: Tensor) -> Tensor:
    if kind == "average":
        return F.avg_pool2d(x_BCHW, 3, stride=1, padding=1, count_include_pad=False)
    if kind == "max":
        return F.max_pool2d(x_BCHW, 3, stride=1, padding=1)
    return F.max_pool2d(x_BCHW, 3, stride=2)


class ConvUnit(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, incoming: int, spec: Conv) -> None:
        super().__init__()
        height, width = spec.kernel
        padding = (height // 2, width // 2) if spec.same else (0, 0)
        self.conv = nn.Conv2d(
            incoming, spec.out, spec.kernel, stride=spec.stride, padding=padding, bias=False
        )
        self.bn = nn.BatchNorm2d(spec.out, eps=1e-3)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return [B, out, H', W']."""
        return F.relu(self.bn(self.conv(x_BCHW)))


def _add_branch(module: nn.Module, channels: int, branch: Branch) -> int:
    """Give `module` the convolutions of `branch` under their names; returns the channels that come out."""
    for step in branch:
        if isinstance(step, str):
            continue
        parallel = (step,) if isinstance(step, Conv) else step
        for spec in parallel:
            module.add_module(spec.name, ConvUnit(channels, spec))
        channels = sum(spec.out for spec in parallel)
    return channels


def _run_branch(module: nn.Module, x_BCHW: Tensor, branch: Branch) -> Tensor:
    for step in branch:
        if isinstance(step, str):
            x_BCHW = _pool(step, x_BCHW)
        elif isinstance(step, Conv):
            x_BCHW = module.get_submodule(step.name)(x_BCHW)
        else:
            x_BCHW = torch.cat([module.get_submodule(spec.name)(x_BCHW) for spec in step], dim=1)
    return x_BCHW


class MixedBlock(nn.Module):
    """Branches side by side on one input, their channels concatenated."""

    def __init__(self, incoming: int, branches: tuple[Branch, ...]) -> None:
        super().__init__()
        self.branches = branches
        self.out = sum(_add_branch(self, incoming, branch) for branch in branches)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return [B, out, H', W']."""
        return torch.cat([_run_branch(self, x_BCHW, branch) for branch in self.branches], dim=1)


class InceptionNetwork(nn.Module):
    """The network from pixels in [0, 255] at 299x299 to pool3 features and logits. Always in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        channels = _add_branch(self, 3, _STEM)
        for name, branches in _BLOCKS.items():
            block = MixedBlock(channels, branches)
            self.add_module(name, block)
            channels = block.out
        self.fc = nn.Linear(channels, CLASSES)
        self.requires_grad_(False)
        self.eval()

    def forward(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return features [B, 2048] and logits [B, 1008] of float pixels [B, 3, 299, 299] in [0, 255].

        The logits leave the bias out, as the published inception scores do.
        """
        x_BCHW = _run_branch(self, (pixels_BCHW - 128) / 128, _STEM)
        for name in _BLOCKS:
            x_BCHW = self.get_submodule(name)(x_BCHW)
        features_BD = x_BCHW.mean((2, 3))
        return features_BD, F.linear(features_BD, self.fc.weight)


class InceptionFeatures:
    """An Inception network with its resize rule, as a `FeatureNetwork`."""

    dim = FEATURES

    def __init__(
        self, network: nn.Module, kind: str, resize: ResizeMode, *, sha256: str, comparable: bool
    ) -> None:
        """Wrap a network of pixels [B, 3, 299, 299] in [0, 255] to features and logits (or None).

        Args:
            network: in eval mode, on the device where it is to compute.
            kind: what the weights are, for the name.
            resize: rule that brings pictures to 299x299.
            sha256: of the weights' file.
            comparable: the weights are the published ones.
        """
        self.network = network
        self.name = f"{kind}, resize {resize}" + ("" if comparable else ", weights not the published ones")
        self.sha256 = sha256
        self.comparable = comparable
        self._resize = RESIZERS[resize]
        self._device = next((tensor.device for tensor in network.parameters()), torch.device("cpu"))

    @torch.no_grad()
    def __call__(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return features [B, 2048] and logits [B, 1008] or None; see `FeatureNetwork`."""
        check_images(images_BCHW)
        features_BD, logits_BK = self.network(self._resize(images_BCHW.to(self._device), SIDE))
        return features_BD.float(), None if logits_BK is None else logits_BK.float()
