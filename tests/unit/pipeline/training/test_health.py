import copy
import math
import random

import pytest
import torch
from pydantic import ValidationError

from cogview2.pipeline.config.training import HealthConfig, OptimizerConfig
from cogview2.pipeline.models.coglm import pipe
from cogview2.pipeline.models.coglm.loss import LabelRanges, LossParts
from cogview2.pipeline.models.coglm.pipe import PipeLoss
from cogview2.pipeline.models.not_finite import spoil_gradient
from cogview2.pipeline.training.health import WINDOW, Health, Trouble
from cogview2.pipeline.training.optimizers import build_optimizer, parameter_groups

SEED = 20


def observed(
    health: Health, losses: list[float], *, can_rewind: bool = True, first: int = 0
) -> list[Trouble | None]:
    return [health.observe(first + step, loss, True, can_rewind) for step, loss in enumerate(losses)]


def normal_losses(count: int, seed: int = SEED) -> list[float]:
    rng = random.Random(seed)
    return [rng.gauss(2.0, 0.1) for _ in range(count)]


@pytest.mark.parametrize("policy", ["stop", "skip", "rewind"])
def test_not_finite(policy: str) -> None:
    health = Health(HealthConfig(on_not_finite=policy))  # type: ignore[arg-type]
    for loss in (math.nan, math.inf, -math.inf):
        assert health.observe(11, loss, True, False) == Trouble(f"the loss of step 12 is {loss}", policy)  # type: ignore[arg-type]
    found = health.observe(11, 1.0, False, True)
    assert found == Trouble("the gradients of step 12 are not finite", policy)  # type: ignore[arg-type]
    assert health.state().sum() == 0  # none of them is compared with later losses


def test_a_spike_is_said_once_an_event_with_its_numbers() -> None:
    health = Health(HealthConfig())
    assert observed(health, normal_losses(WINDOW)) == [None] * WINDOW
    said = observed(health, [4.0, 5.0, 2.0, 2.0], first=WINDOW)
    assert said[1:] == [None, None, None] and said[0] is not None and said[0].policy == "log"
    values = torch.tensor(normal_losses(WINDOW)).double()
    mean, sigma = values.mean().item(), values.std(correction=0).item()
    assert said[0].what.startswith(
        f"the loss of step {WINDOW + 1} is 4, {(4 - mean) / sigma:.1f} times sigma "
    )
    assert f"{mean:.6g}" in said[0].what and f"{sigma:.3g}" in said[0].what


def test_ten_thousand_steps_of_a_falling_noisy_loss_have_no_spike() -> None:
    rng = random.Random(SEED)
    losses = [math.exp(-step / 2000) * rng.gauss(5, 0.5) + 1 for step in range(10_000)]
    assert not any(observed(Health(HealthConfig()), losses)), f"seed {SEED}"


def test_nothing_is_a_spike_in_a_short_window_or_without_sigma() -> None:
    assert observed(Health(HealthConfig()), [*normal_losses(WINDOW - 1), 1000.0])[-1] is None
    assert observed(Health(HealthConfig(spike_sigma=0)), [*normal_losses(WINDOW), 1000.0])[-1] is None


def test_a_hair_above_losses_that_never_change_is_none() -> None:
    assert observed(Health(HealthConfig()), [2.0] * WINDOW + [2.001])[-1] is None
    assert observed(Health(HealthConfig()), [2.0] * WINDOW + [2.1])[-1] is not None


def test_a_new_level_is_normal_after_a_while() -> None:
    said = observed(
        Health(HealthConfig()), normal_losses(WINDOW) + [v + 5 for v in normal_losses(2 * WINDOW)]
    )
    assert len([trouble for trouble in said if trouble is not None]) == 1


def test_rewind_needs_a_checkpoint() -> None:
    config = HealthConfig(on_spike="rewind")
    for can_rewind, policy in ((True, "rewind"), (False, "log")):
        said = observed(Health(config), [*normal_losses(WINDOW), 9.0], can_rewind=can_rewind)[-1]
        assert said is not None and said.policy == policy


def test_a_restored_state_judges_by_the_very_same_numbers() -> None:
    losses = normal_losses(WINDOW + 30)
    health, restored = Health(HealthConfig()), Health(HealthConfig())
    observed(health, losses)
    observed(restored, [7.0, 8.0])
    restored.load(health.state())
    assert torch.equal(restored.state(), health.state())
    assert observed(restored, [3.0]) == observed(health, [3.0])
    fresh = Health(HealthConfig())
    observed(fresh, losses[:3])
    restored.load(fresh.state())
    assert restored.state()[1].sum() == 3


def test_config() -> None:
    with pytest.raises(ValidationError, match="on_spike rewind needs a spike_sigma above 0"):
        HealthConfig(on_spike="rewind", spike_sigma=0)


def test_a_loss_that_is_not_finite_spoils_its_gradient_and_no_other() -> None:
    for added, finite in ((0.0, True), (math.inf, False), (math.nan, False)):
        weights = torch.tensor([1.0, -2.0], requires_grad=True)
        loss = weights.abs().sum() + added
        spoil_gradient(loss)
        loss.backward()
        assert weights.grad is not None
        expected = torch.tensor([1.0, -1.0]) if finite else torch.full((2,), torch.nan)
        assert torch.equal(weights.grad.nan_to_num(7), expected.nan_to_num(7))
    spoil_gradient(torch.tensor(math.inf))  # without gradient: nothing to do


def test_the_loss_of_a_pipeline_does_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        pipe,
        "coglm_loss",
        lambda hidden, *_: LossParts(hidden.abs().sum() + math.inf, torch.zeros(3), torch.zeros(3)),
    )
    hidden = torch.ones(1, 2, 3, requires_grad=True)
    empty = torch.zeros(1)
    PipeLoss(LabelRanges((0, 1), (1, 2), (2, 3)))((hidden, empty), (empty, empty, empty)).backward()
    assert hidden.grad is not None and hidden.grad.isnan().all()


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_an_optimizer_without_gradients_changes_nothing(kind: str) -> None:
    module = torch.nn.Linear(16, 16)
    config = OptimizerConfig(kind=kind, weight_decay=0.5)  # type: ignore[arg-type]
    optimizer = build_optimizer(module, config) or torch.optim.AdamW(
        parameter_groups(module, config.weight_decay), fused=True
    )
    for _ in range(2):
        module(torch.ones(2, 16)).sum().backward()
        optimizer.step()
    before = copy.deepcopy([list(module.parameters()), optimizer.state_dict()["state"]])
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()
    torch.testing.assert_close(
        [list(module.parameters()), optimizer.state_dict()["state"]], before, rtol=0, atol=0
    )
