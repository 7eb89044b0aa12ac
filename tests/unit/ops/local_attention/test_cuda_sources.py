"""The CUDA sources compile for Ampere and Hopper, and the fast kernels keep everything in registers."""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from cogview2.ops.local_attention.toolchain import CSRC, find_nvcc

NVCC = find_nvcc()
pytestmark = pytest.mark.skipif(
    NVCC is None, reason="needs nvcc (in PATH or CUDA_HOME) to compile CUDA sources"
)

ARCHITECTURES = ["80", "90a"]

# The kernels of the released models: bfloat16, 64 channels, no dropout.
RELEASED = """
#include "cuda/tensor_core_launch.cuh"
namespace local_attention::tensor_core {
template __global__ void strip_forward<Bfloat16, 64, NoDropout>(const Problem, const StripPlan, const Scale);
template __global__ void strip_query_gradient<Bfloat16, 64, NoDropout>(
    const Problem, const StripPlan, const Scale, Statistics*);
template __global__ void strip_key_gradient<Bfloat16, 64, false>(
    const Problem, const StripPlan, const Scale, const Statistics*);
template __global__ void stream_key_gradient<Bfloat16, 64, false>(
    const Problem, const StreamPlan, const Scale, const Statistics*, float*);
template __global__ void stream_key_gradient<Bfloat16, 64, true>(
    const Problem, const StreamPlan, const Scale, const Statistics*, float*);
}
"""


class Resources(NamedTuple):
    """What ptxas says of a kernel."""

    name: str
    stack: int
    spilled: int
    registers: int


def report(source: Path, architecture: str, folder: Path) -> list[Resources]:
    """Compile for one architecture and return what every kernel needs."""
    assert NVCC is not None
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    flags = ["-std=c++17", "-O3", target, f"-I{CSRC}", "-Xptxas=-v", "-Werror=all-warnings", "-cubin"]
    result = subprocess.run(
        [*NVCC, *flags, str(source), "-o", str(folder / f"{architecture}.cubin")],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    kernels = re.findall(
        r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers",
        result.stdout + result.stderr,
        re.DOTALL,
    )
    return [Resources(name, int(stack), int(spill), int(used)) for name, stack, spill, used in kernels]


def of(kernels: list[Resources], part: str) -> list[Resources]:
    return [kernel for kernel in kernels if part in kernel.name]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_released_kernels(architecture: str, tmp_path: Path) -> None:
    source = tmp_path / "released.cu"
    source.write_text(RELEASED)
    kernels = report(source, architecture, tmp_path)
    fast = of(kernels, "tensor_core")
    assert len(fast) == 5
    assert [kernel for kernel in fast if kernel.spilled or kernel.stack] == []
    (forward,) = of(fast, "strip_forward")
    (query_gradient,) = of(fast, "strip_query_gradient")
    assert max(forward.registers, query_gradient.registers) <= 128  # two blocks of 256 threads
    (key_gradient,) = of(fast, "strip_key_gradient")
    assert key_gradient.registers <= 168  # three blocks of 128 threads


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_whole_library(architecture: str, tmp_path: Path) -> None:
    kernels = report(CSRC / "cuda" / "api.cu", architecture, tmp_path)
    assert len(of(kernels, "strip_forward")) == 12  # two types, three sizes, with and without dropout
    assert len(of(kernels, "plain")) >= 16
    assert [kernel for kernel in kernels if kernel.spilled or kernel.stack] == []
