import pytest
import torch

from cogview2.pipeline.errors import DataError
from cogview2.pipeline.metrics.attribute_classifier import ABSENT, AttributeClassifier, train


def squares(count: int, side: int, seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Pictures of one square: its colour, its place, and a tilt that only some have a label for."""
    generator = torch.Generator().manual_seed(seed)
    colour = torch.randint(0, 3, (count,), generator=generator)
    place = torch.randint(0, 4, (count,), generator=generator)
    noise = torch.randint(0, 40, (count, 3, side, side), generator=generator, dtype=torch.uint8)
    half = side // 2
    for index in range(count):
        top, left = int(place[index]) // 2 * half, int(place[index]) % 2 * half
        noise[index, int(colour[index]), top + 2 : top + half - 2, left + 2 : left + half - 2] += 200
    sometimes = torch.where(place == 3, torch.full_like(place, ABSENT), colour)
    return noise, {"colour": colour, "place": place, "sometimes": sometimes}


@pytest.fixture(scope="module")
def trained() -> AttributeClassifier:
    images, labels = squares(200, 64, 0)
    return train(images, labels, steps=40, batch=32, seed=1)


def test_it_learns(trained: AttributeClassifier) -> None:
    assert trained.classes == {"colour": 3, "place": 4, "sometimes": 3}
    images, labels = squares(100, 64, 9)
    accuracy = trained.accuracy(images, labels)
    assert min(accuracy.values()) > 0.95, accuracy
    untrained = AttributeClassifier(trained.classes, 1).accuracy(images, labels)
    assert max(untrained.values()) < 0.8


def test_larger_pictures_are_judged_too(trained: AttributeClassifier) -> None:
    images, labels = squares(60, 160, 4)
    assert trained.accuracy(images, labels)["place"] > 0.95


def test_equal_seeds_give_equal_weights(trained: AttributeClassifier) -> None:
    images, labels = squares(200, 64, 0)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert train(images, labels, steps=40, batch=32, seed=1).sha256 == trained.sha256
    assert torch.equal(torch.get_rng_state(), state)
    assert train(images, labels, steps=2, batch=32, seed=2).sha256 != trained.sha256


def test_joint_logits_are_sums_of_log_probabilities(trained: AttributeClassifier) -> None:
    images, _ = squares(5, 64, 3)
    features_BD, joint_BK = trained(images)
    assert features_BD.shape == (5, trained.dim) and joint_BK.shape == (5, 3 * 4 * 3)
    torch.testing.assert_close(joint_BK.exp().sum(1), torch.ones(5))
    grid = joint_BK.exp().view(5, 3, 4, 3)
    predicted = trained.predict(images)
    assert torch.equal(grid.sum((2, 3)).argmax(1), predicted["colour"])
    assert torch.equal(grid.sum((1, 3)).argmax(1), predicted["place"])
    assert not trained.comparable and "not comparable" in trained.name


def test_pictures_are_judged_alone(trained: AttributeClassifier) -> None:
    images, _ = squares(8, 64, 3)
    torch.testing.assert_close(trained(images)[0][3:4], trained(images[3:4])[0], rtol=1e-4, atol=1e-5)


def test_wrong_input_is_refused() -> None:
    images, labels = squares(6, 64, 0)
    with pytest.raises(DataError, match="must be in \\[0, 2\\)"):
        train(images, {"colour": labels["place"] * 0 + 3}, steps=1, batch=2, seed=0, classes={"colour": 2})
    with pytest.raises(DataError, match="must be integers"):
        train(images, {"colour": torch.zeros(5, dtype=torch.long)}, steps=1, batch=2, seed=0)
    with pytest.raises(DataError, match="no pictures"):
        train(images[:0], labels, steps=1, batch=2, seed=0)
    with pytest.raises(DataError, match="uint8"):
        train(images.float(), labels, steps=1, batch=2, seed=0)
    with pytest.raises(DataError, match="combinations"):
        AttributeClassifier({"a": 2000, "b": 2000}, 0)
    with pytest.raises(DataError, match="attributes"):
        AttributeClassifier({}, 0)
