"""The distribution of cluster sampling, written out cluster by cluster: what draws are compared with."""

import torch


def cluster_distribution(
    logits_V: torch.Tensor, labels_V: torch.Tensor, temperature: float, kept: int, cluster_temperature: float
) -> torch.Tensor:
    """Return the chance of every id, float64 [V] (spec 3.3).

    Args:
        logits_V: float.
        labels_V: int64, the cluster of every id.
        temperature: of the choice among clusters.
        kept: so many clusters of the largest mass can be drawn.
        cluster_temperature: divides the logits once more inside a cluster.
    """
    z_V = logits_V.double() / temperature
    members = [(labels_V == cluster).nonzero()[:, 0] for cluster in labels_V.unique().tolist()]
    masses = torch.stack([z_V.softmax(0)[ids].sum() for ids in members])
    chances_V = torch.zeros_like(z_V)
    for number in masses.argsort(descending=True)[:kept].tolist():
        ids = members[number]
        chances_V[ids] = masses[number] * (z_V[ids] / cluster_temperature).softmax(0)
    return chances_V / chances_V.sum()
