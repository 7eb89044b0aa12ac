"""Ahead-of-time build of the kernels; everything else about the package stands in pyproject.toml.

    DS_BUILD_LOCAL_ATTENTION=1 pip install --no-build-isolation .

puts the compiled libraries into the installed package, for machines without compilers. DS_BUILD_OPS=1 asks for it too,
as for DeepSpeed's own ops, but goes on without what cannot be built. Without either nothing is compiled at installation.
"""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

FOLDER = Path(__file__).resolve().parent / "ops" / "local_attention"
PACKAGE = "cogview2.ops.local_attention"


def _load(name: str) -> ModuleType:
    """Load a module of the op by its file, in a stand-in for its package, which is not installed yet."""
    package = sys.modules.setdefault(PACKAGE, ModuleType(PACKAGE))
    spec = importlib.util.spec_from_file_location(f"{PACKAGE}.{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    setattr(package, name, module)
    return module


def _asked_for() -> bool:
    return os.environ.get("DS_BUILD_LOCAL_ATTENTION", os.environ.get("DS_BUILD_OPS", "0")) == "1"


def _has_cuda_target(toolchain: ModuleType) -> bool:
    """Return whether something says which GPUs to compile for."""
    return bool(os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()) or toolchain.no_device() is None


class BuildKernels(build_py):
    """Copies the modules, then compiles the kernels beside them."""

    def run(self) -> None:
        super().run()
        toolchain, build = _load("toolchain"), _load("build")
        folder = Path(self.build_lib, *PACKAGE.split("."))
        if not self.editable_mode:
            for earlier in folder.glob("local_attention_*"):
                earlier.unlink()
        names = ["cpu"]
        if toolchain.find_nvcc() is not None and _has_cuda_target(toolchain):
            names.append("cuda")
        for name in names:
            self._build(name, build, folder)

    def _build(self, name: str, build: ModuleType, folder: Path) -> None:
        self.announce(f"building the local-attention kernels ({name})", level=2)
        try:
            if self.editable_mode:  # nothing of an editable installation is copied; its cache serves as well
                build.prepare(name)
            else:
                build.make(name, folder)
        except build.BuildError as error:
            if "DS_BUILD_LOCAL_ATTENTION" in os.environ:
                raise SystemExit(f"DS_BUILD_LOCAL_ATTENTION=1: {error}") from error
            self.warn(f"local_attention ({name}) is left out: {error}")


class PlatformWheel(bdist_wheel):
    """A wheel for this platform and for any Python: the libraries know nothing of Python."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


class PlatformDistribution(Distribution):
    """A distribution whose build folder is its platform's own: nothing compiled can slip into a later pure wheel."""

    def has_ext_modules(self) -> bool:
        return True


options: dict[str, Any] = {}
if _asked_for():
    options = {
        "cmdclass": {"build_py": BuildKernels, "bdist_wheel": PlatformWheel},
        "distclass": PlatformDistribution,
    }
setup(**options)
