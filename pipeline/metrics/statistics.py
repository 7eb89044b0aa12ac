"""Streaming mean and covariance of features in float64, summed over ranks."""

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from cogview2.pipeline.errors import DataError

Array = NDArray[np.float64]


class FeatureStatistics:
    """Count, sum of x and sum of x x^T: what a Frechet distance needs of any number of features."""

    def __init__(self, dim: int) -> None:
        """Start with no features of dimension `dim`."""
        if dim < 1:
            raise DataError(f"features of dimension {dim} have no statistics")
        self.dim = dim
        self.count = 0
        self.total = torch.zeros(dim, dtype=torch.float64)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features_BD: Tensor) -> "FeatureStatistics":
        """Add features [B, dim] of any float dtype and device; returns self.

        Raises:
            DataError: another dimension, or numbers that are not finite.
        """
        if features_BD.ndim != 2 or features_BD.shape[1] != self.dim:
            raise DataError(
                f"features of shape {tuple(features_BD.shape)} do not fit statistics of [B, {self.dim}]"
            )
        features_BD = features_BD.detach().to("cpu", torch.float64)
        if not torch.isfinite(features_BD).all():
            raise DataError(
                "features hold numbers that are not finite; look at the pictures and the feature network"
            )
        self.count += features_BD.shape[0]
        self.total += features_BD.sum(0)
        self.outer += features_BD.T @ features_BD
        return self

    def all_reduce(self) -> "FeatureStatistics":
        """Become the statistics of all ranks, on every rank; returns self.

        Call it once, after the last update. Does nothing without an initialised torch.distributed.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return self
        flat = torch.cat(
            [torch.tensor([float(self.count)], dtype=torch.float64), self.total, self.outer.flatten()]
        )
        # NCCL only moves device memory; gloo and the debug backends take the host's.
        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
        flat = flat.to(device)
        dist.all_reduce(flat)
        flat = flat.cpu()
        self.count = int(flat[0].item())
        self.total = flat[1 : 1 + self.dim].clone()
        self.outer = flat[1 + self.dim :].view(self.dim, self.dim).clone()
        return self

    def mean_cov(self) -> tuple[Array, Array]:
        """Return mean [dim] and unbiased covariance [dim, dim], float64.

        Raises:
            DataError: fewer than two features.
        """
        if self.count < 2:
            raise DataError(f"a covariance needs two features or more, not {self.count}")
        mean = self.total / self.count
        cov = (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
        cov = (cov + cov.T) / 2
        return mean.numpy(), cov.numpy()
