"""A small network with fixed random weights: features without a file, comparable only to themselves."""

import hashlib
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cogview2.pipeline.errors import DataError
from cogview2.pipeline.metrics.resize import resize_antialias

_SIDE = 128
_WIDTHS = (3, 16, 32, 32, 32)


def check_images(images_BCHW: Tensor) -> None:
    """Refuse anything but uint8 [B, 3, H, W].

    Raises:
        DataError: another dtype or shape.
    """
    if images_BCHW.dtype != torch.uint8 or images_BCHW.ndim != 4 or images_BCHW.shape[1] != 3:
        raise DataError(
            f"a feature network takes uint8 pictures [B, 3, H, W], not {images_BCHW.dtype} "
            f"{tuple(images_BCHW.shape)}; convert them first"
        )


class RandomConvFeatures:
    """Four strided convolutions; the features are the channel means of the second and of the last one.

    The two scales see texture and shape. Weights come from NumPy's generator, so they are equal everywhere.
    """

    dim = _WIDTHS[2] + _WIDTHS[4]
    comparable = False

    def __init__(self, seed: int = 0, *, device: torch.device | str = "cpu") -> None:
        """Draw the weights from `seed`."""
        self.name = f"random-conv-{self.dim} (seed {seed}), not comparable to papers"
        generator = np.random.default_rng(seed)
        digest = hashlib.sha256()
        self._weights: list[Tensor] = []
        for incoming, outgoing in zip(_WIDTHS, _WIDTHS[1:], strict=False):
            scale = math.sqrt(2 / (incoming * 9))
            weight = (generator.standard_normal((outgoing, incoming, 3, 3)) * scale).astype(np.float32)
            digest.update(weight.tobytes())
            self._weights.append(torch.from_numpy(weight).to(device))
        self.sha256 = digest.hexdigest()

    @torch.no_grad()
    def __call__(self, images_BCHW: Tensor) -> tuple[Tensor, None]:
        """Return features [B, 64] and no logits; see `FeatureNetwork`."""
        check_images(images_BCHW)
        x_BCHW = resize_antialias(images_BCHW.to(self._weights[0].device), _SIDE) / 127.5 - 1
        means = []
        for weight in self._weights:
            x_BCHW = F.leaky_relu(F.conv2d(x_BCHW, weight, stride=2, padding=1), 0.2)
            means.append(x_BCHW.mean((2, 3)))
        return torch.cat([means[1], means[3]], dim=1), None
