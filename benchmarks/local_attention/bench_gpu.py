"""Time and memory of local attention on a CUDA device against other ways to do the same work, in one process.

CUDA events around single calls, L2 emptied before each, launches queued ahead; the median. All shares refer to a plain
copy measured in the same run. A candidate that fails keeps its sentence in its row, and the others go on.
"""

import argparse
import functools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import measure
import peers
import report
import torch
from cases import (
    CAUSAL_COARSE,
    DIRECT,
    GPU_CASES,
    HEADLINE,
    ITERATIVE,
    TINY_CASES,
    Case,
    Inputs,
    least_bytes,
    make_inputs,
    useful_flops,
)

HEADS, BATCH = 48, 8
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SLOW_SECONDS, SLOW_REPETITIONS = 0.04, 11
MODES = ("forward", "backward", "both")
HEAD = (
    *("candidate", "forward ms", "x ours", "backward ms", "x ours", "sum ms", "x ours"),
    *("TFLOP/s fwd", "GB/s fwd", "copy rate fwd", "copy rate bwd"),
    *("extra MiB fwd", "of eager", "extra MiB fwd + bwd", "of eager"),
)
NO_COMPILER = ("dense flash", "dense cudnn", "ours")
USUAL = ("eager dense", *NO_COMPILER, "FlexAttention 128")
# These try many kernels while compiling, which takes minutes.
PATIENT = tuple(peer.name for peer in peers.GPU_PEERS if "autotuned" in peer.name or "tiles" in peer.name)
MERGED = "ours, separate + merge"


@dataclass(frozen=True)
class Job:
    """A case at a batch size and dtype, and which candidates run (empty: all that fit a window alone, in time)."""

    case: Case
    batch: int
    dtype: str
    names: tuple[str, ...] = ()

    def takes(self, name: str) -> bool:
        return name in self.names if self.names else name not in (*PATIENT, MERGED)

    @property
    def title(self) -> str:
        case = self.case
        return f"{case.title}, batch {self.batch}, {case.heads} heads of {case.channels}, {self.dtype}"


def ours_and_peers(device: torch.device) -> list[peers.Peer]:
    """All candidates; ours last, so that a kernel of ours that breaks the device spoils no other's row."""
    backend: Literal["cuda", "cpu"] = "cuda" if device.type == "cuda" else "cpu"
    mine = [
        peers.Peer(MERGED, peers.separate_and_merged(backend)),
        peers.Peer("ours, plain kernel", peers.ours_plain, backward=False),
        peers.Peer("ours", peers.ours(backend)),
    ]
    return [*peers.GPU_PEERS, *mine]


def jobs(tiny: bool) -> list[Job]:
    """What to measure, the most wanted first: time may run out."""
    if tiny:
        names: tuple[str, ...] = (
            "eager dense",
            "dense flash",
            "dense cudnn",
            "masked SDPA",
            "unfused (slices)",
        )
        names += (MERGED, "ours")
        return [Job(case, 2, "fp32", names) for case in TINY_CASES]
    wide = {case.name: Case(case.name, case.layout, HEADS, case.channels) for case in GPU_CASES}
    headline = wide[HEADLINE.name]
    found = [
        Job(headline, BATCH, "bf16"),
        Job(
            wide[ITERATIVE.name],
            BATCH,
            "bf16",
            (*USUAL, "NATTEN", "NATTEN hopper-fna", MERGED),
        ),
        Job(wide[DIRECT.name], BATCH, "bf16", (*USUAL, MERGED)),
        Job(wide[CAUSAL_COARSE.name], BATCH, "bf16", (*USUAL, MERGED)),
        Job(headline, BATCH, "bf16", PATIENT),
        Job(headline, BATCH, "fp16", USUAL),
        Job(headline, 1, "bf16", USUAL),
        Job(headline, 4, "bf16", USUAL),
    ]
    done = {(job.case.name, job.batch, job.dtype) for job in found}
    for dtype in ("bf16", "fp16"):
        for batch in (1, 4, BATCH):
            for case in wide.values():
                if (case.name, batch, dtype) not in done:
                    found.append(Job(case, batch, dtype, NO_COMPILER))
    return found


class Candidate:
    """A peer over the inputs of a job: its passes as calls."""

    def __init__(self, peer: peers.Peer, case: Case, inputs: Inputs) -> None:
        self.trains = peer.backward
        self.leaves = inputs.leaves
        self.attend = peer.prepare(case, inputs)
        self.gradient = torch.randn_like(inputs.query, memory_format=torch.contiguous_format)
        self.out: torch.Tensor | None = None

    def forward(self) -> torch.Tensor:
        with torch.set_grad_enabled(self.trains):
            return self.attend()

    def prepare_backward(self) -> None:
        self.out = self.forward()

    def backward(self) -> tuple[torch.Tensor, ...]:
        assert self.out is not None
        out, self.out = self.out, None
        return torch.autograd.grad(out, self.leaves, self.gradient)

    def both(self) -> tuple[torch.Tensor, ...]:
        self.prepare_backward()
        return self.backward()


class Bench:
    """The clock, the ceilings and the time left of one run."""

    def __init__(self, device: torch.device, repetitions: int, seconds: float) -> None:
        self.device = device
        self.repetitions = repetitions
        self.until = time.monotonic() + seconds
        self.clock = measure.DeviceClock() if device.type == "cuda" else measure.HostClock()
        self.copy_rate = measure.copy_rate(self.clock, device, repetitions)
        self.matmul_rate = measure.matmul_rate(self.clock, device, repetitions)

    def _median(self, call: measure.Call, before: measure.Call | None = None) -> float:
        first = self.clock.seconds(call, 2, before, warm_up=2)
        repetitions = self.repetitions if first < SLOW_SECONDS else min(SLOW_REPETITIONS, self.repetitions)
        return self.clock.seconds(call, repetitions, before)

    def measure(self, peer: peers.Peer, job: Job) -> dict[str, Any]:
        """Return seconds by mode and extra bytes by mode, or `failed` with a sentence; never raises."""
        row: dict[str, Any] = {}
        if time.monotonic() > self.until and peer.name != "ours":
            return {"failed": "not run: the time of --seconds was over"}
        try:
            inputs = make_inputs(job.case, job.batch, DTYPES[job.dtype], self.device)
            candidate = Candidate(peer, job.case, inputs.leaf_copy(peer.backward))
            row["forward"] = self._median(candidate.forward)
            if self.device.type == "cuda":
                row["extra forward"] = measure.extra_device_bytes(candidate.forward)
            if peer.name == "ours":
                row["kernels"] = peers.kernel_names(job.case, inputs)
            if peer.backward:
                row["backward"] = self._median(candidate.backward, candidate.prepare_backward)
                row["both"] = row["forward"] + row["backward"]
                if self.device.type == "cuda":
                    row["extra both"] = measure.extra_device_bytes(candidate.both)
        except Exception as error:
            row["failed"] = measure.sentence(error)
        if self.device.type == "cuda":
            self._tidy()
        return row

    def _tidy(self) -> None:
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            print(f"the device is lost: {measure.sentence(error)}", file=sys.stderr)

    def run(self, job: Job, only: str) -> dict[str, Any]:
        """Measure all candidates of a job whose name holds `only`; ours always runs."""
        rows = {}
        for peer in ours_and_peers(self.device):
            wanted = job.takes(peer.name) and only.lower() in peer.name.lower()
            if wanted or (peer.name == "ours" and job.names != PATIENT):
                begin = time.monotonic()
                rows[peer.name] = self.measure(peer, job)
                shown = rows[peer.name].get("failed") or f"{1000 * rows[peer.name]['forward']:.3f} ms"
                spent = time.monotonic() - begin
                print(f"{job.title}: {peer.name}: {shown} ({spent:.0f} s)", file=sys.stderr, flush=True)
        return {
            "title": job.title,
            "case": job.case.name,
            "batch": job.batch,
            "dtype": job.dtype,
            "rows": rows,
        }


def _value(rows: dict[str, Any], name: str, key: str) -> Any:
    row = rows.get(name, {})
    return row.get(key, row.get("failed"))


def _times(value: float | str) -> str:
    return f"{value:.2f}x" if isinstance(value, float) else ""


def job_table(record: dict[str, Any], job: Job, bench: Bench) -> str:
    """The table of a job."""
    rows, table = record["rows"], []
    dtype = DTYPES[job.dtype]
    for name, row in rows.items():
        cells: list[Any] = [name]
        for mode in MODES:
            seconds = row.get(mode)
            cells.append(row.get("failed") if seconds is None else 1000 * seconds)
            cells.append(_times(report.ratio(seconds, _value(rows, "ours", mode))))
        forward, backward = row.get("forward"), row.get("backward")
        moved = {mode: least_bytes(job.case, job.batch, dtype, mode) for mode in MODES}
        cells.append(forward and useful_flops(job.case, job.batch, "forward") / forward / 1e12)
        cells.append(forward and moved["forward"] / forward / 1e9)
        cells.append(forward and f"{100 * moved['forward'] / forward / bench.copy_rate:.1f} %")
        cells.append(backward and f"{100 * moved['backward'] / backward / bench.copy_rate:.1f} %")
        for key in ("extra forward", "extra both"):
            extra = row.get(key)
            cells.append(extra / 2**20 if extra is not None else None)
            share = report.ratio(extra, _value(rows, "eager dense", key))
            cells.append(f"{100 * share:.2f} %" if isinstance(share, float) else "")
        table.append(cells)
    kernels = rows.get("ours", {}).get("kernels")
    served = f"\n\nOurs was served by {kernels}." if kernels else ""
    return f"### {job.title}\n\n{report.table(HEAD, table)}{served}"


def _best(rows: dict[str, Any], prefix: str, key: str) -> float | str | None:
    """The least figure of all candidates of that prefix, or the first reason why there is none."""
    named = {name: row for name, row in rows.items() if name.startswith(prefix)}
    figures = [row[key] for row in named.values() if isinstance(row.get(key), float)]
    reasons = [row["failed"] for row in named.values() if "failed" in row]
    return min(figures) if figures else (reasons[0] if reasons else None)


def targets(records: Sequence[dict[str, Any]], bench: Bench) -> list[report.Target]:
    """Compare with the issue's bounds what was measured of them."""
    found: list[report.Target] = []
    for record in records:
        rows, is_wanted = record["rows"], (record["batch"], record["dtype"]) == (BATCH, "bf16")
        over_ours = functools.partial(_over_ours, rows)
        if record["case"] == HEADLINE.name and is_wanted:
            job = next(job for job in jobs(False) if job.case.name == HEADLINE.name)
            shares = [_share(rows, job, mode, bench.copy_rate) for mode in ("forward", "backward")]
            found += [
                report.Target("forward, share of the copy rate", shares[0], 50, 65, "%"),
                report.Target("forward vs eager dense", over_ours("eager dense", "forward"), 35, 45),
                report.Target("forward vs best dense SDPA", over_ours("dense ", "forward"), 8, 11),
                report.Target(
                    "forward vs best FlexAttention", over_ours("FlexAttention", "forward"), 2.5, 3.5
                ),
                report.Target("forward vs NATTEN", over_ours("NATTEN", "forward"), 2, 3.5),
                report.Target("forward vs unfused", over_ours("unfused", "forward"), 20, 40),
                report.Target("backward vs best FlexAttention", over_ours("FlexAttention", "backward"), 2, 3),
                report.Target("backward vs dense flash", over_ours("dense flash", "backward"), 7, 10),
                report.Target("backward, share of the copy rate in two passes", shares[1], 45, 60, "%"),
                report.Target("forward + backward vs eager dense", over_ours("eager dense", "both"), 20, 30),
                report.Target(
                    "extra memory forward, of eager dense",
                    _memory(rows, "extra forward"),
                    1,
                    0.8,
                    "%",
                    at_most=True,
                ),
                report.Target(
                    "extra memory with backward, of eager dense",
                    _memory(rows, "extra both"),
                    2.5,
                    2,
                    "%",
                    at_most=True,
                ),
            ]
        for case, words in ((ITERATIVE, "tokens"), (DIRECT, "coarse keys")):
            if record["case"] == case.name and is_wanted:
                merged = over_ours(MERGED, "forward")
                title = f"{words} in one softmax vs separate calls and merge"
                found.append(report.Target(title, merged, 1.3, 1.7))
    return found


def _over_ours(rows: dict[str, Any], prefix: str, key: str) -> float | str:
    return report.ratio(_best(rows, prefix, key), _value(rows, "ours", key))


def _share(rows: dict[str, Any], job: Job, mode: str, copy_rate: float) -> float | str:
    least = least_bytes(job.case, job.batch, DTYPES[job.dtype], mode) / copy_rate
    share = report.ratio(least, _value(rows, "ours", mode))
    return 100 * share if isinstance(share, float) else share


def _memory(rows: dict[str, Any], key: str) -> float | str:
    share = report.ratio(_value(rows, "ours", key), _value(rows, "eager dense", key))
    return 100 * share if isinstance(share, float) else share


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="candidates whose name holds this; ours always runs")
    parser.add_argument(
        "--cases", default="", help="tables whose title holds this, such as '64x64 9x9, batch 8'"
    )
    parser.add_argument("--repetitions", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=420, help="start no other candidate after this")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="tiny cases: does everything run?")
    parser.add_argument("--json", type=Path, help="also write all figures here")
    parser.add_argument("--results", type=Path, help="a RESULTS.md whose section 'gpu' is replaced")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("bench_gpu.py needs a CUDA device, and torch sees none", file=sys.stderr)
        return 1
    if device.type == "cpu" and not options.tiny:
        print("--device cpu is a dry run; add --tiny, or run bench_cpu.py", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    facts = measure.environment(device)
    bench = Bench(
        device, min(options.repetitions, 2) if options.tiny else options.repetitions, options.seconds
    )
    facts["copy"] = f"{bench.copy_rate / 1e9:.0f} GB/s read and written"
    facts["matmul"] = f"{bench.matmul_rate / 1e12:.3g} TFLOP/s in bf16, 8192 wide"
    records: dict[Job, dict[str, Any]] = {}  # by the first job of a title: one table each
    for job in jobs(options.tiny):
        if options.cases in job.title:
            record = bench.run(job, options.only)
            first = next((known for known in records if known.title == job.title), None)
            if first is None:
                records[job] = record
            else:
                records[first]["rows"] |= record["rows"]
    tables = [job_table(record, job, bench) for job, record in records.items()]
    verdicts = targets(list(records.values()), bench)
    parts = [report.facts_table(facts)]
    if verdicts:
        parts.append("Against the targets:\n\n" + report.targets_table(verdicts))
    record = {"environment": facts, "copy": bench.copy_rate, "matmul": bench.matmul_rate}
    record["tables"] = list(records.values())
    report.publish("\n\n".join([*parts, *tables]), record, "gpu", options.results, options.json)
    return 1 if any("failed" in record["rows"]["ours"] for record in records.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
