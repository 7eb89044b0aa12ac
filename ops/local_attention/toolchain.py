"""What a library of kernels is made of, by which compiler, and which machines it runs on. Standard library only."""

import functools
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Name = Literal["cpu", "cuda", "emulated"]
CSRC = Path(__file__).resolve().parent / "csrc"

_FOLDERS: dict[Name, tuple[str, ...]] = {
    "cpu": ("cpu",),
    "cuda": ("cuda",),
    "emulated": ("cuda", "emulation"),
}
_UNITS: dict[Name, str] = {"cpu": "cpu/*.cpp", "cuda": "cuda/api.cu", "emulated": "cuda/api.cu"}
_SUFFIXES = (".h", ".cpp", ".cu", ".cuh")

# Several of our libraries can live in one process: none may bind to a function or a static of another.
_OWN_SYMBOLS = ("-fvisibility-inlines-hidden", "-fno-gnu-unique")
# No -ffast-math: it breaks infinite biases, and the same input could give other bits on another machine.
_GXX = (
    *("-std=c++17", "-shared", "-fPIC", "-fopenmp", "-Wall"),
    *(*_OWN_SYMBOLS, "-Wl,-Bsymbolic", "-Wl,-z,defs"),
)
_NVCC = (
    *("-std=c++17", "-O3", "-shared", "--cudart=static"),
    *(f"-Xcompiler={','.join(('-fPIC', *_OWN_SYMBOLS))}", "-Xlinker=-Bsymbolic"),
)
OLDEST_CAPABILITY = (8, 0)
"""bf16 matrix instructions and asynchronous copies begin here."""

# The instruction sets that -march=native may use without being asked; the rest of /proc/cpuinfo changes with kernels.
_INSTRUCTION_SET = re.compile(
    r"mmx|sse|pni|ssse|avx|amx|fma|f16c|bmi|abm|lzcnt|popcnt|movbe|movdir|adx|aes|vaes|v?pclmul|gfni|sha|sm[34]|xop"
    r"|tbm|cx16|lahf|cmov|3dnow|apx|xsave|rdpid"
)


class BuildError(RuntimeError):
    """The kernels cannot be built or loaded here; one sentence with the remedy."""


@dataclass(frozen=True)
class Plan:
    """How one library is made, and the facts that tell it from every other."""

    compiler: tuple[str, ...]
    flags: tuple[str, ...]
    units: tuple[Path, ...]
    facts: Mapping[str, Any]

    @property
    def file_name(self) -> str:
        """The library's name in a cache that machines of several kinds may share."""
        key = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:20]
        return f"local_attention_{self.facts['name']}-{key}.so"

    def command(self, out: Path, library_folder: Path) -> list[str]:
        """Return the argv that writes `out`; libraries in `library_folder` are taken before the system's."""
        language = ["-x", "c++"] if self.facts["name"] == "emulated" else []
        units = [str(unit) for unit in self.units]
        return [*self.compiler, *self.flags, *language, *units, f"-L{library_folder}", "-o", str(out)]


def units(name: Name, csrc: Path = CSRC) -> list[Path]:
    """Return the files that the compiler is given, in a fixed order; empty where they are not installed."""
    return sorted(csrc.glob(_UNITS[name]))


def source_digest(name: Name, csrc: Path = CSRC) -> str:
    """Return one digest over every file that can be part of a library."""
    found = [path for path in csrc.iterdir() if path.is_file()]
    for folder in _FOLDERS[name]:
        found += [path for path in (csrc / folder).rglob("*") if path.is_file()]
    digest = hashlib.sha256()
    for path in sorted(path for path in found if path.suffix in _SUFFIXES):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(csrc).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def flags(name: Name, architectures: Sequence[str] = (), csrc: Path = CSRC) -> tuple[str, ...]:
    """Return the compiler's flags.

    Args:
        name: of the library.
        architectures: of "cuda", as in TORCH_CUDA_ARCH_LIST: "9.0", "8.0+PTX".
        csrc: where headers are found.
    """
    if name == "cpu":
        return (*_GXX, "-O3", "-march=native", f"-I{csrc}")
    if name == "emulated":
        return (*_GXX, "-O2", "-DLOCAL_ATTENTION_EMULATED", f"-I{csrc}")
    codes = [code for architecture in architectures for code in _generate(architecture)]
    return (*_NVCC, *codes, f"-I{csrc}")


def _parse(architecture: str) -> tuple[int, int, str, bool]:
    """Return major, minor, the letter of a chip's own features, and whether portable code is wanted too."""
    match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", architecture)
    if match is None:
        raise BuildError(
            f"TORCH_CUDA_ARCH_LIST holds {architecture!r}, which is no compute capability; write for example '8.0;9.0'"
        )
    major, minor = int(match[1]), int(match[2])
    # All that we know of Hopper has the features of sm_90a.
    letter = match[3] or ("a" if (major, minor) == (9, 0) else "")
    return major, minor, letter, match[4] is not None


def _generate(architecture: str) -> list[str]:
    major, minor, letter, portable = _parse(architecture)
    number = f"{major}{minor}"
    code = [f"-gencode=arch=compute_{number}{letter},code=sm_{number}{letter}"]
    return [*code, f"-gencode=arch=compute_{number},code=compute_{number}"] if portable else code


def serves(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Return whether code for `architectures` runs on a device of this compute capability."""
    for architecture in architectures:
        major, minor, letter, portable = _parse(architecture)
        same = (major, minor) == capability
        newer = major == capability[0] and minor <= capability[1] and not letter
        if same or newer or (portable and (major, minor) <= capability):
            return True
    return False


def capabilities() -> list[tuple[int, int]]:
    """Return the compute capabilities of the visible devices; initialises CUDA."""
    import torch

    return sorted({torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())})


def cuda_architectures() -> list[str]:
    """Return what to compile for: TORCH_CUDA_ARCH_LIST where it is set, else the visible devices.

    Raises:
        BuildError: nothing is left that the kernels support, or a visible device would not be served.
    """
    listed = [part for part in re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "")) if part]
    present = capabilities()
    wanted = listed or [f"{major}.{minor}" for major, minor in present]
    supported = [architecture for architecture in wanted if _parse(architecture)[:2] >= OLDEST_CAPABILITY]
    if not supported:
        raise BuildError(
            f"the CUDA kernels need compute capability 8.0 or newer, there is {', '.join(wanted) or 'no device'}; "
            "use a newer GPU, or set TORCH_CUDA_ARCH_LIST to build for another machine"
        )
    unserved = [f"{major}.{minor}" for major, minor in present if not serves(supported, (major, minor))]
    if listed and unserved:
        raise BuildError(
            f"TORCH_CUDA_ARCH_LIST is {' '.join(listed)!r}, which leaves out this machine's {', '.join(unserved)}; "
            "add it or unset the variable"
        )
    return supported


def no_device() -> str | None:
    """Say in one sentence why torch has no CUDA device, or return None; does not initialise CUDA."""
    import torch

    if torch.version.cuda is None:
        return "this torch was built without CUDA; install a CUDA build of torch"
    if torch.cuda.device_count() == 0:
        return "no CUDA device is visible; check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES"
    return None


def find_compiler() -> tuple[str, ...] | None:
    """Return the C++ compiler's command: CXX where it is set, else g++."""
    chosen = os.environ.get("CXX", "")
    try:
        words = shlex.split(chosen) or ["g++"]
    except ValueError:  # a quote that nothing closes
        words = [chosen]
    path = shutil.which(words[0])
    return None if path is None else (path, *words[1:])


def find_nvcc() -> tuple[str, ...] | None:
    """Return nvcc's command: of CUDA_HOME where it is set, else from PATH, else of the default folder."""
    home = os.environ.get("CUDA_HOME")
    path = shutil.which(f"{home}/bin/nvcc" if home else "nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if path is None:
        return None
    host = find_compiler() if os.environ.get("CXX") else None
    return (path, "-ccbin", host[0]) if host is not None and len(host) == 1 else (path,)


def missing_tools(name: Name, csrc: Path = CSRC) -> str | None:
    """Say in one sentence what a build lacks, or return None; runs at most the compiler's --version, once."""
    if not units(name, csrc):
        return f"the sources {csrc / _UNITS[name]} are not installed; install the package again"
    compiler = find_compiler()
    if compiler is None:
        wanted = os.environ.get("CXX") or "g++"
        return f"no C++ compiler was found ({wanted}); install g++, or set CXX to one"
    if name != "cuda" and openmp_runtime() is not None and _is_clang(compiler):
        return f"the C++ compiler {compiler[0]} is clang, whose OpenMP runtime is not the one of torch; set CXX to g++"
    if name == "cuda" and find_nvcc() is None:
        return (
            "no nvcc was found in CUDA_HOME or PATH; install the CUDA toolkit, or set CUDA_HOME to its folder"
        )
    return None


def _is_clang(compiler: tuple[str, ...]) -> bool:
    try:
        return "clang" in version(compiler)
    except BuildError:  # a broken compiler is said where it is used
        return False


@functools.cache
def version(compiler: tuple[str, ...]) -> str:
    """Return the line of `compiler --version` that names the version.

    Raises:
        BuildError: it cannot be run.
    """
    try:
        result = subprocess.run(
            [compiler[0], "--version"], capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(
            f"{compiler[0]} --version failed ({error}); repair or replace the compiler"
        ) from error
    lines = [line.strip() for line in result.stdout.splitlines() if line.strip()] or [""]
    return next((line for line in lines if "release" in line), lines[0])


def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Return the instruction sets of this machine's CPU, as Linux names them."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        text = ""
    found = [os.uname().machine]
    if match := re.search(r"^flags\s*:(.*)$", text, re.MULTILINE):
        found += [flag for flag in match[1].split() if _INSTRUCTION_SET.match(flag)]
    elif match := re.search(r"^Features\s*:(.*)$", text, re.MULTILINE):
        found += match[1].split()
    return sorted(set(found))


def openmp_runtime() -> Path | None:
    """Return the libgomp that torch brings, or None where it uses the system's; does not import torch.

    A second OpenMP runtime in the process would start a second pool of threads.
    """
    try:
        spec = importlib.util.find_spec("torch")
    except ValueError:
        spec = None
    for root in (spec.submodule_search_locations or []) if spec is not None else []:
        for folder in (Path(root) / "lib", Path(root).parent / "torch.libs"):
            if found := sorted(folder.glob("libgomp*.so*")):
                return found[0]
    return None


def machine_facts(name: Name, csrc: Path = CSRC) -> dict[str, Any]:
    """Return what decides, whatever the compiler was, whether a library is the right one and runs here."""
    runtime = openmp_runtime()
    return {
        "name": name,
        "sources": source_digest(name, csrc),
        "cpu": cpu_features() if name == "cpu" else [os.uname().machine],
        "openmp": None if name == "cuda" or runtime is None else runtime.name,
    }


def plan(name: Name, csrc: Path = CSRC) -> Plan:
    """Return how a library is made here.

    Raises:
        BuildError: something is missing.
    """
    if lack := missing_tools(name, csrc):
        raise BuildError(f"the local-attention kernels ({name}) cannot be built: {lack}")
    compiler = find_nvcc() if name == "cuda" else find_compiler()
    host = find_compiler()
    assert compiler is not None and host is not None
    facts = machine_facts(name, csrc)
    architectures = cuda_architectures() if name == "cuda" else []
    arguments = flags(name, architectures, csrc)
    facts |= {
        "architectures": architectures,
        "compiler": sorted({version(compiler), version(host)}),
        "command": [*compiler[1:], *(flag for flag in arguments if flag != f"-I{csrc}")],
        "libc": os.confstr("CS_GNU_LIBC_VERSION") if "CS_GNU_LIBC_VERSION" in os.confstr_names else None,
    }
    return Plan(compiler, arguments, tuple(units(name, csrc)), facts)


def unfit(
    built: Mapping[str, Any], name: Name, devices: Sequence[tuple[int, int]] = (), csrc: Path = CSRC
) -> str | None:
    """Say why a library is not the one for here, or return None.

    Args:
        built: the facts of its plan, made on any machine.
        name: of the library.
        devices: compute capabilities that it must serve.
        csrc: the sources that it must be made of.
    """
    here = machine_facts(name, csrc)
    try:
        if built["name"] != name or built["sources"] != here["sources"]:
            return "it was built from other sources"
        if lacking := sorted(set(built["cpu"]) - set(here["cpu"])):
            return f"this CPU lacks {', '.join(lacking)}"
        if built["openmp"] != here["openmp"]:
            return f"it uses the OpenMP runtime {built['openmp']}, torch here uses {here['openmp']}"
        for major, minor in devices:
            if not serves(built["architectures"], (major, minor)):
                return f"it holds no code for compute capability {major}.{minor}"
    except (KeyError, TypeError, BuildError) as error:
        return f"its facts cannot be read ({error!r})"
    return None
