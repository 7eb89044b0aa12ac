"""Clusters of near-equal codes by k-means over the codebook (spec 3.3).

Dims: n codes, C clusters, E code dim. All in float64 on the CPU: a codebook is small, and the result decides
what every later image looks like, so it must not depend on a device.
"""

import torch

from cogview2.pipeline.sampling.noise import uniforms


def _squared_distances(points_nE: torch.Tensor, centres_CE: torch.Tensor) -> torch.Tensor:
    """Return [n, C] by the expanded square, clamped at 0."""
    products_nC = points_nE @ centres_CE.T
    squares_nC = points_nE.square().sum(1)[:, None] - 2 * products_nC + centres_CE.square().sum(1)[None, :]
    return squares_nC.clamp_min_(0)


def seed_centres(points_nE: torch.Tensor, clusters: int, seed: int) -> torch.Tensor:
    """Choose `clusters` points as first centres, each with probability ~ squared distance to those before it.

    Args:
        points_nE: float64.
        clusters: at most n.
        seed: equal seeds give equal centres.

    Returns:
        float64 [clusters, E]. When all points already coincide with a centre, the first unused ones follow.
    """
    draws = uniforms(seed, 0, "k-means++", clusters, 1)[:, 0].double()
    chosen = [int(draws[0] * len(points_nE))]
    nearest_n = torch.full((len(points_nE),), torch.inf, dtype=torch.float64)
    unused_n = torch.ones(len(points_nE), dtype=torch.bool)
    for draw in draws[1:]:
        unused_n[chosen[-1]] = False
        distance_n = (points_nE - points_nE[chosen[-1]]).square().sum(1)
        nearest_n = torch.minimum(nearest_n, distance_n)
        cumulative_n = nearest_n.cumsum(0)
        if cumulative_n[-1] > 0:
            chosen.append(int(torch.searchsorted(cumulative_n, draw * cumulative_n[-1], right=True)))
        else:
            chosen.append(int(unused_n.nonzero()[0]))
    return points_nE[chosen]


def lloyd(points_nE: torch.Tensor, centres_CE: torch.Tensor, iterations: int) -> torch.Tensor:
    """Return the nearest centre of every point after at most `iterations` rounds of k-means, int64 [n].

    A cluster without points is moved to the point that is farthest from its centre (several clusters: to the
    farthest points in turn). Ties go to the lower index.
    """
    labels_n = _squared_distances(points_nE, centres_CE).argmin(1)
    for _ in range(iterations):
        counts_C = torch.bincount(labels_n, minlength=len(centres_CE))
        sums_CE = torch.zeros_like(centres_CE).index_add_(0, labels_n, points_nE)
        empty_C = counts_C == 0
        if empty_C.any():
            spread_n = (points_nE - centres_CE[labels_n]).square().sum(1)
            farthest = spread_n.argsort(descending=True, stable=True)[: int(empty_C.sum())]
            sums_CE[empty_C] = points_nE[farthest]
        centres_CE = sums_CE / counts_C.clamp_min(1)[:, None]
        new_n = _squared_distances(points_nE, centres_CE).argmin(1)
        if torch.equal(new_n, labels_n) and not empty_C.any():
            break
        labels_n = new_n
    return labels_n


def fit_clusters(codebook_nE: torch.Tensor, clusters: int, seed: int, iterations: int = 20) -> torch.Tensor:
    """Return the cluster of every code, int64 [n] on the CPU.

    Args:
        codebook_nE: float code vectors, on any device.
        clusters: wanted; n when there are fewer codes.
        seed: of the first centres.
        iterations: most rounds of k-means.

    Returns:
        Labels 0, 1, ... without gaps; fewer than `clusters` when codes coincide.

    Raises:
        ValueError: no codes, or a code that is not finite.
    """
    points_nE = codebook_nE.detach().to("cpu", torch.float64)
    if not len(points_nE) or not points_nE.isfinite().all():
        raise ValueError(
            f"clusters need finite code vectors, got {list(points_nE.shape)} with "
            f"{int((~points_nE.isfinite()).sum())} non-finite values; train the VQVAE again"
        )
    centres_CE = seed_centres(points_nE, min(clusters, len(points_nE)), seed)
    return torch.unique(lloyd(points_nE, centres_CE, iterations), return_inverse=True)[1]
