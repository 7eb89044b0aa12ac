"""Uniform numbers keyed by seed, image and pass."""

import torch

from cogview2.pipeline.sampling.noise import batch_uniforms, uniforms


def test_pinned_values() -> None:
    """These numbers must never change: they decide what a seed draws."""
    assert (uniforms(7, 3, "base", 2, 2) * 2**24).long().tolist() == [[2401708, 1795103], [12231239, 6808933]]


def test_every_part_of_the_key_counts() -> None:
    draws = [
        uniforms(*key, 8, 2) for key in [(1, 2, "a"), (2, 2, "a"), (1, 3, "a"), (1, 2, "b"), (12, 2, "a")]
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])


def test_range_and_mean() -> None:
    values = uniforms(0, 0, "x", 100_000, 1)
    assert values.dtype == torch.float32 and values.min() >= 0 and values.max() < 1
    assert abs(values.mean().item() - 0.5) < 0.005  # 5 standard errors


def test_a_longer_draw_continues_a_shorter_one_and_batches_stack() -> None:
    assert torch.equal(uniforms(1, 2, "a", 9, 2)[:4], uniforms(1, 2, "a", 4, 2))
    assert torch.equal(batch_uniforms(1, [5, 2], "a", 4, 2)[1], uniforms(1, 2, "a", 4, 2))
