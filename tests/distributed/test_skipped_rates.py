"""What a step does not train stays as it is, momentum or not: through the real engine, on two ranks."""

from pathlib import Path

import pytest
import torch
from tiny_runs import metrics, new_run, run_stage

from cogview2.pipeline.weights.files import load_weights

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_rates_left_out_of_a_step_do_not_move(tmp_path: Path) -> None:
    states = []
    for steps in (1, 5):
        run = new_run(
            tmp_path / str(steps),
            f"vqvae.train.steps={steps}",
            "vqvae.other_rates_every=100",
            "vqvae.train.optimizer.warmup_steps=0",
            "vqvae.train.optimizer.schedule=constant",
        )
        run_stage(run, "train_vqvae", 2)
        states.append(load_weights(run.stage("train_vqvae").output / "weights.safetensors"))
        assert all("grad_norm" in line for line in metrics(run, "train_vqvae"))
    first, last = states
    others = ("decs.0.", "decs.1.", "down_samplers.")
    assert all(torch.equal(last[name], first[name]) for name in first if name.startswith(others))
    moved = [name for name in first if name.startswith(("decs.2.", "enc."))]
    assert moved and all(
        not torch.equal(last[name], first[name]) for name in moved if name.endswith("weight")
    )
