"""Two or more gloo ranks as forks of the test, with DeepSpeed's process group open."""

import logging
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import deepspeed
import deepspeed.comm
import deepspeed.ops
import torch

TIME_LIMIT = 60


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


def run_ranks(work: Callable[[int], Any], world: int) -> list[Any]:
    """Call work(rank) on every rank and return what they return, tensors as numpy arrays; a failure fails the test."""
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
        answers = [pipe.recv() if pipe.poll(TIME_LIMIT) else "no answer in time" for pipe in pipes]
    finally:
        for process in ranks:
            process.kill()
            process.join()
    failures = [answer for answer in answers if isinstance(answer, str)]
    assert not failures, "\n".join(failures)
    return answers
