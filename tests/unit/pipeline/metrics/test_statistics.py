import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from cogview2.pipeline.errors import DataError
from cogview2.pipeline.metrics.statistics import FeatureStatistics


def features(count: int = 90, dim: int = 7) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(5)) * 3 + 100


def test_mean_and_covariance_are_numpys() -> None:
    all_ND = features()
    mean, cov = FeatureStatistics(7).update(all_ND).mean_cov()
    assert mean.dtype == cov.dtype == np.float64
    np.testing.assert_allclose(mean, all_ND.double().mean(0).numpy(), rtol=1e-13)
    np.testing.assert_allclose(cov, np.cov(all_ND.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sizes", [(90,), (1, 89), (30, 30, 30), (45, 0, 45)])
def test_parts_add_up_to_the_whole(sizes: tuple[int, ...]) -> None:
    parts = FeatureStatistics(7)
    for part_BD in features().split(sizes):
        parts.update(part_BD)
    whole = FeatureStatistics(7).update(features())
    assert parts.count == whole.count == 90
    for ours, expected in zip(parts.mean_cov(), whole.mean_cov(), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-9)


def _rank(rank: int, store: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    part_BD = features()[:20] if rank == 0 else features()[20:]
    statistics = FeatureStatistics(7).update(part_BD).all_reduce()
    torch.save((statistics.count, statistics.total, statistics.outer), f"{results}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.distributed
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_rank, args=(rank, str(tmp_path / "store"), str(tmp_path))) for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    expected = FeatureStatistics(7).update(features())
    for rank in (0, 1):
        count, total, outer = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert count == 90
        torch.testing.assert_close(total, expected.total, rtol=1e-13, atol=0)
        torch.testing.assert_close(outer, expected.outer, rtol=1e-13, atol=0)


def test_without_processes_all_reduce_changes_nothing() -> None:
    statistics = FeatureStatistics(7).update(features())
    before = statistics.total.clone()
    assert statistics.all_reduce() is statistics
    assert torch.equal(statistics.total, before) and statistics.count == 90


def test_wrong_features_are_refused() -> None:
    statistics = FeatureStatistics(7)
    with pytest.raises(DataError, match="do not fit"):
        statistics.update(torch.zeros(3, 6))
    with pytest.raises(DataError, match="not finite"):
        statistics.update(torch.full((2, 7), torch.inf))
    with pytest.raises(DataError, match="not 1"):
        statistics.update(torch.zeros(1, 7)).mean_cov()
