"""k-means over a codebook."""

import numpy as np
import pytest
import torch

from cogview2.pipeline.sampling.clusters import fit_clusters, lloyd, seed_centres
from cogview2.pipeline.sampling.noise import uniforms


def _naive_lloyd(points: torch.Tensor, centres: torch.Tensor, iterations: int) -> list[int]:
    def nearest(point: torch.Tensor) -> int:
        return min(range(len(centres)), key=lambda c: float((point - centres[c]).square().sum()))

    centres = centres.clone()
    labels = [nearest(point) for point in points]
    for _ in range(iterations):
        members = [[i for i, label in enumerate(labels) if label == c] for c in range(len(centres))]
        far = sorted(
            range(len(points)), key=lambda i: -float((points[i] - centres[labels[i]]).square().sum())
        )
        for c, group in enumerate(members):
            centres[c] = points[group].mean(0) if group else points[far.pop(0)]
        labels = [nearest(point) for point in points]
    return labels


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_lloyd_equals_the_naive_loop(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(60, 4, generator=generator, dtype=torch.float64)
    centres = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    centres[3] = 100.0  # a cluster that starts empty
    for iterations in (0, 1, 6):
        assert lloyd(points, centres, iterations).tolist() == _naive_lloyd(points, centres, iterations)
    assert len(lloyd(points, centres, 6).unique()) == 8


def test_separate_blobs_are_found() -> None:
    centres = torch.tensor([[0.0, 0], [50, 0], [0, 50], [50, 50], [90, 90]])
    truth = torch.arange(5).repeat_interleave(20)
    codes = centres[truth] + torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    labels = fit_clusters(codes, 5, seed=1)
    assert labels.dtype == torch.int64 and labels.shape == (100,)
    assert len({(int(a), int(b)) for a, b in zip(truth, labels, strict=True)}) == 5


def test_seeds_spread_and_repeat() -> None:
    codes = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fit_clusters(codes, 7, seed=4), fit_clusters(codes, 7, seed=4))
    chosen = seed_centres(codes.double(), 50, seed=4)
    assert len(chosen.unique(dim=0)) == 50


def test_more_clusters_than_codes_and_equal_codes() -> None:
    codes = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    assert sorted(fit_clusters(codes, 500, seed=0).tolist()) == list(range(6))
    doubled = torch.cat([codes, codes])
    labels = fit_clusters(doubled, 12, seed=0)
    assert torch.equal(labels[:6], labels[6:]) and sorted(labels[:6].tolist()) == list(range(6))


def test_a_codebook_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="1 non-finite"):
        fit_clusters(torch.tensor([[0.0], [torch.nan]]), 2, seed=0)


@pytest.mark.parametrize("seed", [0, 1])
def test_first_centres_equal_the_naive_loop(seed: int) -> None:
    points = torch.randn(40, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    draws = uniforms(seed, 0, "k-means++", 9, 1)[:, 0].tolist()
    chosen = [int(draws[0] * 40)]
    for draw in draws[1:]:
        weights = [min(float((point - points[c]).square().sum()) for c in chosen) for point in points]
        cumulative = np.cumsum(weights)
        chosen.append(int(np.argmax(cumulative > draw * cumulative[-1])))
    assert torch.equal(seed_centres(points, 9, seed), points[chosen])
