"""What `cogview2 doctor` prints about a machine that has torch and deepspeed."""

import importlib.metadata
import platform
from collections.abc import Iterator

import torch
from deepspeed.env_report import op_report

from cogview2.ops.local_attention import build, toolchain
from cogview2.ops.registry import register

_LABEL_WIDTH = 12
_LIBRARIES: tuple[build.Name, ...] = ("cpu", "cuda")


def _line(label: str, text: object) -> None:
    print(f"{label:<{_LABEL_WIDTH}}{text}")


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _compiler(command: tuple[str, ...] | None) -> str:
    if command is None:
        return "none"
    try:
        return f"{toolchain.version(command)} ({command[0]})"
    except build.BuildError as error:
        return str(error)


def _gpus() -> Iterator[str]:
    """Yield name and compute capability of every visible device."""
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        yield f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"


def show_versions() -> None:
    """Print versions, compilers and devices."""
    _line("cogview2", _version("cogview2"))
    _line("python", platform.python_version())
    _line("torch", _version("torch"))
    _line("deepspeed", _version("deepspeed"))
    _line("C++", _compiler(toolchain.find_compiler()))
    _line("nvcc", _compiler(toolchain.find_nvcc()))
    gpus = list(_gpus())
    for gpu in sorted(set(gpus)):
        _line("GPU", f"{gpus.count(gpu)} x {gpu}")
    if not gpus:
        _line("GPU", f"none: {toolchain.no_device()}")


def show_operators() -> None:
    """Print where our kernels are, then DeepSpeed's own report of its operators, among which ours are."""
    print("\nlocal attention")
    for name in _LIBRARIES:
        _line(f"  {name}", build.state(name))
    print()
    register()
    op_report()


def build_kernels() -> list[str]:
    """Compile what this machine can use; return a sentence for each failure."""
    failures = []
    for name in _LIBRARIES:
        if name == "cuda" and toolchain.no_device() is not None:
            continue
        try:
            build.load(name)
        except build.BuildError as error:
            failures.append(str(error))
    return failures
