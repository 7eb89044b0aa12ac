"""This machine as a launcher: the `deepspeed` command line and the environment of one stage."""

import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path

from cogview2.launch.job import JobSpec

_GPU_DEVICE = re.compile(r"nvidia\d+")
NO_HOSTFILE = "/dev/null"
VISIBLE_DEVICES = "COGVIEW2_VISIBLE_DEVICES"
"""Read by every stage before anything else (stages/__init__.py)."""


def gpu_count(environment: Mapping[str, str], devices: Path = Path("/dev")) -> int:
    """Return the NVIDIA devices that a job may use, without importing torch."""
    present = sum(1 for entry in devices.iterdir() if _GPU_DEVICE.fullmatch(entry.name))
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    return min(present, len([device for device in visible.split(",") if device.strip() not in ("", "-1")]))


def free_port(address: str = "127.0.0.1") -> int:
    """Return a TCP port of an address of this machine that nobody listens on now; "" stands for all its addresses."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def command(spec: JobSpec) -> list[str]:
    """Return the argv that starts all ranks of a job on this machine.

    The runner gets a hostfile that is no file, so that a /job/hostfile left on the machine is never read.
    """
    return [
        *(spec.python, "-m", "deepspeed.launcher.runner"),
        *("--hostfile", NO_HOSTFILE, "--num_gpus", str(spec.ranks)),
        *("--master_addr", spec.master_addr, "--master_port", spec.port_text, "--no_local_rank"),
        *spec.stage_words(),
    ]


def library_variables(threads_per_rank: int) -> dict[str, str]:
    """Return what libraries must find in the environment of a rank before our code runs."""
    return {
        "OMP_NUM_THREADS": str(threads_per_rank),
        "TOKENIZERS_PARALLELISM": "false",
        "WDS_SECURE": "1",  # webdataset: no pipes, no pickles; read at its import
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",  # the working directory must not shadow a module of a rank
    }


def device_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return `environment` with a second copy of CUDA_VISIBLE_DEVICES: DeepSpeed's launcher writes 0, 1, ... over it."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    return dict(environment) | ({VISIBLE_DEVICES: visible} if visible else {})


def uses_cpu(base: Mapping[str, str], ranks: int, devices: Path = Path("/dev")) -> bool:
    """Return whether a job of `ranks` runs on the CPU here: there are fewer GPUs than ranks."""
    return base.get("DS_ACCELERATOR") == "cpu" or gpu_count(base, devices) < ranks


def current_environment() -> dict[str, str]:
    """Return the environment of this process."""
    return dict(os.environ)
