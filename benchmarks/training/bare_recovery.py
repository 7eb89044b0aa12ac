"""A job of bare DeepSpeed that bench_recovery.py kills: its own loop, save_checkpoint and load_checkpoint as documented.

Rank 0 says in FOLDER/said.jsonl when it began and how long loading took, in FOLDER/steps.jsonl what it has trained.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.ops
import synthetic
import torch

from cogview2.pipeline.config.model import CogLMConfig, VocabularyConfig
from cogview2.pipeline.training.train_modules.coglm import CogLMTrainModule

KEPT = 2


def say(path: Path, values: dict[str, Any]) -> None:
    """Append a line of JSON by one write."""
    with open(path, "a", buffering=1) as file:
        file.write(json.dumps(values) + "\n")


def main(folder: Path, rank: int, ranks: int, steps: int) -> None:
    """Train on random samples of the size of the quickstart recipe's, a checkpoint after each step."""
    if rank == 0:
        say(folder / "said.jsonl", {"began": True})
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # its build would take a minute
    deepspeed.init_distributed("gloo")
    model = CogLMConfig(
        layers=3,
        hidden=128,
        heads=4,
        dropout=0.0,
        text_length=44,
        image_position=44,
        max_positions=109,
        vocabulary=VocabularyConfig(rows=240),
    )
    module = CogLMTrainModule(model, synthetic.vocabulary(240))
    config = {
        "train_micro_batch_size_per_gpu": 8 // ranks,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }
    engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)
    begin = time.monotonic()
    engine.load_checkpoint(str(folder / "checkpoints"))
    if rank == 0:
        say(folder / "said.jsonl", {"restored": time.monotonic() - begin})
    batch = synthetic.samples(model, 240, 8 // ranks, rank, torch.device("cpu"))
    while engine.global_steps < steps:
        loss = engine(batch).loss
        engine.backward(loss)
        engine.step()
        done = engine.global_steps
        if rank == 0:
            say(folder / "steps.jsonl", {"step": done, "loss": loss.item()})
        engine.save_checkpoint(str(folder / "checkpoints"), tag=f"step{done}")
        if rank == 0:
            shutil.rmtree(folder / "checkpoints" / f"step{done - KEPT}", ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), 1_000_000)
