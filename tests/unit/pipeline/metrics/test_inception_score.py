import math

import numpy as np
import pytest
import torch
from torchmetrics.image.inception import InceptionScore

from cogview2.pipeline.errors import DataError
from cogview2.pipeline.metrics.inception_score import inception_score


class Identity(torch.nn.Module):
    """A feature extractor whose input is the logits."""

    def forward(self, logits_BK: torch.Tensor) -> torch.Tensor:
        return logits_BK


@pytest.mark.parametrize("splits", [1, 4, 10])
def test_against_torchmetrics(splits: int) -> None:
    logits_NK = torch.randn(120, 9, generator=torch.Generator().manual_seed(1)) * 3
    oracle = InceptionScore(feature=Identity(), splits=splits)
    oracle.update(logits_NK)
    torch.manual_seed(7)
    expected = oracle.compute()
    # torchmetrics shuffles before it splits; the same draw gives the same parts.
    torch.manual_seed(7)
    score, spread = inception_score(logits_NK[torch.randperm(120)], splits)
    assert score == pytest.approx(float(expected[0]), rel=1e-5)
    if splits > 1:
        unbiased = spread * math.sqrt(splits / (splits - 1))
        assert unbiased == pytest.approx(float(expected[1]), rel=1e-3)


def test_bounds() -> None:
    sure_NK = torch.eye(8).repeat(5, 1) * 1e4
    assert inception_score(sure_NK, 1)[0] == pytest.approx(8)
    assert inception_score(sure_NK, 5) == (pytest.approx(8), pytest.approx(0, abs=1e-9))
    assert inception_score(torch.zeros(10, 8), 2)[0] == pytest.approx(1)
    assert inception_score(sure_NK[:1].repeat(4, 1), 1)[0] == pytest.approx(1)


def test_by_hand() -> None:
    p = np.array([[0.8, 0.2], [0.3, 0.7]])
    marginal = p.mean(0)
    expected = math.exp((p * np.log(p / marginal)).sum(1).mean())
    assert inception_score(torch.from_numpy(np.log(p)), 1)[0] == pytest.approx(expected, rel=1e-12)


def test_wrong_input_is_refused() -> None:
    with pytest.raises(DataError, match="11 parts"):
        inception_score(torch.zeros(10, 3), 11)
    with pytest.raises(DataError, match="not finite"):
        inception_score(torch.full((3, 3), torch.nan), 1)
