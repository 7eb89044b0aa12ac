"""Streaming mean and covariance of features in float64, merged over parts and ranks, and their .npz files."""

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from cogview2.pipeline import fsops
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

    def merge(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """Add the features that `other` has seen; returns self."""
        if other.dim != self.dim:
            raise DataError(f"statistics of dimension {other.dim} do not merge into {self.dim}")
        self.count += other.count
        self.total += other.total
        self.outer += other.outer
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

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """Return the plain sums, for a file that `from_arrays` reads back exactly."""
        return {
            "count": np.array(self.count, dtype=np.int64),
            "total": self.total.numpy(),
            "outer": self.outer.numpy(),
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray[np.generic]]) -> "FeatureStatistics":
        """Return the statistics whose `to_arrays` is `arrays`."""
        total = np.asarray(arrays["total"], dtype=np.float64)
        outer = np.asarray(arrays["outer"], dtype=np.float64)
        if total.ndim != 1 or outer.shape != (total.size, total.size):
            raise DataError(f"sums of shapes {total.shape} and {outer.shape} are no feature statistics")
        statistics = cls(total.size)
        statistics.count = int(arrays["count"])
        statistics.total = torch.from_numpy(total.copy())
        statistics.outer = torch.from_numpy(outer.copy())
        return statistics


@dataclass(frozen=True)
class SavedStatistics:
    """Mean and covariance from a file; files of other tools do not say how many pictures or which network."""

    mean: Array
    cov: Array
    count: int | None = None
    network: str | None = None
    network_sha256: str | None = None


def save_statistics(path: Path, statistics: FeatureStatistics, network: str, network_sha256: str) -> None:
    """Write mean and covariance as .npz with the names mu and sigma, which pytorch-fid reads.

    Args:
        path: the .npz file.
        statistics: of two features or more.
        network: name of the feature network.
        network_sha256: of its weights.
    """
    mean, cov = statistics.mean_cov()
    buffer = io.BytesIO()
    np.savez(
        buffer,
        mu=mean,
        sigma=cov,
        count=np.int64(statistics.count),
        network=np.array(network),
        network_sha256=np.array(network_sha256),
    )
    fsops.write_bytes(Path(path), buffer.getvalue())


def load_statistics(path: Path) -> SavedStatistics:
    """Read an .npz with mu and sigma, ours or pytorch-fid's.

    Raises:
        DataError: unreadable, or not such a file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        mean, cov = np.asarray(arrays["mu"], dtype=np.float64), np.asarray(arrays["sigma"], dtype=np.float64)
    except (OSError, ValueError, KeyError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} is not an .npz file of feature statistics with mu and sigma: {error}"
        ) from error
    if mean.ndim != 1 or cov.shape != (mean.size, mean.size):
        raise DataError(
            f"{path}: mu has shape {mean.shape} and sigma {cov.shape}; they must be [d] and [d, d]"
        )
    return SavedStatistics(
        mean=mean,
        cov=cov,
        count=int(arrays["count"]) if "count" in arrays else None,
        network=str(arrays["network"]) if "network" in arrays else None,
        network_sha256=str(arrays["network_sha256"]) if "network_sha256" in arrays else None,
    )
