"""Process group: start, stop, and the few collectives on plain objects."""

import datetime
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from cogview2.ops.registry import register
from cogview2.pipeline.distributed import discovery
from cogview2.pipeline.errors import LaunchError

T = TypeVar("T")
_TIMEOUT_SECONDS = 1800.0


@dataclass(frozen=True)
class World:
    """Who this process is among the ranks of the job."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the one that writes shared files."""
        return self.rank == 0


def world_from_environment(expected: int | None = None, shared: Path | None = None) -> World:
    """Return who this process is: by RANK, WORLD_SIZE and LOCAL_RANK, which the launcher sets, or over MPI.

    A process started by hand is alone. Under mpirun the ranks find each other (discovery.py), and the variables are
    set for the libraries.

    Args:
        expected: the ranks of the job as its launcher planned it; None where nobody did.
        shared: a file that all hosts of an MPI job must see with the same content.

    Raises:
        LaunchError: a value is no number, the rank is outside the world, the world is not the expected one, several
            Slurm tasks know nothing of each other, or the hosts of an MPI job do not fit together.
    """
    if "RANK" not in os.environ:
        if discovery.started_by_mpi(os.environ):
            os.environ.update(discovery.discover(os.environ, shared))
        else:
            discovery.refuse_lonely_tasks(os.environ)
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    try:
        values = {name: int(os.environ.get(name, default)) for name, default in names.items()}
    except ValueError as error:
        raise LaunchError(
            f"the launcher set a rank variable to no number ({error}); start with cogview2 run"
        ) from error
    if not 0 <= values["RANK"] < values["WORLD_SIZE"]:
        raise LaunchError(
            f"RANK {values['RANK']} is outside WORLD_SIZE {values['WORLD_SIZE']}; start with cogview2 run"
        )
    if expected is not None and values["WORLD_SIZE"] != expected:
        raise LaunchError(
            f"WORLD_SIZE is {values['WORLD_SIZE']} but the job was planned for {expected} ranks; start it again with "
            "cogview2 run or submit, not by hand"
        )
    cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    device = torch.device("cuda", values["LOCAL_RANK"]) if cuda else torch.device("cpu")
    return World(values["RANK"], values["WORLD_SIZE"], values["LOCAL_RANK"], device)


def planned_ranks(attempt: Path) -> int | None:
    """Return the ranks of the job that an attempt's launcher wrote down (job.json), or None where it wrote nothing.

    Raises:
        LaunchError: the file cannot be read here.
    """
    path = attempt / "job.json"
    try:
        return sum(int(host["slots"]) for host in json.loads(path.read_text(encoding="utf-8"))["hosts"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LaunchError(f"{path} cannot be read ({error}); start with cogview2 run or submit") from error


def claimed_rank() -> int:
    """Return the rank that the environment gives this process, believed or not; 0 where it says nothing."""
    names = ("RANK", *discovery.RANK_NAMES)
    value = next((os.environ[name] for name in names if name in os.environ), "0")
    return int(value) if value.isascii() and value.isdigit() else 0


@contextmanager
def process_group(world: World, timeout_seconds: float = 0.0) -> Iterator[World]:
    """Hold DeepSpeed's process group open: gloo on CPUs, NCCL on GPUs; its collectives give up after half an hour at least.

    It is closed after success only. An error leaves it to the end of the process: closed earlier, the other
    ranks would fail, and report so, before this one has reported its own, first error.
    """
    import deepspeed
    import deepspeed.ops

    register()
    # Its JIT build takes a minute at the first start, and a killed build leaves a lock on which all later jobs hang.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    for name, value in (("RANK", world.rank), ("WORLD_SIZE", world.size), ("LOCAL_RANK", world.local_rank)):
        os.environ.setdefault(name, str(value))
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    timeout = datetime.timedelta(seconds=max(_TIMEOUT_SECONDS, timeout_seconds))
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    deepspeed.init_distributed(backend, timeout=timeout, dist_init_required=True, verbose=False)
    yield world
    if dist.is_initialized():
        dist.destroy_process_group()


def broadcast_object(value: T, source: int = 0) -> T:
    """Return the value that rank `source` holds, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, source)
    return box[0]


def gather_objects(value: T) -> list[T]:
    """Return the values of all ranks, in rank order, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
