"""The kernels as an op builder of DeepSpeed: one class for each accelerator, both around `build`.

Import it late: it imports deepspeed.
"""

from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder.builder import CUDAOpBuilder, OpBuilder
from deepspeed.ops.op_builder.cpu.builder import CPUOpBuilder

from cogview2.ops.local_attention import build, toolchain
from cogview2.ops.local_attention.problem import Library
from cogview2.ops.local_attention.registration import library


class _LocalAttention:
    """What both builders say. The library is no Python module: `load` returns `problem.Library`."""

    NAME = "local_attention"
    BUILD_VAR = "DS_BUILD_LOCAL_ATTENTION"
    LIBRARY: build.Name
    name: str
    error_log: str | None

    def __init__(self, name: str | None = None) -> None:
        super().__init__(name=self.NAME if name is None else name)  # type: ignore[call-arg]

    def absolute_name(self) -> str:
        """Return where an ahead-of-time build lies, as a dotted path."""
        return f"cogview2.ops.local_attention.local_attention_{self.LIBRARY}"

    def sources(self) -> list[str]:
        """Return the files that the compiler is given, as absolute paths, which DeepSpeed leaves alone."""
        return [str(path) for path in toolchain.units(self.LIBRARY)]

    def include_paths(self) -> list[str]:
        return [str(toolchain.CSRC)]

    def cxx_args(self) -> list[str]:
        return list(toolchain.flags("cpu"))

    def nvcc_args(self) -> list[str]:
        """Return nvcc's flags; the ones that name architectures only where they are known."""
        if self.LIBRARY == "cpu":
            return []
        try:
            return list(toolchain.flags("cuda", toolchain.cuda_architectures()))
        except build.BuildError:
            return list(toolchain.flags("cuda"))

    def is_compatible(self, verbose: bool = False) -> bool:
        """Return whether the library is there or can be built; say what is missing if `verbose`."""
        self.error_log = build.missing(self.LIBRARY)
        if self.error_log is not None and verbose:
            print(f" [WARNING]  {self.name}: {self.error_log}")  # noqa: T201 - as DeepSpeed's builders do
        return self.error_log is None

    def load(self, verbose: bool = True) -> Library:
        """Return the kernels, built first if need be.

        Raises:
            BuildError: they cannot be built here.
        """
        loaded = library(self.LIBRARY)
        OpBuilder._loaded_ops[self.name] = loaded  # as DeepSpeed's builders leave it
        return loaded

    def jit_load(self, verbose: bool = True) -> Library:
        """Return the kernels; DeepSpeed's own way would compile them as a torch extension."""
        return self.load(verbose)


class CPULocalAttentionBuilder(_LocalAttention, CPUOpBuilder):
    """Builds the CPU kernels."""

    LIBRARY = "cpu"


class CUDALocalAttentionBuilder(_LocalAttention, CUDAOpBuilder):
    """Builds the CUDA kernels."""

    LIBRARY = "cuda"


def builder_for(accelerator: Any) -> type[_LocalAttention]:
    """Return the builder for an accelerator of DeepSpeed; all but CUDA compute local attention on the CPU."""
    return CUDALocalAttentionBuilder if accelerator.device_name() == "cuda" else CPULocalAttentionBuilder


def __getattr__(name: str) -> Any:
    if name == "LocalAttentionBuilder":  # of the accelerator that DeepSpeed has chosen by now
        return builder_for(get_accelerator())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
