"""Gloo ranks as forks of a benchmark, one thread each, with DeepSpeed's process group open."""

import contextlib
import logging
import multiprocessing
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import deepspeed
import torch

from cogview2.pipeline.distributed.process import World, barrier, process_group

LIMIT_SECONDS = 3600

Work = Callable[[World, Path], Any]
"""What a rank does; the folder is the same on all ranks, and gone afterwards."""


def _main(work: Work, rank: int, ranks: int, port: int, folder: Path, pipe: Connection) -> None:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in own.items()}, MASTER_ADDR="127.0.0.1")
    os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        torch.set_num_threads(1)
        stack = contextlib.ExitStack()
        # Never left: some candidates do not outlive the process group.
        world = stack.enter_context(process_group(World(rank, ranks, rank, torch.device("cpu"))))
        deepspeed.utils.logger.setLevel(logging.ERROR)
        pipe.send(work(world, folder))
        barrier()
    except BaseException:
        pipe.send(traceback.format_exc())
    finally:
        pipe.close()
        os._exit(0)


def run(work: Work, ranks: int, parent: Path | None = None) -> Any:
    """Let `ranks` processes do `work`, and return what rank 0 found.

    Args:
        work: returns plain values.
        ranks: how many.
        parent: where the shared folder is made.

    Raises:
        SystemExit: a rank failed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        pipes, processes = [], []
        for rank in range(ranks):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_main, args=(work, rank, ranks, port, Path(folder), sender))
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            answers = [pipe.recv() if pipe.poll(LIMIT_SECONDS) else "no answer in time" for pipe in pipes]
        finally:
            for process in processes:
                process.kill()
                process.join()
    failures = [answer for answer in answers if isinstance(answer, str)]
    if failures:
        raise SystemExit(f"a rank failed:\n{failures[0]}")
    return answers[0]
