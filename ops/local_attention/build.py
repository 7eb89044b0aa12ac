"""Compile the kernels once for a kind of machine, keep the library, load it. Knows neither torch's C++ nor DeepSpeed.

A library is compiled in a private folder beside its place and renamed: it appears whole or not at all, whatever is
killed. The lock only spares ranks that start together the same work; the kernel drops it with its process. The end of
the file seals its content, because loading a truncated library would kill the process instead of failing.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from cogview2.ops.local_attention import toolchain
from cogview2.ops.local_attention.toolchain import CSRC, BuildError, Name, Plan

__all__ = ["BuildError", "Name", "is_installed", "load", "make", "missing", "prepare", "state"]

logger = logging.getLogger(__name__)

INSTALLED = Path(__file__).resolve().parent
"""Where an ahead-of-time build leaves local_attention_<name>.so and .json."""

_DURATION: dict[Name, str] = {"cpu": "10 s", "cuda": "1 min", "emulated": "20 s"}
_SEAL = b"local attention, sealed"
_FOLDER = "cogview2"
_ABANDONED_SECONDS = 3600.0

_loaded: dict[Name, ctypes.CDLL] = {}
_loading = threading.RLock()


def missing(name: Name, csrc: Path = CSRC, installed: Path = INSTALLED) -> str | None:
    """Say in one sentence why library `name` can be neither built nor found ready here, or return None.

    Compiles nothing and does not initialise CUDA. Looks at the machine anew with every call.
    """
    if name == "cuda" and (lack := toolchain.no_device()):
        return lack
    lack = toolchain.missing_tools(name, csrc)
    # Without tools, what was built ahead of time still serves.
    return lack if lack and _ahead(name, csrc, installed, ask_devices=False) is None else None


def load(name: Name) -> ctypes.CDLL:
    """Return the library, once for each process: built ahead of time, else from the cache, else compiled now.

    Raises:
        BuildError: it cannot be built, or what was built does not load.
    """
    with _loading:
        if name not in _loaded:
            _loaded[name] = open_library(name)
        return _loaded[name]


def open_library(name: Name, csrc: Path = CSRC, installed: Path = INSTALLED) -> ctypes.CDLL:
    """Find or compile a library and load it; see `load`."""
    if (ahead := _ahead(name, csrc, installed)) is not None:
        try:
            return _dlopen(ahead)
        except OSError as error:
            logger.warning("%s does not load (%s); building the kernels anew", ahead, error)
    plan = toolchain.plan(name, csrc)
    path = _find_or_compile(plan, None)
    try:
        return _dlopen(path)
    except OSError as error:
        logger.warning("%s does not load (%s); building it anew", path, error)
        path = _find_or_compile(plan, path.stat())
    try:
        return _dlopen(path)
    except OSError as error:
        raise BuildError(
            f"{path} was built but does not load ({error}); let TORCH_EXTENSIONS_DIR name a folder on a file system that "
            "allows programs, and CXX a compiler of this system"
        ) from error


def make(name: Name, folder: Path, csrc: Path = CSRC) -> Path:
    """Compile ahead of time: write local_attention_<name>.so, with its facts beside it, into `folder`."""
    plan = toolchain.plan(name, csrc)
    target = folder.absolute() / f"local_attention_{name}.so"
    _compile(plan, target)
    target.with_suffix(".json").write_text(json.dumps(plan.facts, indent=1, sort_keys=True) + "\n")
    return target


def prepare(name: Name, csrc: Path = CSRC) -> Path:
    """Compile into the cache unless it is there, and return where; loads nothing."""
    return _find_or_compile(toolchain.plan(name, csrc), None)


def is_installed(name: Name, csrc: Path = CSRC, installed: Path = INSTALLED) -> bool:
    """Return whether an ahead-of-time build serves this machine; does not initialise CUDA."""
    return _ahead(name, csrc, installed, ask_devices=False) is not None


def state(name: Name, csrc: Path = CSRC, installed: Path = INSTALLED) -> str:
    """Say in a few words where the library is, or what stands in its way. May initialise CUDA."""
    if lack := missing(name, csrc, installed):
        return f"cannot be built: {lack}"
    if (ahead := _ahead(name, csrc, installed)) is not None:
        return f"installed ahead of time: {ahead}"
    try:
        plan = toolchain.plan(name, csrc)
    except BuildError as error:
        return f"cannot be built: {error}"
    for folder in _cache_folders():
        if _is_whole(folder / plan.file_name):
            return f"built: {folder / plan.file_name}"
    return f"will be built when first used, about {_DURATION[name]}"


def _ahead(name: Name, csrc: Path, installed: Path, *, ask_devices: bool = True) -> Path | None:
    """Return the library of an ahead-of-time build if it is whole and for this machine.

    Asking the CUDA devices initialises CUDA.
    """
    path = installed / f"local_attention_{name}.so"
    if not path.is_file():
        return None
    try:
        built = json.loads(path.with_suffix(".json").read_text())
        devices = toolchain.capabilities() if name == "cuda" and ask_devices else []
        reason = toolchain.unfit(built, name, devices, csrc)
    except (OSError, ValueError) as error:
        reason = f"its facts cannot be read ({error})"
    if reason is None and not _is_whole(path):
        reason = "it is damaged"
    if reason is not None:
        logger.info("%s, built ahead of time, is left aside: %s", path, reason)
        return None
    return path


def _dlopen(path: Path) -> ctypes.CDLL:
    """Load a library after torch's own OpenMP runtime, which it was linked with.

    Raises:
        OSError: it cannot be loaded, or is not one of ours.
    """
    if (runtime := toolchain.openmp_runtime()) is not None:
        ctypes.CDLL(str(runtime))
    library = ctypes.CDLL(str(path))
    if not hasattr(library, "local_attention_forward"):
        raise OSError(f"{path} has no local_attention_forward")
    return library


def _chosen_folder() -> Path | None:
    """Return where libraries are kept: beside torch's extensions where their folder is named, else in the home."""
    if chosen := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(chosen).absolute() / _FOLDER
    try:
        return Path.home() / ".cache" / _FOLDER
    except RuntimeError:  # a user without a home
        return None


def _private_folder() -> Path | None:
    """Return this user's folder among the temporary ones, if there are any."""
    try:
        return Path(tempfile.gettempdir()) / f"{_FOLDER}-{os.getuid()}"
    except OSError:
        return None


def _is_private(folder: Path) -> bool:
    """Return whether nobody else can write there: a folder under our name could hold somebody else's code."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077


def _cache_folders() -> list[Path]:
    """Return where a finished library may lie, best first; a folder need not exist."""
    chosen, private = _chosen_folder(), _private_folder()
    folders = [chosen, private if private is not None and _is_private(private) else None]
    return [folder for folder in folders if folder is not None]


def _writable_folder() -> Path:
    """Return the cache folder to write to, made if missing."""
    chosen, private = _chosen_folder(), _private_folder()
    for folder in (chosen, private):
        if folder is None:
            continue
        try:
            # What is in the home or among the temporary files concerns one user; a named folder may serve a group.
            mode = 0o777 if folder == chosen and os.environ.get("TORCH_EXTENSIONS_DIR") else 0o700
            folder.mkdir(mode=mode, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            logger.info("%s cannot hold compiled kernels (%s)", folder, error.strerror)
            continue
        if folder == chosen or _is_private(folder):
            return folder
        logger.warning("%s belongs to somebody else or is open to others; it is not used", folder)
    try:
        return Path(tempfile.mkdtemp(prefix=f"{_FOLDER}-"))
    except OSError as error:
        raise BuildError(
            f"no folder can hold compiled kernels ({error}); let TORCH_EXTENSIONS_DIR name a writable one"
        ) from error


def _is_whole(path: Path) -> bool:
    """Return whether the file ends with the seal of its content."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    tail = len(_SEAL) + hashlib.sha256().digest_size
    return content[-tail:] == hashlib.sha256(content[:-tail]).digest() + _SEAL


def _usable(path: Path, refused: os.stat_result | None) -> bool:
    """Return whether the file is whole and not the very one that did not load."""
    if not _is_whole(path):
        return False
    found = path.stat()
    return refused is None or (found.st_ino, found.st_mtime_ns) != (refused.st_ino, refused.st_mtime_ns)


def _find_or_compile(plan: Plan, refused: os.stat_result | None) -> Path:
    """Return a finished library from the cache, or make one there.

    Args:
        plan: what to make.
        refused: of a file that did not load and is to be replaced.
    """
    for folder in _cache_folders():
        if _usable(folder / plan.file_name, refused):
            return folder / plan.file_name
    target = _writable_folder() / plan.file_name
    with _alone(target):
        if _usable(target, refused):  # made by the process that we waited for
            return target
        _clear_leftovers(target)
        name = plan.facts["name"]
        logger.info(
            "building the local-attention kernels (%s), about %s, kept in %s", name, _DURATION[name], target
        )
        _compile(plan, target)
    return target


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Wait until no other process makes `target`, where the file system can promise that."""
    path = target.with_suffix(".lock")
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        yield
        return
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        # Whoever holds the removed file wakes up to a finished library; a latecomer at worst compiles once more.
        path.unlink(missing_ok=True)
    finally:
        os.close(lock)


def _clear_leftovers(target: Path) -> None:
    """Remove what killed builds have left; by age, because a lock may be blind to other machines' builds."""
    for left in target.parent.glob(f".{target.stem}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def _compile(plan: Plan, target: Path) -> None:
    """Compile to `target`, which appears whole or stays as it was.

    Raises:
        BuildError: the compiler failed; its output lies beside `target`.
    """
    try:
        workshop = Path(tempfile.mkdtemp(prefix=f".{target.stem}.", suffix=".tmp", dir=target.parent))
    except OSError as error:
        raise BuildError(
            f"cannot write to {target.parent} ({error}); let TORCH_EXTENSIONS_DIR name a folder"
        ) from error
    try:
        out = workshop / "library.so"
        if (runtime := toolchain.openmp_runtime()) is not None:
            # -fopenmp asks the linker for "libgomp.so": here it finds torch's, whatever that one's full name.
            (workshop / "libgomp.so").symlink_to(runtime)
        argv = plan.command(out, workshop)
        environment = {**os.environ, "LC_ALL": "C", "TMPDIR": str(workshop)}
        result = subprocess.run(
            argv,
            cwd=workshop,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        if result.returncode:
            log = target.with_suffix(".log")
            log.write_text(f"{' '.join(argv)}\n{result.stdout}")
            raise BuildError(_failure(argv[0], result, log))
        with open(out, "rb+") as file:
            seal = hashlib.sha256(file.read()).digest() + _SEAL
            file.write(seal)
        os.replace(out, target)
        target.with_suffix(".log").unlink(missing_ok=True)  # of an earlier failure
    except OSError as error:
        raise BuildError(
            f"building {target} failed ({error}); free space there or repair the compiler"
        ) from error
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def _failure(compiler: str, result: "subprocess.CompletedProcess[str]", log: Path) -> str:
    lines = [line.strip() for line in result.stdout.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"\b(error|fatal|undefined|cannot|killed)\b", line, re.I)]
    first = (telling or lines[-1:] or [f"exit code {result.returncode}"])[0]
    return f"{compiler} could not compile the local-attention kernels: {first}; all of its output is in {log}"
