"""Clocks and memory meters of the benchmarks, and what they run on."""

import ctypes
import gc
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

Call = Callable[[], object]

# A candidate's turn in a round lasts at least this long, so that fast ones get many tries.
TURN_SECONDS = 0.05
FLUSH_BYTES = 256 << 20  # more than any L2
COPY_BYTES = 2 << 30
# Long enough for the host to queue what is timed, so that launches are not part of it. About 1 ms.
HEAD_START_CYCLES = 2_000_000
ONE_LINE = 160


def sentence(error: BaseException) -> str:
    """Put a failure into one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    name = type(error).__name__
    return f"{name}: {text}"[:ONE_LINE].replace("|", "/")


def interleaved_minimum(
    calls: dict[str, Call], rounds: int, clock: Callable[[], float]
) -> dict[str, float | str]:
    """Time every call in turn, `rounds` times over, so that a busy moment of the machine hits all alike.

    Args:
        calls: by name; each ran before.
        rounds: how many turns each call gets.
        clock: seconds; `time.process_time` does not count what other processes take.

    Returns:
        The least seconds of each call, or the sentence of its failure.
    """
    best: dict[str, float | str] = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            least = best[name]
            if isinstance(least, str):
                continue
            begin = time.perf_counter()
            try:
                while True:
                    start = clock()
                    call()
                    least = min(least, clock() - start)
                    if time.perf_counter() - begin >= TURN_SECONDS:
                        break
            except Exception as error:
                best[name] = sentence(error)
            else:
                best[name] = least
    return best


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {field}")


def extra_host_bytes(call: Call) -> int:
    """Return by how much a call raises the resident memory at its highest; run it in a fresh process.

    Raises:
        OSError: this kernel does not let a process reset its high-water mark.
    """
    call()  # libraries, thread stacks and compiled code are not what is measured
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _status_bytes("VmRSS")
    result = call()
    peak = _status_bytes("VmHWM")
    del result
    return max(peak - before, 0)


class DeviceClock:
    """CUDA events around single calls: L2 emptied before each, launches queued ahead."""

    def __init__(self) -> None:
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def seconds(self, call: Call, repetitions: int, before: Call | None = None, warm_up: int = 5) -> float:
        """Return the median seconds of a call.

        Args:
            call: queues work on the current stream.
            repetitions: how many are timed.
            before: runs ahead of each call, untimed, on the same stream.
            warm_up: calls before the first timed one.
        """
        events = []
        for repetition in range(warm_up + repetitions):
            if before is not None:
                before()
            self.flush.zero_()
            torch.cuda._sleep(HEAD_START_CYCLES)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            if repetition >= warm_up:
                events.append((start, end))
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events) / 1000


class HostClock:
    """The same interface for a dry run on the CPU."""

    def seconds(self, call: Call, repetitions: int, before: Call | None = None, warm_up: int = 1) -> float:
        times = []
        for repetition in range(warm_up + repetitions):
            if before is not None:
                before()
            start = time.perf_counter()
            call()
            if repetition >= warm_up:
                times.append(time.perf_counter() - start)
        return statistics.median(times)


def extra_device_bytes(call: Call) -> int:
    """Return the most device memory that a call holds beyond what was allocated before it."""
    call()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del result
    return peak - before


def copy_rate(clock: DeviceClock | HostClock, device: torch.device, repetitions: int) -> float:
    """Measure the bytes per second, read and written, of a plain copy much larger than any cache."""
    size = COPY_BYTES if device.type == "cuda" else 1 << 20
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / clock.seconds(lambda: target.copy_(source), repetitions)


def matmul_rate(clock: DeviceClock | HostClock, device: torch.device, repetitions: int) -> float:
    """Measure the bfloat16 flops per second of a large matrix product."""
    width = 8192 if device.type == "cuda" else 64
    left, right = (torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * width**3 / clock.seconds(lambda: left @ right, repetitions)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    found = {line.split(":", 1)[0].strip(): line.split(":", 1)[1].strip() for line in lines if ":" in line}
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16") if flag in found.get("flags", "").split()]
    return f"{found.get('model name', platform.machine())} ({' '.join(wide) or platform.machine()})"


def _last_line(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    lines = result.stdout.strip().splitlines()
    return lines[-1].strip() if lines else None


def environment(device: torch.device) -> dict[str, str]:
    """What a figure depends on besides the code: hardware, versions, and the command."""
    facts = {
        "command": shlex.join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "processor": _processor(),
        "processors": f"{len(os.sched_getaffinity(0))}, load average {os.getloadavg()[0]:.1f} at the start",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = (
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"{properties.multi_processor_count} SMs, sm_{properties.major}{properties.minor}"
        )
        driver = _last_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts["driver"] = driver or "unknown"
        facts["cuda of torch"] = torch.version.cuda or "none"
        facts["nvcc"] = _last_line("nvcc", "--version") or "not on PATH"
    return facts
