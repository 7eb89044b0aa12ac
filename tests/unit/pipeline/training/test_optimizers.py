import copy

import pytest
import torch
from torch import nn

from cogview2.pipeline.config.deepspeed import resolve
from cogview2.pipeline.config.training import OptimizerConfig, TrainConfig
from cogview2.pipeline.errors import ConfigError
from cogview2.pipeline.training.optimizers import build_optimizer

MUON = OptimizerConfig(kind="muon", learning_rate=0.01, weight_decay=0.1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 9)
        self.inner = nn.Linear(9, 8)
        self.kernel = nn.Conv2d(1, 8, 3)
        self.thin = nn.Conv2d(8, 3, 1)

    def forward(self) -> torch.Tensor:
        picture = self.inner(self.words.weight)[None, None]
        return self.thin(self.kernel(picture).relu()).square().sum()


def steps(net: Net, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        net().backward()
        optimizer.step()


def build(net: Net) -> torch.optim.Optimizer:
    optimizer = build_optimizer(net, MUON)
    assert optimizer is not None
    return optimizer


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def test_matrices_follow_muon_and_the_rest_adamw(net: Net) -> None:
    other = copy.deepcopy(net)
    steps(net, build(net), 3)
    kernel = nn.Parameter(other.kernel.weight.data.view(8, 9))
    muon = torch.optim.Muon(
        [other.inner.weight, kernel], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    adamw = [
        torch.optim.AdamW(parameters, lr=0.01, betas=(0.9, 0.95), weight_decay=decay)
        for parameters, decay in (
            ([other.thin.weight], 0.1),
            ([other.words.weight, other.inner.bias, other.kernel.bias, other.thin.bias], 0.0),
        )
    ]
    for _ in range(3):
        other.zero_grad()
        other().backward()
        kernel.grad = other.kernel.weight.grad.view(8, 9)  # type: ignore[union-attr]
        for part in (muon, *adamw):
            part.step()
    for (name, ours), theirs in zip(net.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


def test_muon_needs_no_weight_decay(net: Net) -> None:
    optimizer = build_optimizer(net, MUON.model_copy(update={"weight_decay": 0.0}))
    assert optimizer is not None
    steps(net, optimizer, 1)
    assert (
        set(optimizer.state[net.inner.weight])
        == set(optimizer.state[net.kernel.weight])
        == {"momentum_buffer"}
    )
    assert "exp_avg" in optimizer.state[net.words.weight] and "exp_avg" in optimizer.state[net.thin.weight]


def test_weights_that_moved_to_another_storage_are_found(net: Net) -> None:
    moved = copy.deepcopy(net)
    optimizer, other = build(net), build(moved)
    for parameter in moved.parameters():
        parameter.data = parameter.data.clone()
    steps(net, optimizer, 2)
    steps(moved, other, 2)
    for ours, theirs in zip(net.parameters(), moved.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_loaded_state_continues_exactly(net: Net) -> None:
    optimizer = build(net)
    steps(net, optimizer, 2)
    resumed = copy.deepcopy(net)
    fresh = build(resumed)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group in [*optimizer.param_groups, *fresh.param_groups]:
        group["lr"] = 0.002
    steps(net, optimizer, 2)
    steps(resumed, fresh, 2)
    for ours, theirs in zip(net.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_learning_rate_of_the_groups_counts(net: Net) -> None:
    optimizer = build(net)
    before = copy.deepcopy(net.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    steps(net, optimizer, 1)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_adamw_is_left_to_deepspeed(net: Net) -> None:
    assert build_optimizer(net, OptimizerConfig()) is None


@pytest.mark.parametrize(("json", "pipe"), [("debug", 1), ("coglm_tiny_pp", 2)])
def test_muon_refuses_partitioned_matrices(json: str, pipe: int) -> None:
    train = TrainConfig(steps=1, global_batch=16, deepspeed=json, optimizer=MUON, pipeline_parallel=pipe)
    with pytest.raises(ConfigError, match="needs whole matrices"):
        resolve(json, train, 2)
