import pytest
import torch

from cogview2.pipeline.errors import DataError
from cogview2.pipeline.metrics.feature_network import build_feature_network
from cogview2.pipeline.metrics.small_features import RandomConvFeatures
from cogview2.pipeline.metrics.statistics import FeatureStatistics


def pictures(batch: int = 3, side: int = 48) -> torch.Tensor:
    return torch.randint(
        0, 256, (batch, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(2)
    )


def test_the_fallback_is_named_and_not_comparable() -> None:
    network = build_feature_network(None)
    assert network.name == "random-conv-64 (seed 0), not comparable to papers"
    assert not network.comparable and network.dim == 64
    assert network.sha256 == "65b5f9c411dcb377a0211080eb0a00624d77ecbe15c6476b77ee845c7b03bfd5"


@pytest.mark.parametrize("side", [1, 16, 48, 200])
def test_features(side: int) -> None:
    network = RandomConvFeatures(1)
    features_BD, logits = network(pictures(side=side))
    assert features_BD.shape == (3, 64) and features_BD.dtype == torch.float32 and logits is None
    torch.testing.assert_close(network(pictures(side=side)[1:2])[0], features_BD[1:2])
    assert torch.equal(RandomConvFeatures(1)(pictures(side=side))[0], features_BD)


def test_another_seed_is_another_network() -> None:
    first, second = RandomConvFeatures(0), RandomConvFeatures(1)
    assert first.sha256 != second.sha256 and first.name != second.name
    assert not torch.allclose(first(pictures())[0], second(pictures())[0])


def test_features_tell_pictures_apart_in_many_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    flat = torch.randint(0, 256, (200, 3, 4, 4), dtype=torch.uint8, generator=generator)
    blocks = flat.repeat_interleave(16, 2).repeat_interleave(16, 3)
    _, cov = FeatureStatistics(64).update(RandomConvFeatures()(blocks)[0]).mean_cov()
    values = torch.linalg.eigvalsh(torch.from_numpy(cov))
    assert values[0] > 0 and (values > 1e-6 * values[-1]).sum() > 40


def test_wrong_pictures_are_refused() -> None:
    with pytest.raises(DataError, match="uint8"):
        RandomConvFeatures()(torch.zeros(1, 3, 8, 8))
    with pytest.raises(DataError, match=r"\(1, 1, 8, 8\)"):
        RandomConvFeatures()(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
