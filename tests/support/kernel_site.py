"""A place to build kernels in: small sources, a cache, and a compiler that notes its runs."""

import os
import shutil
from pathlib import Path

from cogview2.ops.local_attention import build, toolchain

STAND_IN = """
#include "problem.h"
using local_attention::Problem;
extern "C" {
int64_t local_attention_problem_bytes() { return sizeof(Problem); }
int64_t local_attention_workspace_bytes(const Problem*, int32_t) { return 0; }
const char* local_attention_kernel(const Problem*, int32_t) { return "stand-in"; }
int32_t local_attention_forward(const Problem*, void*, char*, int64_t) {
  int32_t sum = 0;
#pragma omp parallel for reduction(+ : sum)
  for (int i = 0; i < 10; ++i) sum += i;
  return sum;
}
int32_t local_attention_backward(const Problem*, void*, char*, int64_t) { return 45; }
}
"""
SUM = 45


class Site:
    """Sources, a cache, and a g++ first on PATH that notes its runs and can be made slow."""

    def __init__(self, folder: Path) -> None:
        self.csrc, self.installed = folder / "csrc", folder / "installed"
        self.cache = folder / "extensions" / "cogview2"
        self.bin, self.runs = folder / "bin", folder / "runs"
        for name in ("cpu", "cuda", "emulation"):
            (self.csrc / name).mkdir(parents=True)
        for header in toolchain.CSRC.glob("*.h"):
            shutil.copy(header, self.csrc)
        (self.csrc / "cpu" / "api.cpp").write_text(STAND_IN)
        (self.csrc / "cuda" / "api.cu").write_text(STAND_IN)
        self.installed.mkdir()
        self.bin.mkdir()
        self.set_compiler()

    def set_compiler(self, seconds: float = 0.0, name: str = "g++", version: str = "") -> None:
        script = self.bin / name
        said = f'echo "{version}"' if version else f'exec {shutil.which("g++", path=os.defpath)} "$@"'
        script.write_text(
            f'#!/bin/sh\ncase "$1" in --version) {said}; exit 0;; esac\n'
            f'echo run >> {self.runs}\nsleep {seconds}\nexec {shutil.which("g++", path=os.defpath)} "$@"\n'
        )
        script.chmod(0o755)

    @property
    def compiled(self) -> int:
        """How often the compiler has compiled."""
        return len(self.runs.read_text().splitlines()) if self.runs.exists() else 0

    def open(self) -> int:
        """Find or build the library, load it and call it; without OpenMP, which dies in forked processes."""
        library = build.open_library("cpu", self.csrc, self.installed)
        return int(library.local_attention_backward(None, None, None, 0))

    def key(self) -> str:
        return toolchain.plan("cpu", self.csrc).file_name
