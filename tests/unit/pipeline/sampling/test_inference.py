"""Models that visit a device are there while they work, and only then."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from cogview2.pipeline.sampling.inference import device_of, inference, let_visit


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Every move makes a copy, as one to another device does; the list holds the addresses of what was moved."""
    found: list[int] = []
    real = torch.Tensor.to

    def copy(tensor: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        if arguments == (torch.device("cpu"),):
            found.append(tensor.data_ptr())
            return tensor.clone()
        return real(tensor, *arguments, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch.Tensor, "to", copy)
    yield found


def _model() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).train()
    model[0].weight.requires_grad_(False)
    return model


def test_a_visitor_works_with_copies_and_comes_home(moved: list[int]) -> None:
    model = _model()
    homes = [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]
    with inference(model):
        assert moved == [] and [p.data_ptr() for p in model.parameters()] == homes[:4]
    let_visit(model, torch.device("cpu"))
    inputs = torch.randn(2, 3)
    expected = model.eval()(inputs)
    model.train()
    for end in (None, KeyError()):
        moved.clear()
        try:
            with inference(model):
                assert sorted(moved) == sorted(homes)
                assert not {p.data_ptr() for p in model.parameters()} & set(homes)
                assert torch.equal(model(inputs), expected) and not model.training
                with inference(model):  # one of its own within
                    assert torch.equal(model(inputs), expected)
                assert torch.equal(model(inputs), expected)
                if end is not None:
                    raise end
        except KeyError:
            assert end is not None
        assert [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())] == homes
        assert model.training and not model[0].weight.requires_grad  # type: ignore[index]


def test_a_visitor_works_on_the_device_that_it_visits() -> None:
    model = _model()
    assert device_of(model) == torch.device("cpu")
    let_visit(model, torch.device("meta"))
    assert device_of(model) == torch.device("meta")
