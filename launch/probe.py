"""What a host says about itself before a job is started on it: one line of JSON, in a fraction of a second."""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cogview2.launch.local import current_environment, free_port, gpu_count
from cogview2.pipeline.attempt import PROBE_PREFIX

MARK = "cogview2-probe "
"""Begins the line: login messages of a host may stand around it."""
_PACKAGES = ("pipeline", "stages", "ops", "launch", "ds_configs")
_VERSIONS = ("cogview2", "torch", "deepspeed")
_SOURCES = frozenset((".py", ".json", ".yaml", ".cu", ".cuh", ".cpp", ".h"))


def token_path(run: Path, token: str) -> Path:
    """Return the file by which a host proves that it sees the run directory; its name is new each time (no cache)."""
    return run / f"{PROBE_PREFIX}{token}"


def source_digest() -> str:
    """Return a sha256 over names and contents of the installed sources of the project's packages, in hex."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        spec = importlib.util.find_spec(f"cogview2.{package}")
        folder = Path((spec.submodule_search_locations or [""])[0]) if spec is not None else Path("/nowhere")
        for path in sorted(path for path in folder.rglob("*") if path.suffix in _SOURCES):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{package}/{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that must be equal on all hosts, without importing them."""
    found = {"python": platform.python_version()}
    for name in _VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def _address_of(name: str) -> str:
    try:
        return str(socket.getaddrinfo(name, None, socket.AF_INET)[0][4][0])
    except (OSError, UnicodeError):
        return ""


def look(run: Path, token: str, first: str) -> dict[str, Any]:
    """Return what this host says about itself.

    Args:
        run: the run directory.
        token: of `token_path`.
        first: name of the first host, where the ranks meet.
    """
    return {
        "versions": versions(),
        "source": source_digest(),
        "hostname": socket.gethostname(),
        "slurm_name": os.environ.get("SLURMD_NODENAME", ""),
        "sees_run": token_path(run, token).is_file(),
        "writes_run": os.access(run, os.W_OK) and os.access(token_path(run, token), os.R_OK),
        "gpus": gpu_count(current_environment()),
        "first_address": _address_of(first),
        "own_address": _address_of(socket.gethostname()),
        "free_port": free_port(""),
        "clock": time.time(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Print the line."""
    parser = argparse.ArgumentParser(prog="cogview2.launch.probe", description="What this host has.")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--token", required=True)
    parser.add_argument("--first", required=True)
    arguments = parser.parse_args(argv)
    facts = look(arguments.run_dir, arguments.token, arguments.first)
    print(f"\n{MARK}{json.dumps(facts)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
