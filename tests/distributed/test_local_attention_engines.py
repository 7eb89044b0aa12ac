"""Two gloo ranks: a network with local attention trains under ZeRO and as a pipeline as it does alone."""

import deepspeed
import deepspeed.comm
import numpy as np
import pytest
import torch
from deepspeed.pipe import PipelineModule
from forked_ranks import run_ranks
from torch import nn
from torch.utils.checkpoint import checkpoint

from cogview2.ops.local_attention import local_attention_2d

pytestmark = pytest.mark.distributed
WORLD, STEPS, ROWS, WIDTH, HEADS, CHANNELS = 2, 3, 6, 8, 2, 8
HIDDEN = HEADS * CHANNELS


class Layer(nn.Module):
    """x + out(local attention of the window and of every second cell)."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.checkpointed = checkpointed

    def _attend(self, x_BYXD: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x_BYXD).unflatten(-1, (3, HEADS, CHANNELS)).unbind(3)
        cells = local_attention_2d(
            *(q, k, v, (5, 3)),
            cross_key=k[:, ::2, ::2],
            cross_value=v[:, ::2, ::2],
            cross_kernel_size=(3, 3),
            additional_keys=k[:, 0],
            additional_values=v[:, 0],
            backend="cpu",
        )
        return x_BYXD + self.out(cells.flatten(3))

    def forward(self, x_BYXD: torch.Tensor) -> torch.Tensor:
        return (
            checkpoint(self._attend, x_BYXD, use_reentrant=False)
            if self.checkpointed
            else self._attend(x_BYXD)
        )


def _layers() -> list[Layer]:
    torch.manual_seed(0)
    return [Layer(checkpointed=index == 1) for index in range(4)]


def _loss(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (out - target).square().mean()


def _batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(2, 2 * WORLD, ROWS, WIDTH, HIDDEN, generator=generator)
    return x, y.tanh()


def _alone() -> list[float]:
    model = nn.Sequential(*_layers())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        x, y = _batch(step)
        loss = _loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _config(stage: int, accumulation: int) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.0, "torch_adam": True}},
    }


def _under_zero(stage: int, rank: int) -> list[float]:
    model = nn.Sequential(*_layers())
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=list(model.parameters()), config=_config(stage, 1)
    )
    losses = []
    for step in range(STEPS):
        x, y = (part[2 * rank : 2 * rank + 2] for part in _batch(step))
        loss = _loss(engine(x), y)
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        deepspeed.comm.all_reduce(total)
        losses.append(total.item() / WORLD)
    return losses


def _as_pipeline() -> list[float]:
    module = PipelineModule(_layers(), num_stages=WORLD, loss_fn=_loss, activation_checkpoint_interval=0)
    engine, *_ = deepspeed.initialize(
        model=module, model_parameters=list(module.parameters()), config=_config(1, WORLD)
    )
    losses = []
    for step in range(STEPS):
        x, y = _batch(step)
        micro = iter([(x[start : start + 2], y[start : start + 2]) for start in range(0, len(x), 2)])
        losses.append(float(engine.train_batch(data_iter=micro)))
    return losses


def _work(rank: int) -> dict:
    results = {"alone": _alone()} | {f"zero {stage}": _under_zero(stage, rank) for stage in range(4)}
    # Last: it leaves its process groups behind for good.
    return results | {"pipeline": _as_pipeline()}


def test_the_losses_are_those_of_one_process() -> None:
    for answer in run_ranks(_work, WORLD):
        alone = answer.pop("alone")
        assert alone[-1] < alone[0]
        assert sorted(answer) == ["pipeline", "zero 0", "zero 1", "zero 2", "zero 3"]
        for name, losses in answer.items():
            np.testing.assert_allclose(losses, alone, atol=1e-5, rtol=0, err_msg=name)
