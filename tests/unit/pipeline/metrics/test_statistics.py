import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from cogview2.pipeline.errors import DataError
from cogview2.pipeline.metrics.statistics import FeatureStatistics, load_statistics, save_statistics


def features(count: int = 90, dim: int = 7) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(5)) * 3 + 100


def test_mean_and_covariance_are_numpys() -> None:
    all_ND = features()
    mean, cov = FeatureStatistics(7).update(all_ND).mean_cov()
    assert mean.dtype == cov.dtype == np.float64
    np.testing.assert_allclose(mean, all_ND.double().mean(0).numpy(), rtol=1e-13)
    np.testing.assert_allclose(cov, np.cov(all_ND.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sizes", [(90,), (1, 89), (30, 30, 30), (45, 0, 45)])
def test_parts_merge_to_the_whole(sizes: tuple[int, ...]) -> None:
    merged = FeatureStatistics(7)
    for part_BD in features().split(sizes):
        merged.merge(FeatureStatistics(7).update(part_BD))
    whole = FeatureStatistics(7).update(features())
    assert merged.count == whole.count == 90
    for ours, expected in zip(merged.mean_cov(), whole.mean_cov(), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-9)


def _rank(rank: int, store: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    part_BD = features()[:20] if rank == 0 else features()[20:]
    statistics = FeatureStatistics(7).update(part_BD).all_reduce()
    np.savez(f"{results}/{rank}.npz", **statistics.to_arrays())
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
        with np.load(tmp_path / f"{rank}.npz") as arrays:
            reduced = FeatureStatistics.from_arrays(dict(arrays))
        assert reduced.count == 90
        torch.testing.assert_close(reduced.total, expected.total, rtol=1e-13, atol=0)
        torch.testing.assert_close(reduced.outer, expected.outer, rtol=1e-13, atol=0)


def test_without_processes_all_reduce_changes_nothing() -> None:
    statistics = FeatureStatistics(7).update(features())
    before = statistics.total.clone()
    assert statistics.all_reduce() is statistics
    assert torch.equal(statistics.total, before) and statistics.count == 90


def test_sums_round_trip_exactly() -> None:
    statistics = FeatureStatistics(7).update(features(31))
    again = FeatureStatistics.from_arrays(statistics.to_arrays())
    assert again.count == 31 and torch.equal(again.outer, statistics.outer)
    again.update(features(5))
    assert statistics.count == 31


def test_file_round_trip_with_the_names_of_pytorch_fid(tmp_path: Path) -> None:
    statistics = FeatureStatistics(7).update(features())
    path = tmp_path / "reference.npz"
    save_statistics(path, statistics, "network", "abc")
    first = path.read_bytes()
    save_statistics(path, statistics, "network", "abc")
    assert path.read_bytes() == first
    with np.load(path) as file:
        np.testing.assert_array_equal(file["mu"], statistics.mean_cov()[0])
        np.testing.assert_array_equal(file["sigma"], statistics.mean_cov()[1])
    loaded = load_statistics(path)
    assert (loaded.count, loaded.network, loaded.network_sha256) == (90, "network", "abc")


def test_a_file_of_another_tool_has_no_count(tmp_path: Path) -> None:
    np.savez(tmp_path / "coco.npz", mu=np.zeros(4, np.float32), sigma=np.eye(4, dtype=np.float32))
    loaded = load_statistics(tmp_path / "coco.npz")
    assert loaded.count is None and loaded.network is None and loaded.cov.dtype == np.float64


def test_bad_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    with pytest.raises(DataError, match="is not an .npz"):
        load_statistics(path)
    for content in (b"", b"PK\x03\x04junk", b"\x93NUMPY", b"text"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="is not an .npz"):
            load_statistics(path)
    np.savez(path, mu=np.zeros(3))
    with pytest.raises(DataError, match="is not an .npz"):
        load_statistics(path)
    np.savez(path, mu=np.array([print], dtype=object), sigma=np.eye(1))
    with pytest.raises(DataError, match="is not an .npz"):
        load_statistics(path)
    np.savez(path, mu=np.zeros(3), sigma=np.eye(2))
    with pytest.raises(DataError, match="must be"):
        load_statistics(path)


def test_wrong_features_are_refused() -> None:
    statistics = FeatureStatistics(7)
    with pytest.raises(DataError, match="do not fit"):
        statistics.update(torch.zeros(3, 6))
    with pytest.raises(DataError, match="not finite"):
        statistics.update(torch.full((2, 7), torch.inf))
    with pytest.raises(DataError, match="not 1"):
        statistics.update(torch.zeros(1, 7)).mean_cov()
    with pytest.raises(DataError, match="do not merge"):
        statistics.merge(FeatureStatistics(6))
