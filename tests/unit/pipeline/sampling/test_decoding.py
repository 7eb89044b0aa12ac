"""Cluster sampling and top-k: the analytic distribution, and draws against it."""

import json
import math
from pathlib import Path

import pytest
import torch
from cluster_distribution import cluster_distribution
from safetensors.torch import load_file

from cogview2.pipeline.errors import NumericError
from cogview2.pipeline.sampling.decoding import ClusterSampler, draw_top_k
from cogview2.pipeline.sampling.noise import uniforms

FALSE_ALARM = 1e-6
"""Chance that a chi-square test below fails a right implementation; with fixed seeds it cannot flake."""


def _problem() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 30, generator=generator) * 2, torch.randint(0, 7, (30,), generator=generator)


def _chi_square_is_fine(ids: torch.Tensor, probabilities: torch.Tensor) -> bool:
    """Return whether the counts fit, at the false-alarm rate; the bound is Laurent and Massart's."""
    expected = probabilities.double() * len(ids)
    counts = torch.bincount(ids, minlength=len(expected)).double()
    assert counts[expected == 0].sum() == 0, "an id of probability 0 was drawn"
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]])
    used = wanted > 0
    statistic = ((observed - wanted)[used].square() / wanted[used]).sum()
    degrees, x = used.sum() - 1, -torch.tensor(FALSE_ALARM).log()
    return bool(statistic <= degrees + 2 * (degrees * x).sqrt() + 2 * x)


@pytest.mark.parametrize(
    ("t", "k", "t2"), [(1.15, 3, 1.0), (1.0, 2, 0.5), (2.0, 7, 1.3), (1.0, 100, 0.89), (1.0, 100, 0.5)]
)
def test_draws_follow_the_probabilities(t: float, k: int, t2: float) -> None:
    logits, labels = _problem()
    count = 40_000
    sampler = ClusterSampler(labels, temperature=t, top_k_clusters=k, cluster_temperature=t2)
    ids = sampler(logits[:1].expand(count, -1), uniforms(1, 0, "chi", count, 2))
    assert _chi_square_is_fine(ids, cluster_distribution(logits[0], labels, t, k, t2))
    assert not _chi_square_is_fine(ids, cluster_distribution(logits[0], labels, t * 1.1, k, t2))


@pytest.mark.parametrize("seed", range(4))
def test_a_draw_is_the_inverse_of_two_cumulative_distributions(seed: int) -> None:
    """Against sums over all ids in plain Python; labels with gaps and clusters of one id among them."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(20, 30, generator=generator) * 3
    labels = torch.tensor([0, 2, 3, 9, 9, 9])[torch.randint(0, 6, (30,), generator=generator)]
    noise = uniforms(seed, 0, "inverse", 20, 2)
    sampler = ClusterSampler(labels, temperature=1.15, top_k_clusters=2, cluster_temperature=0.9)
    ours = sampler(logits, noise).tolist()

    def inverse(weights: list[float], u: float) -> int:
        total = 0.0
        for index, weight in enumerate(weights):
            total += weight
            if total > u * sum(weights):
                return index
        raise AssertionError("unreachable")

    for row in range(20):
        z = logits[row].tolist()
        masses = [
            sum(math.exp(z[i] / 1.15) for i in range(30) if labels[i] == cluster) for cluster in range(10)
        ]
        kept = sorted(masses, reverse=True)[:2]
        cluster = inverse([mass if mass in kept else 0.0 for mass in masses], float(noise[row, 0]))
        inside = [math.exp(z[i] / 1.15 / 0.9) if labels[i] == cluster else 0.0 for i in range(30)]
        assert ours[row] == inverse(inside, float(noise[row, 1]))


def test_a_row_does_not_depend_on_its_batch() -> None:
    logits, labels = _problem()
    noise = uniforms(1, 0, "rows", 2, 2)
    sampler = ClusterSampler(labels, temperature=1.0, top_k_clusters=4, cluster_temperature=1.0)
    together = sampler(logits, noise)
    alone = [int(sampler(logits[i : i + 1], noise[i : i + 1])) for i in range(2)]
    assert together.tolist() == alone


def test_extreme_uniforms_draw_only_possible_ids() -> None:
    logits = torch.tensor([[0.0, -1e4, 5.0, 5.0, -1e4]])
    labels = torch.tensor([0, 0, 1, 1, 2])
    sampler = ClusterSampler(labels, temperature=1.0, top_k_clusters=3, cluster_temperature=1.0)
    for u in (0.0, 1 - 2**-24):
        assert int(sampler(logits, torch.full((1, 2), u))) in (0, 2, 3)
        assert int(draw_top_k(logits, torch.full((1,), u), 5, 1.0)) in (0, 2, 3)


def test_top_k_draws_follow_the_truncated_softmax() -> None:
    logits, count = _problem()[0][:1], 40_000
    kept = logits[0] >= logits[0].topk(5).values[-1]
    expected = torch.softmax((logits[0] / 1.3).masked_fill(~kept, -torch.inf), 0)
    ids = draw_top_k(logits.expand(count, -1), uniforms(2, 0, "chi", count, 1)[:, 0], 5, 1.3)
    assert _chi_square_is_fine(ids, expected)
    assert set(ids.tolist()) == set(kept.nonzero()[:, 0].tolist())


def test_ties_with_the_kth_logit_stay() -> None:
    logits = torch.tensor([[1.0, 1.0, 1.0, 0.0]]).expand(300, -1)
    assert set(draw_top_k(logits, uniforms(0, 0, "t", 300, 1)[:, 0], 2, 1.0).tolist()) == {0, 1, 2}


def test_refusals() -> None:
    logits, labels = _problem()
    settings = dict(temperature=1.0, top_k_clusters=4, cluster_temperature=1.0)
    with pytest.raises(ValueError, match=r"labels \[29\]"):
        ClusterSampler(labels[1:], **settings)(logits, torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"\[2, 2\], got \[2, 1\]"):
        ClusterSampler(labels, **settings)(logits, torch.zeros(2, 1))
    with pytest.raises(NumericError, match="not finite"):
        ClusterSampler(labels, **settings)(logits * torch.nan, torch.zeros(2, 2))


@pytest.mark.golden
def test_published_distribution(fixtures: Path) -> None:
    """What the draws above are compared with is the published rule."""
    stored = load_file(fixtures / "golden/sampling_calls.safetensors")
    settings = json.loads((fixtures / "golden/sampling_calls.json").read_text())["cluster_sampling"]
    ours = cluster_distribution(
        stored["cluster_sampling/logits"][0],
        stored["cluster_sampling/cluster_label"],
        settings["temperature"],
        settings["top_k_clusters"],
        settings["in_cluster_temperature"],
    )
    theirs = stored["cluster_sampling/probabilities"]
    assert torch.equal(ours > 0, theirs > 0)
    torch.testing.assert_close(ours.float(), theirs, atol=1e-7, rtol=1e-4)


@pytest.mark.golden
def test_draws_follow_the_published_distribution(fixtures: Path) -> None:
    """10000 draws against the stored analytic distribution, at the false-alarm rate above; a wrong T is noticed."""
    stored = load_file(fixtures / "golden/sampling_calls.safetensors")
    settings = json.loads((fixtures / "golden/sampling_calls.json").read_text())["cluster_sampling"]
    logits = stored["cluster_sampling/logits"].view(1, -1)
    noise = uniforms(3, 0, "golden", 10_000, 2)

    def drawn(factor: float, count: int) -> torch.Tensor:
        sampler = ClusterSampler(
            stored["cluster_sampling/cluster_label"],
            temperature=settings["temperature"] * factor,
            top_k_clusters=settings["top_k_clusters"],
            cluster_temperature=settings["in_cluster_temperature"],
        )
        return torch.cat([sampler(logits.expand(len(part), -1), part) for part in noise[:count].split(500)])

    theirs = stored["cluster_sampling/probabilities"].flatten()
    assert _chi_square_is_fine(drawn(1.0, 10_000), theirs)
    wrong = drawn(2.0, 2000)
    assert theirs[wrong].eq(0).any() or not _chi_square_is_fine(wrong, theirs)
