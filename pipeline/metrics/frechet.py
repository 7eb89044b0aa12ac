"""The Frechet distance between two Gaussians, in float64 (spec 9)."""

import numpy as np
from numpy.typing import NDArray

from cogview2.pipeline.errors import DataError

Array = NDArray[np.float64]
_NEGATIVE_SHARE = 1e-6
"""Smallest eigenvalue / largest one below which a matrix is no covariance; rounding stays far above it."""


def _factor(cov: Array, name: str) -> Array:
    """Return F with F F^T = cov, from the symmetric eigendecomposition."""
    values, vectors = np.linalg.eigh((cov + cov.T) / 2)
    if values[0] < -_NEGATIVE_SHARE * max(values[-1], np.finfo(np.float64).tiny):
        raise DataError(
            f"{name} is not a covariance: its eigenvalues go from {values[0]:.3g} to {values[-1]:.3g}; "
            "compute it again from the features"
        )
    factor: Array = vectors * np.sqrt(values.clip(min=0))
    return factor


def _checked(mean: Array, cov: Array, number: int) -> tuple[Array, Array]:
    mean, cov = np.asarray(mean, dtype=np.float64), np.asarray(cov, dtype=np.float64)
    if mean.ndim != 1 or cov.shape != (mean.size, mean.size) or not mean.size:
        raise DataError(
            f"mean{number} has shape {mean.shape} and cov{number} {cov.shape}; they must be [d] and [d, d]"
        )
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise DataError(
            f"mean{number} or cov{number} holds numbers that are not finite; look at the pictures first"
        )
    return mean, cov


def frechet_distance(mean1: Array, cov1: Array, mean2: Array, cov2: Array) -> float:
    """Return |mean1 - mean2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)).

    With cov = F F^T the trace of the root is the sum of the singular values of F1^T F2. Unlike the root of a
    general matrix this needs no regularisation for singular covariances (fewer pictures than dimensions),
    has no imaginary part, and is zero for equal statistics up to rounding.

    Args:
        mean1: [d]; cov1: [d, d], symmetric. The same for mean2 and cov2.
        cov1: covariance of the first set.
        mean2: mean of the second set.
        cov2: covariance of the second set.

    Returns:
        The distance (squared 2-Wasserstein), never negative.

    Raises:
        DataError: shapes that do not fit, numbers that are not finite, or a matrix that is no covariance.
    """
    mean1, cov1 = _checked(mean1, cov1, 1)
    mean2, cov2 = _checked(mean2, cov2, 2)
    if mean1.shape != mean2.shape:
        raise DataError(
            f"the statistics have {mean1.size} and {mean2.size} dimensions; "
            "compute both with the same feature network"
        )
    root_trace = np.linalg.svd(_factor(cov1, "cov1").T @ _factor(cov2, "cov2"), compute_uv=False).sum()
    difference = mean1 - mean2
    distance = difference @ difference + np.trace(cov1) + np.trace(cov2) - 2 * root_trace
    return max(float(distance), 0.0)
