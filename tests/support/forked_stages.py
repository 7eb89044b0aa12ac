"""The ranks of a real stage as forks of the test: what takes seconds to import is there already."""

import os
import runpy
import sys

import deepspeed  # noqa: F401 - imported once, for all forks
import torch._dynamo  # noqa: F401
from tiny_runs import Ranks, environment
from watched_ranks import Fork, free_port

from cogview2.pipeline.run_dir import RunDirectory
from cogview2.stages import (  # noqa: F401
    evaluate,
    finetune_superres,
    pretrain_coglm,
    shard_dataset,
    train_tokenizer,
    train_vqvae,
)


class ForkedRanks(Ranks):
    """As `tiny_runs.Ranks`, seconds faster; the stage's module runs as __main__, as under `python -m`."""

    def __init__(self, run: RunDirectory, stage: str, count: int = 1, **variables: str) -> None:
        self.attempt = run.stage(stage).new_attempt()
        shared = environment() | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(count),
        }
        arguments = ["--run-dir", str(run.path), "--attempt", str(self.attempt.number)]

        def work(rank: int) -> int:
            os.environ.clear()
            os.environ.update(shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | variables)
            sys.argv = [f"cogview2.stages.{stage}", *arguments]
            runpy.run_module(f"cogview2.stages.{stage}", run_name="__main__", alter_sys=True)
            return 98  # never: a stage ends its process itself

        self.processes = [  # type: ignore[assignment]  # what is used of them is alike
            Fork(lambda rank=rank: work(rank), self.attempt.path / f"output-{rank}.txt")  # type: ignore[misc]
            for rank in range(count)
        ]
