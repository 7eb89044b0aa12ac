"""Two or more gloo ranks as forks of the test, with DeepSpeed's process group open."""

import logging
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import deepspeed
import deepspeed.comm
import deepspeed.ops
import deepspeed.runtime.zero.stage3
import deepspeed.runtime.zero.stage_1_and_2
import torch
import torch._dynamo
import torch._inductor.compile_fx
import torch.distributed.fsdp

TIME_LIMIT = 60
# What engines and optimizers import late is imported above: once here, not in every fork.


def plain(value: Any) -> Any:
    """Tensors travel as numpy arrays: no shared memory outlives the ranks."""
    if isinstance(value, torch.Tensor):
        return value.numpy()
    return {key: plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def _main(work: Callable[[int], Any], rank: int, world: int, port: int, pipe: Connection) -> None:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in own.items()}, MASTER_ADDR="127.0.0.1")
    try:
        torch.set_num_threads(1)
        # DeepSpeed would compile its shared-memory collectives first.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.utils.logger.setLevel(logging.ERROR)
        deepspeed.init_distributed("gloo")
        result = work(rank)
        deepspeed.comm.barrier()
        pipe.send(plain(result))
    except BaseException:
        pipe.send(traceback.format_exc())
    finally:
        pipe.close()
        os._exit(0)


def run_ranks(work: Callable[[int], Any], world: int, limit: float | None = None) -> list[Any]:
    """Call work(rank) on every rank and return what they return, tensors as numpy arrays.

    The first failure of a rank fails the test at once: the others would wait for it until `limit` seconds (TIME_LIMIT) are over.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    pipes, ranks = [], []
    for rank in range(world):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_main, args=(work, rank, world, port, sender))
        process.start()
        sender.close()
        pipes.append(receiver)
        ranks.append(process)
    try:
        return _answers(pipes, TIME_LIMIT if limit is None else limit)
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _answers(pipes: list[Connection], limit: float) -> list[Any]:
    deadline = time.monotonic() + limit
    answers: dict[int, Any] = {}
    while len(answers) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in answers}
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        assert ready, f"ranks {sorted(waiting.values())} gave no answer in {limit:.0f} s"
        for pipe in ready:
            rank = waiting[pipe]  # type: ignore[index]  # one of the pipes
            try:
                answers[rank] = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                answers[rank] = "it died without a word"
            assert not isinstance(answers[rank], str), f"rank {rank}: {answers[rank]}"
    return [answers[rank] for rank in range(len(pipes))]
