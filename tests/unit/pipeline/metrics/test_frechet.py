import numpy as np
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from cogview2.pipeline.errors import DataError
from cogview2.pipeline.metrics.frechet import frechet_distance
from cogview2.pipeline.metrics.statistics import FeatureStatistics


def covariance(dim: int, seed: int, samples: int | None = None) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((samples or 3 * dim, dim))
    return np.cov(values, rowvar=False)


@pytest.mark.parametrize("dim", [1, 3, 40])
def test_diagonal_gaussians(dim: int) -> None:
    rng = np.random.default_rng(dim)
    mean1, mean2 = rng.standard_normal((2, dim))
    std1, std2 = rng.uniform(0.1, 3, (2, dim))
    expected = ((mean1 - mean2) ** 2).sum() + ((std1 - std2) ** 2).sum()
    assert frechet_distance(mean1, np.diag(std1**2), mean2, np.diag(std2**2)) == pytest.approx(
        expected, rel=1e-12
    )


def test_gaussians_that_share_no_axes() -> None:
    """In two dimensions the trace of the root of a product has a closed form: sqrt(tr + 2 sqrt(det))."""
    first, second = covariance(2, 0), covariance(2, 1)
    product = first @ second
    root_trace = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = np.trace(first) + np.trace(second) - 2 * root_trace
    assert frechet_distance(np.zeros(2), first, np.zeros(2), second) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("samples", [200, 10])
def test_shift_and_equality_also_when_singular(samples: int) -> None:
    cov, mean = covariance(50, 2, samples), np.arange(50) / 10
    shift = np.full(50, 0.3)
    assert frechet_distance(mean, cov, mean, cov) == pytest.approx(0, abs=1e-12 * np.trace(cov))
    assert frechet_distance(mean, cov, mean + shift, cov) == pytest.approx(50 * 0.09, rel=1e-10)


def test_symmetry_and_scale() -> None:
    first, second, mean = covariance(20, 3), covariance(20, 4), np.ones(20)
    forth = frechet_distance(mean, first, 0 * mean, second)
    assert frechet_distance(0 * mean, second, mean, first) == pytest.approx(forth, rel=1e-12)
    assert frechet_distance(100 * mean, first * 1e4, 0 * mean, second * 1e4) == pytest.approx(
        1e4 * forth, rel=1e-9
    )


class Identity(torch.nn.Module):
    """A feature extractor whose input is the features."""

    num_features = 24

    def forward(self, features_BD: torch.Tensor) -> torch.Tensor:
        return features_BD


def test_against_torchmetrics_on_the_same_features() -> None:
    generator = torch.Generator().manual_seed(0)
    real_ND = torch.randn(300, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    fake_ND = torch.rand(200, 24, generator=generator) * 3
    oracle = FrechetInceptionDistance(feature=Identity())
    ours = []
    for features_ND, real in ((real_ND, True), (fake_ND, False)):
        statistics = FeatureStatistics(24)
        for part_BD in features_ND.split(64):
            oracle.update(part_BD, real=real)
            statistics.update(part_BD)
        ours.append(statistics.mean_cov())
    assert frechet_distance(*ours[0], *ours[1]) == pytest.approx(float(oracle.compute()), rel=1e-6)


def test_wrong_input_is_refused() -> None:
    mean, cov = np.zeros(3), np.eye(3)
    with pytest.raises(DataError, match="3 and 4 dimensions"):
        frechet_distance(mean, cov, np.zeros(4), np.eye(4))
    with pytest.raises(DataError, match="must be"):
        frechet_distance(mean, np.eye(2), mean, cov)
    with pytest.raises(DataError, match="not finite"):
        frechet_distance(mean, cov, mean * np.nan, cov)
    with pytest.raises(DataError, match="cov2 is not a covariance"):
        frechet_distance(mean, cov, mean, np.diag([1.0, 1.0, -0.1]))
