"""Building the kernels: what decides about a library, the cache, builds that meet, builds that die."""

import errno
import fcntl
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from kernel_site import SUM, Site

from cogview2.ops.local_attention import build, toolchain

fork = multiprocessing.get_context("fork")

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    site = Site(tmp_path)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(site.cache.parent))
    monkeypatch.setenv("PATH", f"{site.bin}:{os.environ['PATH']}")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    toolchain.version.cache_clear()
    return site


def in_child(work: Callable[[], int]) -> int:
    """Run `work` in a process of its own, as loaded libraries stay loaded; return what it returned."""
    child = fork.Process(target=lambda: os._exit(work()))
    child.start()
    child.join(60)
    child.kill()
    assert child.exitcode is not None
    return child.exitcode


def test_built_once_then_found(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert build.state("cpu", site.csrc, site.installed).startswith("will be built when first used")
    assert site.open() == SUM
    assert site.open() == SUM
    assert site.compiled == 1
    (message,) = caplog.messages
    assert message.startswith("building the local-attention kernels (cpu), about 10 s, kept in ")
    (library,) = site.cache.iterdir()
    assert library.name == site.key() and library.suffix == ".so"
    assert build.state("cpu", site.csrc, site.installed) == f"built: {library}"


def test_the_process_has_one_openmp_runtime(site: Site) -> None:
    pytest.importorskip("torch")
    code = (
        "import sys; from pathlib import Path\n"
        "from cogview2.ops.local_attention import build\n"
        "library = build.open_library('cpu', Path(sys.argv[1]), Path('/nowhere'))\n"
        "import torch; torch.ones(300, 300) @ torch.ones(300, 300)\n"
        "assert library.local_attention_forward(None, None, None, 0) == 45\n"
        "maps = {line.split()[-1] for line in open('/proc/self/maps')}\n"
        "found = [path for path in maps if 'libgomp' in path or 'libiomp' in path or 'libomp' in path]\n"
        "assert len(found) == 1, found\n"
        "from cogview2.ops.local_attention import toolchain; ours = toolchain.openmp_runtime()\n"
        "assert ours is None or found == [str(ours)], (found, ours)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(site.csrc)], check=True)


def _open_together(site: Site, count: int) -> list[int | None]:
    """Open the library in several processes at once; return their exit codes."""
    begin = fork.Barrier(count)

    def rank() -> None:
        begin.wait()
        os._exit(site.open())

    ranks = [fork.Process(target=rank) for _ in range(count)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(30)
        process.kill()
    return [process.exitcode for process in ranks]


def test_many_processes_compile_once_and_all_load(site: Site) -> None:
    site.set_compiler(seconds=0.7)
    assert _open_together(site, 6) == [SUM] * 6
    assert site.compiled == 1
    assert [path.name for path in site.cache.iterdir()] == [site.key()]


def test_without_locks_all_compile_and_all_load(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    site.set_compiler(seconds=0.5)
    assert _open_together(site, 3) == [SUM] * 3
    assert site.compiled == 3
    assert [path.name for path in site.cache.glob("*.so")] == [site.key()]


def test_a_killed_build_leaves_neither_lock_nor_half_a_library(site: Site) -> None:
    site.set_compiler(seconds=60)

    def doomed() -> None:
        os.setsid()
        site.open()

    child = fork.Process(target=doomed)
    child.start()
    try:
        limit = time.monotonic() + 30
        while site.compiled == 0 and time.monotonic() < limit:
            time.sleep(0.02)
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert not list(site.cache.glob("*.so"))
        site.set_compiler()
        begin = time.monotonic()
        assert in_child(site.open) == SUM  # while the orphaned compiler still runs
        assert time.monotonic() - begin < 20
    finally:
        os.killpg(child.pid or 0, signal.SIGKILL)
    assert site.compiled == 2
    assert [path.name for path in site.cache.iterdir() if not path.name.startswith(".")] == [site.key()]
    (left,) = site.cache.glob(".*.tmp")
    old = time.time() - 2 * build._ABANDONED_SECONDS
    os.utime(left, (old, old))
    (site.cache / site.key()).unlink()
    build.prepare("cpu", site.csrc)
    assert [path.name for path in site.cache.iterdir()] == [site.key()]


@pytest.mark.parametrize("damage", ["empty", "half", "one byte less", "one byte more", "one byte other"])
def test_a_damaged_library_is_built_anew(site: Site, damage: str) -> None:
    library = build.prepare("cpu", site.csrc)
    whole = library.read_bytes()
    other = bytes([whole[1000] ^ 1])
    library.write_bytes(
        {
            "empty": b"",
            "half": whole[: len(whole) // 2],
            "one byte less": whole[:-1],
            "one byte more": whole + b"\0",
            "one byte other": whole[:1000] + other + whole[1001:],
        }[damage]
    )
    assert in_child(site.open) == SUM
    assert site.compiled == 2
    assert library.read_bytes() == whole


def seal(content: bytes) -> bytes:
    return content + hashlib.sha256(content).digest() + build._SEAL


def test_a_whole_file_that_does_not_load_is_replaced_once(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.cache.mkdir(parents=True)
    (site.cache / site.key()).write_bytes(seal(b"from another world"))
    assert in_child(site.open) == SUM
    assert site.compiled == 1


def test_a_library_that_never_loads_is_an_error(site: Site) -> None:
    (site.csrc / "cpu" / "api.cpp").write_text("int nothing_of_ours() { return 0; }\n")
    with pytest.raises(build.BuildError, match="was built but does not load .*local_attention_forward"):
        site.open()
    assert site.compiled == 2


def test_a_missing_compiler_is_said_in_one_sentence(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.missing("cpu", site.csrc, site.installed) is None
    monkeypatch.setenv("PATH", "/nowhere")
    sentence = "no C++ compiler was found (g++); install g++, or set CXX to one"
    assert build.missing("cpu", site.csrc, site.installed) == sentence
    assert build.state("cpu", site.csrc, site.installed) == f"cannot be built: {sentence}"
    with pytest.raises(build.BuildError) as caught:
        site.open()
    assert str(caught.value) == f"the local-attention kernels (cpu) cannot be built: {sentence}"
    monkeypatch.setenv("CXX", "/no/such/c++ -m64")
    assert "(/no/such/c++ -m64)" in str(build.missing("cpu", site.csrc, site.installed))


def test_missing_sources_are_said(site: Site) -> None:
    shutil.rmtree(site.csrc / "cpu")
    assert "cpu/*.cpp are not installed" in str(build.missing("cpu", site.csrc, site.installed))


def test_a_compiler_error_names_the_first_error_and_the_log(site: Site) -> None:
    (site.csrc / "cpu" / "api.cpp").write_text("int f() { return nonsense; }\n")
    with pytest.raises(build.BuildError) as caught:
        site.open()
    text = str(caught.value)
    assert "error: 'nonsense' was not declared" in text and "\n" not in text
    (log,) = site.cache.glob("*.log")
    assert str(log) in text and "nonsense" in log.read_text()
    assert not list(site.cache.glob("*.so")) and not list(site.cache.glob(".*.tmp"))


def test_cxx_chooses_the_compiler_and_clang_is_refused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.set_compiler(name="my-c++")
    monkeypatch.setenv("CXX", "my-c++ -DCHOSEN")
    assert toolchain.plan("cpu", site.csrc).compiler == (str(site.bin / "my-c++"), "-DCHOSEN")
    if toolchain.openmp_runtime() is None:
        return
    site.set_compiler(name="clang++", version="Debian clang version 17.0.6")
    monkeypatch.setenv("CXX", "clang++")
    with pytest.raises(build.BuildError, match="is clang, whose OpenMP runtime is not the one of torch"):
        site.open()


def test_what_changes_the_key(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [site.key()]

    def changed() -> bool:
        keys.append(site.key())
        return keys[-1] not in keys[:-1]

    (site.csrc / "cuda" / "fast.cuh").write_text("// CUDA only\n")
    (site.csrc / "cpu" / "notes.txt").write_text("no source\n")
    assert not changed()
    with open(site.csrc / "window.h", "a") as header:
        header.write("// a comment\n")
    assert changed()
    (site.csrc / "cpu" / "new.h").write_text("")
    assert changed()
    monkeypatch.setattr(toolchain, "cpu_features", lambda: ["x86_64", "avx2"])
    assert changed()
    monkeypatch.setattr(toolchain, "openmp_runtime", lambda: Path("/torch/lib/libgomp-0.so.1"))
    assert changed()
    monkeypatch.setenv("CXX", "g++ -O1")
    assert changed()


def test_a_folder_that_cannot_be_written_gives_way_to_a_private_one(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    assert site.open() == SUM
    private = tmp_path / f"cogview2-{os.getuid()}"
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert [path.name for path in private.iterdir()] == [site.key()]
    assert site.open() == SUM and site.compiled == 1


def test_a_temporary_folder_open_to_others_is_not_used(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    open_to_all = tmp_path / f"cogview2-{os.getuid()}"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    (open_to_all / site.key()).write_bytes(seal(b"planted"))
    library = build.prepare("cpu", site.csrc)
    assert library.parent != open_to_all
    assert stat.S_IMODE(library.parent.stat().st_mode) == 0o700
    assert site.compiled == 1


def test_without_the_variable_the_cache_is_in_the_home(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    library = build.prepare("cpu", site.csrc)
    assert library.parent == tmp_path / "home" / ".cache" / "cogview2"
    assert stat.S_IMODE(library.parent.stat().st_mode) == 0o700

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert build.prepare("cpu", site.csrc).parent == tmp_path / f"cogview2-{os.getuid()}"


def test_ahead_of_time_needs_no_compiler(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    library = build.make("cpu", site.installed, site.csrc)
    assert library == site.installed / "local_attention_cpu.so"
    assert json.loads(library.with_suffix(".json").read_text())["name"] == "cpu"
    monkeypatch.setenv("PATH", "/nowhere")
    assert build.missing("cpu", site.csrc, site.installed) is None
    assert build.is_installed("cpu", site.csrc, site.installed)
    assert build.state("cpu", site.csrc, site.installed) == f"installed ahead of time: {library}"
    assert site.open() == SUM
    assert not site.cache.exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"cpu": ["avx9", "x86_64"]}, "this CPU lacks avx9"),
        ({"sources": "0"}, "it was built from other sources"),
        ({"openmp": "libgomp-1.so"}, "it uses the OpenMP runtime libgomp-1.so"),
        ({"name": "cuda"}, "it was built from other sources"),
        ({"cpu": None}, "its facts cannot be read"),
        (None, "it is damaged"),
    ],
)
def test_an_ahead_of_time_build_for_another_machine_is_left_aside(
    site: Site, change: dict[str, object] | None, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    library = build.make("cpu", site.installed, site.csrc)
    facts = json.loads(library.with_suffix(".json").read_text())
    library.with_suffix(".json").write_text(json.dumps(facts | (change or {})))
    if change is None:
        library.write_bytes(library.read_bytes()[:-9])
    caplog.set_level(logging.INFO)
    assert not build.is_installed("cpu", site.csrc, site.installed)
    assert in_child(site.open) == SUM
    assert f"{library}, built ahead of time, is left aside: {reason}" in caplog.messages[0]
    assert site.compiled == 2


def test_cuda_says_what_is_missing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "no_device", lambda: "no CUDA device is visible")
    assert build.missing("cuda", site.csrc, site.installed) == "no CUDA device is visible"
    monkeypatch.setattr(toolchain, "no_device", lambda: None)
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    if not Path("/usr/local/cuda/bin/nvcc").exists():
        assert "no nvcc was found in CUDA_HOME or PATH" in str(
            build.missing("cuda", site.csrc, site.installed)
        )


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_nvcc_builds_a_library_for_two_architectures(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(site.csrc / "cuda" / "api.cu", "a") as source:
        source.write("__global__ void one(float* x) { *x = 1.f; }\n")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0")
    monkeypatch.setattr(toolchain, "capabilities", lambda: [])
    library = build.make("cuda", site.installed, site.csrc)
    assert b"sm_80" in library.read_bytes() and b"sm_90a" in library.read_bytes()
    facts = json.loads(library.with_suffix(".json").read_text())
    assert toolchain.unfit(facts, "cuda", [(8, 0), (9, 0)], site.csrc) is None
    assert "no code for compute capability 7.5" in str(toolchain.unfit(facts, "cuda", [(7, 5)], site.csrc))
    monkeypatch.setattr(toolchain, "no_device", lambda: None)
    assert (
        in_child(lambda: build.open_library("cuda", site.csrc, site.installed).local_attention_forward())
        == SUM
    )


def test_the_emulated_library_is_plain_cpp(site: Site) -> None:
    library = build.open_library("emulated", site.csrc, site.installed)
    assert library.local_attention_backward(None, None, None, 0) == SUM
