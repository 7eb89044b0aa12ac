"""Time and peak memory of the training loss against the plain formula, forward and backward, candidates taking turns.

Seconds: with one thread on the CPU process time, else wall time, the median of the turns; on a GPU between events.
Memory: what a pass adds at its highest beyond inputs and weights, both gradients included. On the CPU the resident
high-water mark of a fresh process per candidate, on a GPU the allocator's.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from cogview2.pipeline.models.coglm.loss import LabelRanges, coglm_loss

sys.path.append(str(Path(__file__).resolve().parents[1] / "local_attention"))
import measure  # noqa: E402
import report  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MEMORY_SECONDS = 900
Call = Callable[[], tuple[torch.Tensor, ...]]


class Case:
    """The inputs of one micro batch: hidden states of every position, of which some have a loss."""

    def __init__(self, options: argparse.Namespace) -> None:
        device, dtype = torch.device(options.device), DTYPES[options.dtype]
        shape = options.batch, options.length
        torch.manual_seed(0)
        rows, hidden = options.vocabulary, options.hidden
        self.hidden_BSD = torch.randn(*shape, hidden, device=device, dtype=dtype).requires_grad_()
        self.words_VD = (torch.randn(rows, hidden, device=device, dtype=dtype) * 0.02).requires_grad_()
        self.labels_BS = torch.randint(0, rows, shape, device=device)
        order = torch.randperm(options.batch * options.length, device=device)
        self.loss_mask_BS = (order < options.positions).view(shape)
        self.weights_BS = torch.rand(shape, device=device) + 0.5
        third = rows // 3
        self.ranges = LabelRanges((0, third), (third, 2 * third), (2 * third, rows))

    @property
    def leaves(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.hidden_BSD, self.words_VD

    @property
    def gradient_bytes(self) -> int:
        """What the result of a pass holds, whoever makes it."""
        return sum(leaf.nbytes for leaf in self.leaves)

    def chunked(self) -> torch.Tensor:
        """Ours: the loss that training uses."""
        return coglm_loss(
            self.hidden_BSD, self.words_VD, self.labels_BS, self.loss_mask_BS, self.ranges, self.weights_BS
        ).loss

    def naive(self) -> torch.Tensor:
        """Float32 logits of all loss positions."""
        mask = self.loss_mask_BS
        logits_PV = F.linear(self.hidden_BSD[mask], self.words_VD).float()
        losses_P = F.cross_entropy(logits_PV, self.labels_BS[mask], reduction="none")
        return (losses_P * self.weights_BS[mask]).sum() / self.weights_BS[mask].sum()

    def every_position(self) -> torch.Tensor:
        """Float32 logits of every position; those without loss get weight 0."""
        logits_BSV = F.linear(self.hidden_BSD, self.words_VD).float()
        losses_X = F.cross_entropy(logits_BSV.flatten(0, 1), self.labels_BS.flatten(), reduction="none")
        weights_X = (self.weights_BS * self.loss_mask_BS).flatten()
        return (losses_X * weights_X).sum() / weights_X.sum()

    def call(self, name: str) -> Call:
        """Return a forward and backward pass as a call; it gives the gradients."""
        loss = {"chunked": self.chunked, "naive": self.naive, "every position": self.every_position}[name]
        return lambda: torch.autograd.grad(loss(), self.leaves)


NAMES = ("chunked", "naive", "every position")


def difference(case: Case, names: Sequence[str]) -> float:
    """Return by how much the losses of the candidates differ, as a share; the same work must give the same number."""
    losses = {"chunked": case.chunked, "naive": case.naive, "every position": case.every_position}
    with torch.no_grad():
        values = [float(losses[name]()) for name in names]
    return (max(values) - min(values)) / abs(values[0])


def seconds_of(call: Call, options: argparse.Namespace) -> float:
    """Time one pass."""
    if options.device == "cuda":
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    clock = time.process_time if options.threads == 1 else time.perf_counter
    begin = clock()
    call()
    return clock() - begin


def take_turns(case: Case, names: Sequence[str], options: argparse.Namespace) -> dict[str, list[float]]:
    """Time the candidates in rotation, after one pass of each that does not count."""
    calls = {name: case.call(name) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(options.turns + 1):
        for name, call in calls.items():
            seconds = seconds_of(call, options)
            if turn:
                times[name].append(seconds)
                print(f"{name}: {seconds:.3f} s", file=sys.stderr, flush=True)
    return times


def memory_of(name: str, options: argparse.Namespace) -> float | str:
    """Return the extra bytes of a pass, or a sentence why there are none."""
    if options.device == "cuda":
        case = Case(options)
        try:
            return measure.extra_device_bytes(case.call(name))
        except torch.OutOfMemoryError as error:
            return measure.sentence(error)
    argv = [sys.executable, __file__, *options.arguments, "--memory-of", name]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=MEMORY_SECONDS)
        return float(json.loads(done.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        return f"not done after {MEMORY_SECONDS} s"
    except (IndexError, ValueError):
        reason = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        return reason[: measure.ONE_LINE].replace("|", "/")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = {"vocabulary": 150_010, "hidden": 512, "batch": 4, "length": 512, "positions": 1600}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5, help="of every candidate")
    parser.add_argument("--only", default="", help=f"comma-separated: {', '.join(NAMES)}")
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")
    parser.add_argument("--quick", action="store_true", help="small sizes, one turn: does everything run?")
    parser.add_argument("--results", type=Path, help="a RESULTS.md whose section for this device is replaced")
    parser.add_argument("--json", type=Path, help="also write all figures here")
    parser.add_argument("--memory-of", choices=NAMES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.arguments = list(sys.argv[1:] if arguments is None else arguments)
    if options.quick:
        options.vocabulary, options.hidden, options.batch, options.length = 3000, 32, 2, 64
        options.positions, options.turns = 100, 1
    if not 0 < options.positions <= options.batch * options.length:
        parser.error(f"--positions is {options.positions}; batch * length = {options.batch * options.length}")
    return options


def targets(seconds: dict[str, float], memory: dict[str, Any], gradients: int) -> list[report.Target]:
    """Compare with the issue's bounds; `gradients` are the bytes that every candidate returns."""

    def share(of: Callable[[Any], Any]) -> float | str:
        found = report.ratio(of(memory.get("chunked")), of(memory.get("naive")))
        return 100 * found if isinstance(found, float) else found

    time_ratio = report.ratio(seconds.get("chunked"), seconds.get("naive"))
    beyond = share(lambda extra: _beyond(extra, gradients))
    return [
        report.Target("peak memory, of naive", share(lambda extra: extra), 25, 20, "%", at_most=True),
        report.Target("peak memory without the gradients, of naive", beyond, 25, 10, "%", at_most=True),
        report.Target("time, of naive", time_ratio, 1.15, 1, "x", at_most=True),
    ]


def _beyond(extra: Any, gradients: int) -> Any:
    return extra - gradients if isinstance(extra, (int, float)) else extra


def _mebibytes(extra: Any) -> Any:
    return extra / 2**20 if isinstance(extra, (int, float)) else extra


def _rows(seconds: dict[str, float], memory: dict[str, Any], gradients: int) -> list[list[Any]]:
    rows = []
    for name, value in seconds.items():
        extra = memory.get(name)
        share = report.ratio(extra, memory.get("naive"))
        against = report.ratio(value, seconds.get("naive"))
        percent = f"{100 * share:.1f} %" if isinstance(share, float) else ""
        row = [name, value, f"{against:.2f}x" if isinstance(against, float) else ""]
        rows.append([*row, _mebibytes(extra), percent, _mebibytes(_beyond(extra, gradients))])
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(json.dumps(measure.extra_host_bytes(Case(options).call(options.memory_of))))
        return 0
    names = [name.strip() for name in options.only.split(",") if name.strip()] or list(NAMES)
    if unknown := set(names) - set(NAMES):
        raise SystemExit(f"--only: unknown {sorted(unknown)}; choose from {', '.join(NAMES)}")
    facts = measure.environment(torch.device(options.device)) | {"threads": str(options.threads)}
    memory = {} if options.no_memory else {name: memory_of(name, options) for name in names}
    case = Case(options)
    apart = difference(case, names)
    times = take_turns(case, names, options)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    title = f"{options.positions} loss positions of {options.batch} x {options.length}, vocabulary {options.vocabulary}"
    head = ("candidate", "seconds", "x naive", "extra MiB", "of naive", "without the gradients")
    parts = [
        report.facts_table(facts),
        f"### {title}, hidden {options.hidden}, {options.dtype}",
        report.table(head, _rows(seconds, memory, case.gradient_bytes)),
        f"The losses differ by {apart:.1e} of their value. Gradients: {case.gradient_bytes / 2**20:.0f} MiB.",
        report.targets_table(targets(seconds, memory, case.gradient_bytes)),
    ]
    record = {"environment": facts, "seconds": times, "memory": memory, "difference": apart}
    section = "loss" if options.device == "cpu" else "loss gpu"
    report.publish("\n\n".join(parts), record, section, options.results, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
