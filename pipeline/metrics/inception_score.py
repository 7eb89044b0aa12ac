"""The inception score: how sure and how varied a classifier's answers are (spec 9)."""

import torch
from torch import Tensor

from cogview2.pipeline.errors import DataError


def inception_score(logits_NK: Tensor, splits: int = 10) -> tuple[float, float]:
    """Return mean and population standard deviation over `splits` of exp(mean KL(p(y|x) || p(y))).

    Args:
        logits_NK: class logits of N pictures, in the order in which they are to be split (shuffle first).
        splits: equal parts; the first N modulo `splits` parts have one picture more.

    Raises:
        DataError: fewer pictures than splits, or logits that are not finite.
    """
    if logits_NK.ndim != 2 or not 1 <= splits <= logits_NK.shape[0]:
        raise DataError(
            f"logits of shape {tuple(logits_NK.shape)} cannot be split into {splits} parts of pictures"
        )
    if not torch.isfinite(logits_NK).all():
        raise DataError(
            "class logits hold numbers that are not finite; look at the pictures and the classifier"
        )
    log_p_NK = torch.log_softmax(logits_NK.detach().to("cpu", torch.float64), dim=1)
    scores = []
    for part_MK in torch.tensor_split(log_p_NK, splits):
        p_MK = part_MK.exp()
        # xlogy: a class that no picture has contributes 0, not NaN.
        marginal_K = p_MK.mean(0)
        entropy_of_marginal = -torch.xlogy(marginal_K, marginal_K).sum()
        mean_entropy = -(p_MK * part_MK).sum(1).mean()
        scores.append(torch.exp(entropy_of_marginal - mean_entropy))
    score = torch.stack(scores)
    return float(score.mean()), float(score.std(unbiased=False))
