"""The latents that codes may move to: which ones, how many, and that ranks and micro batches do not matter."""

import pytest
import torch
import torch.distributed as dist

from cogview2.pipeline.training.train_modules.code_candidates import CodeCandidates

RATES = (4, 8, 16)
SIDE, LATENTS = 32, 64 + 16 + 4
SAMPLES = 8


def _latents(first: int, count: int, rates: tuple[int, ...] = RATES) -> torch.Tensor:
    """Return latents that name themselves, [M, 3]: sample, rate, place in the sample; as the network orders them."""
    parts = []
    for rate in rates:
        cells = (SIDE // rate) ** 2
        samples = torch.arange(first, first + count).repeat_interleave(cells)
        parts.append(
            torch.stack([samples, torch.full_like(samples, rate), torch.arange(cells).repeat(count)], 1)
        )
    return torch.cat(parts).float()


def _pixels(count: int) -> torch.Tensor:
    return torch.zeros(count, 3, SIDE, SIDE)


def _table(
    wanted: int, monkeypatch: pytest.MonkeyPatch, *, ranks: int = 1, micro: int = SAMPLES, step: int = 3
) -> torch.Tensor:
    """Return what rank 0 would get; the ranks run one after the other."""
    monkeypatch.setattr(dist, "is_initialized", lambda: ranks > 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
    rows = []
    for rank in range(ranks):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        share = SAMPLES // ranks
        sizes = [micro] * (share // micro)
        candidates = CodeCandidates(wanted, [{"pixels": _pixels(size)} for size in sizes], seed=5, step=step)
        for number, size in enumerate(sizes):
            candidates.add(_latents(rank * share + number * micro, size), _pixels(size), RATES)
        rows += candidates._kept
    return torch.cat(rows)


@pytest.mark.parametrize(("ranks", "micro"), [(1, 4), (1, 1), (2, 4), (2, 2), (4, 1), (8, 1)])
@pytest.mark.parametrize("wanted", [1, 20, 100, 10**6])
def test_every_cut_gives_the_same_table(
    monkeypatch: pytest.MonkeyPatch, ranks: int, micro: int, wanted: int
) -> None:
    whole = _table(wanted, monkeypatch)
    assert torch.equal(_table(wanted, monkeypatch, ranks=ranks, micro=micro), whole)


@pytest.mark.parametrize("wanted", [1, 20, SAMPLES * LATENTS - 1, SAMPLES * LATENTS, 10**6])
def test_every_sample_gives_as_many_none_twice(monkeypatch: pytest.MonkeyPatch, wanted: int) -> None:
    table = _table(wanted, monkeypatch)
    assert min(wanted, SAMPLES * LATENTS) <= len(table) < wanted + SAMPLES
    assert torch.equal(table[:, 0].long().bincount(), torch.full((SAMPLES,), len(table) // SAMPLES))
    assert len(table.unique(dim=0)) == len(table)


def test_draws_differ_by_sample_and_step_and_reach_every_latent(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [_table(80, monkeypatch, step=step) for step in range(60)]
    assert not torch.equal(steps[0], steps[1])
    places = steps[0][:, 1:].reshape(SAMPLES, -1)
    assert len(places.unique(dim=0)) == SAMPLES
    assert len(torch.cat(steps).unique(dim=0)) == SAMPLES * LATENTS


def test_one_rate_alone_and_half_precision() -> None:
    pixels = _pixels(2)
    candidates = CodeCandidates(2 * 10, [{"pixels": pixels}], seed=0, step=0)
    candidates.add(_latents(0, 2, (8,)).bfloat16().requires_grad_(), pixels, (8,))
    table = candidates.on_first()
    assert table is not None and table.dtype == torch.float32 and not table.requires_grad
    assert table.shape == (20, 3) and set(table[:, 1].tolist()) == {8.0}
    assert table[:, 0].tolist() == [0.0] * 10 + [1.0] * 10
