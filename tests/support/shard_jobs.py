"""The writing of one split by stage shard_dataset, without networks: in this process, or in one that breaks off."""

import ctypes
import os
import resource
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import small_shards
import torch

from cogview2.pipeline import fsops
from cogview2.pipeline.data.records import TokenPair
from cogview2.pipeline.distributed.process import World
from cogview2.pipeline.errors import CogView2Error
from cogview2.pipeline.stage_dir import StageDirectory
from cogview2.stages import shard_dataset

SPLIT = "train"
PAIRS = 12
PER_SHARD = 2
NO_RIGHT = 99
"""Exit code of a process that may not mount a disk of its own."""


class Tokenizer:
    """Gives pairs that follow from their numbers."""

    def tokenize(self, source: Any, indices: list[int], refused: Any) -> Iterator[TokenPair]:
        """Yield the pairs of `indices`."""
        yield from (small_shards.token_pair(index) for index in indices)


def write_split(stage_folder: Path) -> None:
    """Write all shards and the manifest of the split, as rank 0 of one rank does; an earlier attempt is gone on with."""
    stage = StageDirectory(stage_folder, "shard_dataset").create()
    context = SimpleNamespace(
        stage=stage,
        recipe=SimpleNamespace(shards=SimpleNamespace(samples_per_shard=PER_SHARD)),
        world=World(0, 1, 0, torch.device("cpu")),
        stop=SimpleNamespace(is_set=False, reason=""),
        lock=None,
    )
    source = SimpleNamespace(
        splits={SPLIT: list(range(PAIRS))}, description="numbers", fingerprint="f" * 64, keys=[]
    )
    shard_dataset._write_split(
        cast(Any, context), SPLIT, cast(Any, source), cast(Any, Tokenizer()), "identity"
    )


def expected() -> list[TokenPair]:
    """Return the pairs of the whole split."""
    return [small_shards.token_pair(number) for number in range(PAIRS)]


def points(work: Callable[[], None]) -> list[str]:
    """Run `work` and return the fault points that it passed, in order."""
    seen: list[str] = []
    real, fsops.hit = fsops.hit, lambda name: seen.append(name)
    try:
        work()
    finally:
        fsops.hit = real
    return seen


def in_a_process(work: Callable[[], None], fault: str = "", file_limit: int | None = None) -> tuple[int, str]:
    """Run `work` in a fork; return how it ended and what it said.

    Args:
        work: to be run.
        fault: for COGVIEW2_FAULT.
        file_limit: most bytes of a file (RLIMIT_FSIZE), as a quota has.

    Returns:
        The exit code (0, the code of a CogView2Error, 1 for any other error, minus the signal), and the error.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code, said = 0, ""
        try:
            signal.alarm(60)
            os.environ |= {"COGVIEW2_TEST_FAULTS": "1", "COGVIEW2_FAULT": fault}
            if file_limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
            work()
        except CogView2Error as error:
            code, said = int(error.exit_code), str(error)
        except BaseException:
            code, said = 1, traceback.format_exc()
        os.write(writer, said.encode()[:60_000])
        os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def on_a_small_disk(work: Callable[[Path], None], folder: Path, size: str) -> Callable[[], None]:
    """Return `work(disk)` in a mount namespace of its own, on a tmpfs of `size` mounted at `folder`."""

    def inside() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        new_mounts, private = 0x00020000, 1 << 18 | 1 << 14
        if libc.unshare(new_mounts) or libc.mount(b"none", b"/", None, private, None):
            os._exit(NO_RIGHT)
        if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()):
            os._exit(NO_RIGHT)
        work(folder)

    return inside
