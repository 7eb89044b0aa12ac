"""From logits and given uniform numbers to ids: cluster sampling and top-k, pure (spec 3.3, 5.2).

Dims: B independent rows, V ids, C clusters, W ids of the largest cluster. A draw is the inverse of a cumulative
distribution at a uniform number that the caller gives, so what is drawn for a row never depends on the other rows of
its batch. Weights are taken in the float32 of the logits, all sums of them in float64: another order of summation
then practically never changes a draw.
"""

import torch

from cogview2.pipeline.errors import NumericError


def _weights(logits_BV: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return exp((z - max z) / T), float64 [B, V], the exponential taken in the precision of the logits."""
    return logits_BV.sub(logits_BV.amax(1, keepdim=True)).div_(temperature).exp_().double()


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


class ClusterSampler:
    """Cluster sampling (spec 3.3) of many logits with the same labels: what the labels decide is prepared once.

    p = softmax(z / T); the k clusters of the largest summed p are kept and renormalised; inside a cluster the
    ids follow softmax(z / T / T2).
    """

    def __init__(
        self, labels_V: torch.Tensor, *, temperature: float, top_k_clusters: int, cluster_temperature: float
    ) -> None:
        """Sort the ids by cluster.

        Args:
            labels_V: int64 on the device of the logits to come, the cluster of every id; clusters without an id
                are never drawn.
            temperature: T.
            top_k_clusters: k; any number from that of the clusters on means all.
            cluster_temperature: T2.
        """
        self._labels_V, self._top_k = labels_V, top_k_clusters
        self._temperature, self._cluster_temperature = temperature, cluster_temperature
        self._order_V = labels_V.argsort(stable=True)
        self._sizes_C = torch.bincount(labels_V)
        self._starts_C = self._sizes_C.cumsum(0) - self._sizes_C
        self._places_W = torch.arange(int(self._sizes_C.max()), device=labels_V.device)

    def __call__(self, logits_BV: torch.Tensor, uniforms_B2: torch.Tensor) -> torch.Tensor:
        """Draw one id for each row, int64 [B].

        Args:
            logits_BV: float.
            uniforms_B2: in [0, 1); the first column chooses the cluster, the second the id inside it.

        Raises:
            NumericError: logits that are not finite.
            ValueError: not one label for each id, or not two uniforms for each row.
        """
        _check_labels(logits_BV, self._labels_V)
        _check_uniforms(logits_BV, uniforms_B2, (len(logits_BV), 2))
        weights_BV = _weights(logits_BV, self._temperature)
        masses_BC = weights_BV.new_zeros(len(logits_BV), len(self._sizes_C))
        masses_BC.scatter_add_(1, self._labels_V.expand_as(weights_BV), weights_BV)
        cluster_B = _inverse_cdf(_keep_largest(masses_BC, self._top_k), uniforms_B2[:, 0])
        # Only the drawn cluster's ids from here on: a few of 20000. Slots past its end weigh nothing.
        ids_BW = self._order_V[
            (self._starts_C[cluster_B][:, None] + self._places_W).clamp_max(len(self._labels_V) - 1)
        ]
        outside_BW = self._places_W >= self._sizes_C[cluster_B][:, None]
        inside_BW = logits_BV.gather(1, ids_BW).double() / (self._temperature * self._cluster_temperature)
        chances_BW = torch.softmax(inside_BW.masked_fill_(outside_BW, -torch.inf), dim=-1)
        return ids_BW.gather(1, _inverse_cdf(chances_BW, uniforms_B2[:, 1])[:, None])[:, 0]


def draw_top_k(logits_BV: torch.Tensor, uniforms_B: torch.Tensor, k: int, temperature: float) -> torch.Tensor:
    """Draw one id for each row from the softmax over the logits not below the k-th largest, int64 [B].

    Args:
        logits_BV: float.
        uniforms_B: in [0, 1).
        k: any number from V on keeps all ids; ids that tie with the k-th stay too (spec 5.2).
        temperature: divides the logits.
    """
    _check_uniforms(logits_BV, uniforms_B, (len(logits_BV),))
    weights_BV = _weights(logits_BV, temperature)
    if k < logits_BV.shape[1]:
        threshold_B1 = logits_BV.topk(k, dim=1).values[:, -1:]
        weights_BV = weights_BV.masked_fill_(logits_BV < threshold_B1, 0)
    return _inverse_cdf(weights_BV, uniforms_B)
