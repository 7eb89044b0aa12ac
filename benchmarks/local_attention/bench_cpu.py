"""Time and memory of local attention on the CPU against other ways to do the same work, in one process.

Seconds are process CPU time, the least of many turns taken in rotation; with several threads, wall time. Memory is
the high-water mark of a fresh process per row.
"""

import argparse
import functools
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
import peers
import report
import torch
from cases import CPU_CASES, HEADLINE, TINY_CASES, Case, make_inputs, useful_flops

MODES = ("forward", "both")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SGEMM_SIZE = 2048
MEMORY_SECONDS = 900
CPU = torch.device("cpu")
HEAD = (
    "candidate",
    "forward ms",
    "x ours",
    "fwd + bwd ms",
    "x ours",
    "GFLOP/s fwd",
    "fwd + bwd",
    "fwd of sgemm",
)
HEAD_MEMORY = ("extra MiB fwd", "of eager", "extra MiB fwd + bwd", "of eager")


def step(peer: peers.Peer, case: Case, batch: int, dtype: torch.dtype, mode: str) -> measure.Call:
    """Prepare one forward pass, or one with gradients of all inputs, as a call; run it once.

    Raises:
        NotForThisCaseError: the peer has no such pass.
    """
    if mode == "both" and not peer.backward:
        raise peers.NotForThisCaseError("no backward pass on the CPU")
    inputs = make_inputs(case, batch, dtype, CPU).leaf_copy(mode == "both")
    attend = peer.prepare(case, inputs)
    if mode == "forward":
        call: measure.Call = torch.no_grad()(attend)
    else:
        gradient = torch.randn_like(inputs.query)
        call = functools.partial(_forward_backward, attend, inputs.leaves, gradient)
    call()
    return call


def _forward_backward(
    attend: peers.Call, leaves: list[torch.Tensor], gradient: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(attend(), leaves, gradient)


def time_case(
    case: Case, dtype: torch.dtype, chosen: Sequence[peers.Peer], options: argparse.Namespace
) -> dict[str, dict[str, float | str]]:
    """Time all candidates of a case in rotation; seconds or a sentence by mode and name, sgemm among them."""
    clock = time.process_time if options.threads == 1 else time.perf_counter
    left, right = (torch.randn(SGEMM_SIZE, SGEMM_SIZE) for _ in range(2))
    times = {}
    for mode in MODES:
        calls: dict[str, measure.Call] = {"sgemm": lambda: left @ right}
        failed: dict[str, float | str] = {}
        for peer in chosen:
            try:
                calls[peer.name] = step(peer, case, 1, dtype, mode)
            except Exception as error:
                failed[peer.name] = measure.sentence(error)
        found = measure.interleaved_minimum(calls, options.rounds, clock) | failed
        times[mode] = {name: found[name] for name in ["sgemm", *(peer.name for peer in chosen)]}
    return times


def memory_of(peer: str, case: Case, dtype: str, mode: str, options: argparse.Namespace) -> float | str:
    """Ask a fresh process for the extra bytes of a pass."""
    wish = json.dumps({"peer": peer, "case": case.name, "dtype": dtype, "mode": mode})
    argv = [sys.executable, __file__, "--threads", str(options.threads), "--memory-of", wish]
    argv += ["--quick"] * options.quick
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=MEMORY_SECONDS)
        return float(json.loads(done.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        return f"not done after {MEMORY_SECONDS} s"
    except (IndexError, ValueError):
        reason = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        return reason.removeprefix("peers.")[: measure.ONE_LINE].replace("|", "/")


def answer_memory(wish: str, options: argparse.Namespace) -> None:
    """Be the fresh process: print the extra bytes."""
    asked = json.loads(wish)
    case = next(case for case in _cases(options) if case.name == asked["case"])
    peer = next(peer for peer in peers.CPU_PEERS if peer.name == asked["peer"])
    call = step(peer, case, 1, DTYPES[asked["dtype"]], asked["mode"])
    print(json.dumps(measure.extra_host_bytes(call)))


def _rates(case: Case, seconds: dict[str, dict[str, Any]], name: str) -> list[Any]:
    """Useful GFLOP/s of both modes, and the forward one's share of sgemm."""
    rates = []
    for mode in MODES:
        value = seconds[mode].get(name)
        rates.append(useful_flops(case, 1, mode) / value / 1e9 if isinstance(value, float) else None)
    sgemm = 2 * SGEMM_SIZE**3 / seconds["forward"]["sgemm"] / 1e9
    return [*rates, f"{100 * rates[0] / sgemm:.0f} %" if rates[0] else None]


def case_table(record: dict[str, Any], case: Case) -> str:
    """One table of a case: times, ratios to ours, rates, and memory beside eager dense."""
    seconds, memory = record["seconds"], record["memory"]
    rows = []
    for name in seconds["forward"]:
        if name == "sgemm":
            continue
        row: list[Any] = [name]
        for mode in MODES:
            value = seconds[mode].get(name)
            row.append(1000 * value if isinstance(value, float) else value)
            against = report.ratio(value, seconds[mode].get("ours"))
            row.append(f"{against:.1f}x" if isinstance(against, float) else "")
        row += _rates(case, seconds, name)
        for mode in MODES if memory else ():
            extra = memory[mode].get(name)
            row.append(extra / 2**20 if isinstance(extra, float) else extra)
            share = report.ratio(extra, memory[mode].get("eager dense"))
            row.append(f"{100 * share:.1f} %" if isinstance(share, float) else "")
        rows.append(row)
    sgemm = 2 * SGEMM_SIZE**3 / seconds["forward"]["sgemm"] / 1e9
    head = HEAD + HEAD_MEMORY if memory else HEAD
    title = f"{case.title}, {case.heads} heads of {case.channels}, {record['dtype']}"
    return f"### {title}\n\n{report.table(head, rows)}\n\nsgemm in the same run: {sgemm:.0f} GFLOP/s."


def targets(record: dict[str, Any], case: Case) -> list[report.Target]:
    """Compare the issue's case with its bounds."""
    seconds, memory = record["seconds"], record["memory"]
    forward, both = seconds["forward"], seconds["both"]

    def of_sgemm(mode: str) -> float | str:
        rate = report.ratio(useful_flops(case, 1, mode), seconds[mode].get("ours"))
        share = report.ratio(rate, 2 * SGEMM_SIZE**3 / seconds[mode]["sgemm"])
        return 100 * share if isinstance(share, float) else share

    def of_eager(mode: str) -> float | str:
        extra = memory.get(mode, {})
        share = report.ratio(extra.get("ours"), extra.get("eager dense"))
        return 100 * share if isinstance(share, float) else share

    def over_ours(times: dict[str, Any], name: str) -> float | str:
        return report.ratio(times.get(name), times.get("ours"))

    return [
        report.Target("forward vs masked SDPA", over_ours(forward, "masked SDPA"), 20, 45),
        report.Target("forward + backward vs masked SDPA", over_ours(both, "masked SDPA"), 20, 50),
        report.Target("forward vs compiled FlexAttention", over_ours(forward, "FlexAttention"), 6, 12),
        report.Target("forward vs unfold", over_ours(forward, "unfold"), 80, 200),
        report.Target("useful rate forward, of sgemm", of_sgemm("forward"), 30, 60, "%"),
        report.Target("useful rate forward + backward, of sgemm", of_sgemm("both"), 30, 60, "%"),
        report.Target("extra memory forward, of eager dense", of_eager("forward"), 3, 1.5, "%", at_most=True),
        report.Target(
            "extra memory with backward, of eager dense", of_eager("both"), 6, 3, "%", at_most=True
        ),
    ]


def _cases(options: argparse.Namespace) -> tuple[Case, ...]:
    return TINY_CASES if options.quick else CPU_CASES


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10, help="turns of every candidate")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--peers", default="", help="comma-separated names; ours always runs")
    parser.add_argument("--dtypes", default="", help="comma-separated: fp32,bf16 (bf16: first case only)")
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")
    parser.add_argument("--quick", action="store_true", help="tiny cases, few turns: does everything run?")
    parser.add_argument("--json", type=Path, help="also write all figures here")
    parser.add_argument("--results", type=Path, help="a RESULTS.md whose section 'cpu' is replaced")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.rounds = min(options.rounds, 2) if options.quick else options.rounds
    return options


def _chosen(names: str) -> list[peers.Peer]:
    wanted = [name.strip().lower() for name in names.split(",") if name.strip()]
    known = {peer.name.lower() for peer in peers.CPU_PEERS}
    if unknown := set(wanted) - known:
        raise SystemExit(f"--peers: unknown {sorted(unknown)}; choose from {sorted(known)}")
    return [
        peer
        for peer in peers.CPU_PEERS
        if not wanted or peer.name.lower() in wanted or peer.name in ("ours", "eager dense")
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.memory_of:
        answer_memory(options.memory_of, options)
        return 0
    facts = measure.environment(CPU) | {"threads": str(options.threads)}
    chosen = _chosen(options.peers)
    records: list[dict[str, Any]] = []
    parts = [report.facts_table(facts)]
    for case in _cases(options):
        if options.only not in case.name:
            continue
        for dtype in (options.dtypes or ("fp32,bf16" if case.name == HEADLINE.name else "fp32")).split(","):
            seconds = time_case(case, DTYPES[dtype], chosen, options)
            record: dict[str, Any] = {"case": case.name, "title": case.title, "dtype": dtype}
            record |= {"seconds": seconds, "memory": {}}
            if not options.no_memory:
                record["memory"] = {
                    mode: {peer.name: memory_of(peer.name, case, dtype, mode, options) for peer in chosen}
                    for mode in MODES
                }
            records.append(record)
            parts.append(case_table(record, case))
            print(parts[-1] + "\n", file=sys.stderr, flush=True)
            if dtype == "fp32" and case.name in (HEADLINE.name, TINY_CASES[0].name):
                parts.append(f"Against the targets, {case.title}:\n")
                parts[-1] += "\n" + report.targets_table(targets(record, case))
    record_of_all = {"environment": facts, "cases": records}
    report.publish("\n\n".join(parts), record_of_all, "cpu", options.results, options.json)
    missing = any(
        not isinstance(record["seconds"]["forward"].get("ours"), float)
        or not math.isfinite(record["seconds"]["forward"]["ours"])
        for record in records
    )
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
