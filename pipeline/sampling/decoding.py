"""From logits and given uniform numbers to ids: cluster sampling and top-k, pure (spec 3.3, 5.2).

Dims: B independent rows, V ids, C clusters. A draw is the inverse of a cumulative distribution at a uniform
number that the caller gives, so what is drawn for a row never depends on the other rows of its batch. The
distributions are kept in float64: another order of summation then practically never changes a draw.
"""

import torch

from cogview2.pipeline.errors import NumericError


def _cluster_masses(logits_BV: torch.Tensor, labels_V: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the probability of every cluster, float64 [B, C]."""
    probabilities_BV = torch.softmax(logits_BV.double() / temperature, dim=-1)
    clusters = int(labels_V.max()) + 1
    masses_BC = probabilities_BV.new_zeros(len(logits_BV), clusters)
    return masses_BC.scatter_add_(1, labels_V.expand_as(probabilities_BV), probabilities_BV)


def _keep_largest(masses_BC: torch.Tensor, count: int) -> torch.Tensor:
    """Return `masses_BC` with all but the `count` largest of each row set to 0, not renormalised."""
    if count >= masses_BC.shape[1]:
        return masses_BC
    values, indices = masses_BC.topk(count, dim=1)
    return torch.zeros_like(masses_BC).scatter_(1, indices, values)


def _inverse_cdf(weights_BV: torch.Tensor, uniforms_B: torch.Tensor) -> torch.Tensor:
    """Return the index drawn from each row of non-negative weights; an index of weight 0 is never drawn."""
    cumulative_BV = weights_BV.double().cumsum(dim=1)
    if not cumulative_BV[:, -1].isfinite().all():
        raise NumericError(
            "the model's logits are not finite, so nothing can be drawn; take weights of an earlier step"
        )
    thresholds_B = uniforms_B.double() * cumulative_BV[:, -1]
    return torch.searchsorted(cumulative_BV, thresholds_B[:, None], right=True)[:, 0]


def _check_labels(logits_BV: torch.Tensor, labels_V: torch.Tensor) -> None:
    if logits_BV.ndim != 2 or labels_V.shape != logits_BV.shape[1:]:
        raise ValueError(
            f"cluster sampling needs one label for each of the ids, got logits {list(logits_BV.shape)} and "
            f"labels {list(labels_V.shape)}; fit the clusters on this codebook"
        )


def _check_uniforms(logits_BV: torch.Tensor, uniforms: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(uniforms.shape) != shape:
        raise ValueError(
            f"drawing from logits {list(logits_BV.shape)} needs uniforms of shape {list(shape)}, "
            f"got {list(uniforms.shape)}"
        )


def cluster_probabilities(
    logits_BV: torch.Tensor,
    labels_V: torch.Tensor,
    temperature: float,
    top_k_clusters: int,
    cluster_temperature: float,
) -> torch.Tensor:
    """Return the distribution that cluster sampling draws from, float32 [B, V] (spec 3.3).

    p = softmax(z / T); the k clusters of the largest summed p are kept and renormalised; inside a cluster the
    ids follow softmax(z / T / T2).

    Args:
        logits_BV: float.
        labels_V: int64, the cluster of every id; clusters without an id are never drawn.
        temperature: T.
        top_k_clusters: k; any number from that of the clusters on means all.
        cluster_temperature: T2.
    """
    _check_labels(logits_BV, labels_V)
    masses_BC = _keep_largest(_cluster_masses(logits_BV, labels_V, temperature), top_k_clusters)
    masses_BC = masses_BC / masses_BC.sum(1, keepdim=True)
    scaled_BV = logits_BV.double() / (temperature * cluster_temperature)
    labels_BV = labels_V.expand_as(scaled_BV)
    # The softmax inside a cluster needs the cluster's own maximum: a far one would underflow to 0 / 0.
    peaks_BC = torch.full_like(masses_BC, -torch.inf).scatter_reduce_(1, labels_BV, scaled_BV, "amax")
    weights_BV = torch.exp(scaled_BV - peaks_BC.gather(1, labels_BV))
    totals_BC = torch.zeros_like(masses_BC).scatter_add_(1, labels_BV, weights_BV)
    inside_BV = weights_BV / totals_BC.gather(1, labels_BV)
    return (inside_BV * masses_BC.gather(1, labels_BV)).float()


def draw_cluster(
    logits_BV: torch.Tensor,
    labels_V: torch.Tensor,
    uniforms_B2: torch.Tensor,
    *,
    temperature: float,
    top_k_clusters: int,
    cluster_temperature: float,
) -> torch.Tensor:
    """Draw one id for each row from `cluster_probabilities`, int64 [B] (spec 3.3).

    Args:
        logits_BV, labels_V, temperature, top_k_clusters, cluster_temperature: see `cluster_probabilities`.
        uniforms_B2: in [0, 1); the first column chooses the cluster, the second the id inside it.
    """
    _check_labels(logits_BV, labels_V)
    _check_uniforms(logits_BV, uniforms_B2, (len(logits_BV), 2))
    masses_BC = _keep_largest(_cluster_masses(logits_BV, labels_V, temperature), top_k_clusters)
    cluster_B = _inverse_cdf(masses_BC, uniforms_B2[:, 0])
    scaled_BV = logits_BV.double() / (temperature * cluster_temperature)
    outside_BV = labels_V[None, :] != cluster_B[:, None]
    inside_BV = torch.softmax(scaled_BV.masked_fill(outside_BV, -torch.inf), dim=-1)
    return _inverse_cdf(inside_BV, uniforms_B2[:, 1])


def draw_top_k(logits_BV: torch.Tensor, uniforms_B: torch.Tensor, k: int, temperature: float) -> torch.Tensor:
    """Draw one id for each row from the softmax over the logits not below the k-th largest, int64 [B].

    Args:
        logits_BV: float.
        uniforms_B: in [0, 1).
        k: any number from V on keeps all ids; ids that tie with the k-th stay too (spec 5.2).
        temperature: divides the logits.
    """
    _check_uniforms(logits_BV, uniforms_B, (len(logits_BV),))
    scaled_BV = logits_BV.double() / temperature
    if k < scaled_BV.shape[1]:
        threshold_B1 = scaled_BV.topk(k, dim=1).values[:, -1:]
        scaled_BV = scaled_BV.masked_fill(scaled_BV < threshold_B1, -torch.inf)
    return _inverse_cdf(torch.softmax(scaled_BV, dim=-1), uniforms_B)
