"""Our fp16 section, as DeepSpeed reads it and as its loss scaler then behaves."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.fp16 import loss_scaler

from cogview2.pipeline.config.deepspeed import resolve
from cogview2.pipeline.config.training import TrainConfig


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda group=None: 0)


def scaler(tmp_path: Path, **fp16: Any) -> loss_scaler.DynamicLossScaler:
    path = tmp_path / "fp16.json"
    content = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}, "fp16": fp16}
    path.write_text(json.dumps(content))
    config = resolve(str(path), TrainConfig(steps=1, global_batch=1, deepspeed=str(path)), 1)
    read = DeepSpeedConfig(config)
    assert read.float16_config.enabled
    made = loss_scaler.CreateLossScaler(
        dtype=torch.half,
        static_loss_scale=read.float16_config.loss_scale,
        dynamic_scaling=read.float16_config.loss_scale == 0,
        dynamic_loss_args=read.float16_config.dynamic_loss_scale_args(),
    )
    assert isinstance(made, loss_scaler.DynamicLossScaler)
    return made


def scales(made: loss_scaler.DynamicLossScaler, overflows: str) -> list[float]:
    """Return the scale after each step; `x` overflows, `.` does not."""
    found = []
    for step in overflows:
        made.update_scale(step == "x")
        found.append(made.loss_scale)
    return found


def test_the_defaults(tmp_path: Path) -> None:
    made = scaler(tmp_path)
    assert made.loss_scale == 2.0**16
    assert (made.scale_window, made.delayed_shift, made.min_scale) == (1000, 2, 1)


def test_an_overflow_is_forgiven_before_the_scale_is_halved(tmp_path: Path) -> None:
    assert scales(scaler(tmp_path, initial_scale_power=4, hysteresis=2), "xxx") == [16, 8, 4]
    assert scales(scaler(tmp_path, initial_scale_power=4, hysteresis=1), "x.x") == [8, 8, 4]


def test_the_scale_doubles_after_a_window_without_overflow(tmp_path: Path) -> None:
    made = scaler(tmp_path, initial_scale_power=4, hysteresis=1, loss_scale_window=3)
    assert scales(made, "x...." + "...") == [8, 8, 8, 8, 16, 16, 16, 32]


def test_the_least_scale_is_kept_once_and_then_ends_training(tmp_path: Path) -> None:
    made = scaler(tmp_path, initial_scale_power=2, hysteresis=1, min_loss_scale=2)
    assert scales(made, "x") == [2]
    # The words by which training/engine.py knows it.
    with pytest.raises(Exception, match="loss scale already at minimum"):
        made.update_scale(True)
