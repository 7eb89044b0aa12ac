"""The algorithm of the published kernels as a peer: published.cu, compiled when it is first asked for."""

import ctypes
import functools
import math
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from cases import Case, Inputs

SOURCE = Path(__file__).with_name("published.cu")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Sizes(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("heads", "channels", "rows", "columns", "window_rows", "window_columns", "slots")
    ]


@functools.cache
def _library(device_type: str) -> ctypes.CDLL:
    """Compile and load; the file is gone afterwards.

    Raises:
        RuntimeError: no compiler, or it failed.
    """
    tool = "nvcc" if device_type == "cuda" else "c++"
    compiler = shutil.which(tool) or shutil.which(f"/usr/local/cuda/bin/{tool}")
    if compiler is None:
        raise RuntimeError(f"{tool} is not on PATH")
    argv = [compiler, "-O3", "-std=c++17", "-shared"]
    if device_type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        argv += [f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}", "-Xcompiler", "-fPIC"]
    else:
        argv += ["-fPIC", "-x", "c++"]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "published.so"
        done = subprocess.run(
            [*argv, str(SOURCE), "-o", str(target)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{tool} failed: {done.stderr}")
        return ctypes.CDLL(str(target))


def _channel_first(tensor: torch.Tensor) -> torch.Tensor:
    """[B, Y, X, H, D] -> [B * H, D, Y, X], the copy that the published kernels ask for."""
    return tensor.permute(0, 3, 4, 1, 2).flatten(0, 1).contiguous()


def published(case: Case, inputs: Inputs) -> Callable[[], torch.Tensor]:
    """Scores, softmax, weighted sum in three steps, forward only.

    Raises:
        ValueError: the case has more than a window.
    """
    layout = case.layout
    if layout.tokens or layout.cross_keys:
        raise ValueError("only a window alone")
    query = inputs.query
    library, (batch, rows, columns, heads, channels) = _library(query.device.type), query.shape
    window = case.window[0] * case.window[1]
    slots = window // 2 + 1 if layout.is_causal else window
    sizes = _Sizes(batch * heads, channels, rows, columns, *case.window, slots)

    def step(is_score: bool, first: torch.Tensor, second: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        stream = torch.cuda.current_stream().cuda_stream if query.is_cuda else 0
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (first, second, result)]
        failed = library.published(
            ctypes.byref(sizes), TYPES[query.dtype], int(is_score), *pointers, ctypes.c_void_p(stream)
        )
        if failed:
            raise RuntimeError(f"the published algorithm failed with CUDA error {failed}")
        return result

    def call() -> torch.Tensor:
        scaled = _channel_first(inputs.query / math.sqrt(channels))
        scores = step(
            True, scaled, _channel_first(inputs.key), query.new_empty(batch * heads, rows, columns, slots)
        )
        out = step(False, scores.softmax(-1), _channel_first(inputs.value), torch.empty_like(scaled))
        return out.view(batch, heads, channels, rows, columns).permute(0, 3, 4, 1, 2)

    return call
