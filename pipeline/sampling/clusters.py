"""Clusters of near-equal codes by k-means over the codebook (spec 3.3).

Dims: n codes, C clusters, E code dim. All in float64 on the CPU: a codebook is small, and the result decides
what every later image looks like, so it must not depend on a device.
"""

import torch

from cogview2.pipeline.sampling.noise import uniforms

_ROWS = 1024
"""Points compared with all centres at one time: 1024 x 500 float64 are 4 MB, about what stays in a cache."""
_SAME = 1e-12
"""Squared distance, as a share of the squared lengths, below which points are one: rounding leaves about 1e-15."""


def _nearest(points_nE: torch.Tensor, centres_CE: torch.Tensor) -> torch.Tensor:
    """Return the index of each point's nearest centre, int64 [n]; ties go to the lower index."""
    # |x - c|^2 = |x|^2 + |c|^2 - 2 x c, and |x|^2 is the same for all centres.
    squares_C = centres_CE.square().sum(1)
    columns_EC = centres_CE.T.contiguous()
    parts = [torch.addmm(squares_C, part, columns_EC, alpha=-2).argmin(1) for part in points_nE.split(_ROWS)]
    return torch.cat(parts)


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
    squares_n = points_nE.square().sum(1)
    nearest_n = torch.full((len(points_nE),), torch.inf, dtype=torch.float64)
    unused_n = torch.ones(len(points_nE), dtype=torch.bool)
    for draw in draws[1:]:
        last = chosen[-1]
        unused_n[last] = False
        # One product of a matrix with a vector: the differences themselves would take ten times as long.
        scale_n = squares_n + squares_n[last]
        distance_n = torch.addmv(scale_n, points_nE, points_nE[last], alpha=-2)
        distance_n[distance_n <= _SAME * scale_n] = 0
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
    labels_n = _nearest(points_nE, centres_CE)
    for _ in range(iterations):
        counts_C = torch.bincount(labels_n, minlength=len(centres_CE))
        sums_CE = torch.zeros_like(centres_CE).index_add_(0, labels_n, points_nE)
        empty_C = counts_C == 0
        if empty_C.any():
            spread_n = (points_nE - centres_CE[labels_n]).square().sum(1)
            farthest = spread_n.argsort(descending=True, stable=True)[: int(empty_C.sum())]
            sums_CE[empty_C] = points_nE[farthest]
        centres_CE = sums_CE / counts_C.clamp_min(1)[:, None]
        new_n = _nearest(points_nE, centres_CE)
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
