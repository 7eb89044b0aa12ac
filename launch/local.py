"""This machine as a launcher: the `deepspeed` command line and the environment of one stage."""

import os
import re
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from cogview2.pipeline.attempt import Attempt

_GPU_DEVICE = re.compile(r"nvidia\d+")
NO_HOSTFILE = "/dev/null"


def gpu_count(environment: Mapping[str, str], devices: Path = Path("/dev")) -> int:
    """Return the NVIDIA devices that a job may use, without importing torch."""
    present = sum(1 for entry in devices.iterdir() if _GPU_DEVICE.fullmatch(entry.name))
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    return min(present, len([device for device in visible.split(",") if device.strip() not in ("", "-1")]))


def free_port() -> int:
    """Return a TCP port of the loopback address that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command(stage: str, run: Path, attempt: Attempt, ranks: int) -> list[str]:
    """Return the argv that starts `ranks` processes of a stage on this machine.

    The runner gets a hostfile that is no file, so that a /job/hostfile left on the machine is never read.
    """
    return [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--hostfile",
        NO_HOSTFILE,
        "--num_gpus",
        str(ranks),
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        str(free_port()),
        "--no_local_rank",
        "--module",
        f"cogview2.stages.{stage}",
        "--run-dir",
        str(run),
        "--attempt",
        str(attempt.number),
    ]


def environment(base: Mapping[str, str], ranks: int, threads_per_rank: int) -> dict[str, str]:
    """Return the environment of a local job: `base` with what libraries read before our code runs."""
    result = dict(base)
    result["OMP_NUM_THREADS"] = str(threads_per_rank)
    result["TOKENIZERS_PARALLELISM"] = "false"
    result["WDS_SECURE"] = "1"  # webdataset: no pipes, no pickles; read at its import
    result["PYTHONUNBUFFERED"] = "1"
    result["PYTHONSAFEPATH"] = "1"  # the working directory must not shadow a module of a rank
    if uses_cpu(base, ranks):
        result["DS_ACCELERATOR"] = "cpu"
    return result


def uses_cpu(base: Mapping[str, str], ranks: int, devices: Path = Path("/dev")) -> bool:
    """Return whether a job of `ranks` runs on the CPU here: there are fewer GPUs than ranks."""
    return base.get("DS_ACCELERATOR") == "cpu" or gpu_count(base, devices) < ranks


def current_environment() -> dict[str, str]:
    """Return the environment of this process."""
    return dict(os.environ)
