"""Training speed of the largest CogLM that fits one card: tokens and model FLOPs per second, utilisation, memory, profile.

bf16 weights, float32 masters and moments, global gradient clipping, the loss in chunks; micro batches, recomputed layers
and dropout are swept over one built model. Utilisation counts model FLOPs (nothing for recomputation) against the device's
figure on paper, and against a large matrix product in the same run. CUDA events around whole steps, after a warm-up.
"""

import argparse
import contextlib
import gc
import importlib.util
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType

sys.path.append(str(Path(__file__).resolve().parents[1] / "local_attention"))
try:
    import gpu_engines
    import measure
    import report
    import synthetic

    from cogview2.pipeline.config.cost import coglm_parameters
    from cogview2.pipeline.config.hardware import peak_flops
    from cogview2.pipeline.config.model import CogLMConfig, VocabularyConfig
    from cogview2.pipeline.models.transformer.attention import SelfAttention
except ImportError as lacking:
    raise SystemExit(
        f"bench_gpu_training.py needs the package {lacking.name}, which {sys.executable} lacks; "
        "install it there, or name another Python"
    ) from lacking

LEAST, AIM = 45, 55
"""Per cent of the figure on paper."""
BYTES_PER_PARAMETER = 16
STATES_SHARE = 0.75
"""Of the memory, at most; the rest is for activations."""
SWEEP = "12/0/0,16/16/0,8/0/0,24/32/0,32/48/0,12/12/0.1"
PROFILED_KERNELS = 15


@dataclass(frozen=True)
class Setting:
    """One row: samples of a micro batch, recomputed layers (the first ones), dropout."""

    micro_batch: int
    recomputed: int
    dropout: float

    def __str__(self) -> str:
        return (
            f"micro batch {self.micro_batch}, {self.recomputed} layers recomputed, dropout {self.dropout:g}"
        )


def read_sweep(text: str, layers: int) -> list[Setting]:
    """Read `MICRO_BATCH/RECOMPUTED_LAYERS/DROPOUT,...`; more layers than there are means all of them.

    Raises:
        SystemExit: another form.
    """
    try:
        parts = [entry.split("/") for entry in text.split(",")]
        found = [Setting(int(micro), min(int(again), layers), float(drop)) for micro, again, drop in parts]
    except ValueError:
        raise SystemExit(
            f"--sweep {text}: write MICRO_BATCH/RECOMPUTED_LAYERS/DROPOUT,..., such as {SWEEP}"
        ) from None
    return list(dict.fromkeys(found))


def fitting_layers(options: argparse.Namespace, memory_bytes: int) -> int:
    """Return the most layers, at most the published 48, whose weights and optimizer leave room for activations."""

    def states(layers: int) -> int:
        config = CogLMConfig(layers=layers, hidden=options.hidden, heads=options.heads)
        return BYTES_PER_PARAMETER * coglm_parameters(config, options.rows)

    fitting = [layers for layers in range(1, 49) if states(layers) <= STATES_SHARE * memory_bytes]
    return fitting[-1] if fitting else 0


class Bench:
    """One built model and its clock."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.options, self.device = options, device
        self.config = CogLMConfig(
            layers=options.layers,
            hidden=options.hidden,
            heads=options.heads,
            dropout=0.0,
            vocabulary=VocabularyConfig(rows=options.rows),
        )
        self.until = time.monotonic() + options.seconds
        self.on_gpu = device.type == "cuda"
        clock = measure.DeviceClock() if self.on_gpu else measure.HostClock()
        self.matmul = measure.matmul_rate(clock, device, 20 if self.on_gpu else 2)
        del clock
        self.flops = synthetic.train_flops(self.config, options.rows)
        name = torch.cuda.get_device_name(device) if self.on_gpu else None
        self.peak = peak_flops(None, name, "bf16")
        self.engine = gpu_engines.build(options, self.config, device)

    def measure(self, setting: Setting) -> dict[str, Any]:
        """Return the figures of a setting, or `failed` with a sentence; never raises."""
        if time.monotonic() > self.until:
            return {"failed": "not run: the time of --seconds was over"}
        try:
            return self._measure(setting)
        except Exception as error:
            return {"failed": measure.sentence(error)}
        finally:
            for parameter in self.engine.model.parameters():
                parameter.grad = None
            gc.collect()
            if self.on_gpu:
                torch.cuda.empty_cache()

    def prepare(self, setting: Setting) -> list[synthetic.Batch]:
        """Set the model up and return the micro batches of a step."""
        model = self.engine.model.train()
        gpu_engines.recompute(model, setting.recomputed)
        gpu_engines.set_dropout(model, setting.dropout)
        return [
            synthetic.samples(self.config, self.options.rows, setting.micro_batch, seed, self.device)
            for seed in range(self.options.accumulation)
        ]

    def _measure(self, setting: Setting) -> dict[str, Any]:
        micro_batches = self.prepare(setting)
        for _ in range(self.options.warm_up):
            self.engine.step(micro_batches)
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        seconds = statistics.median(self._times(micro_batches))
        samples = setting.micro_batch * self.options.accumulation
        rate = samples * self.flops / seconds
        return {
            "seconds": seconds,
            "tokens": samples * synthetic.sequence_of(self.config) / seconds,
            "tflops": rate / 1e12,
            "mfu": None if self.peak is None else 100 * rate / self.peak,
            "of matmul": 100 * rate / self.matmul,
            "peak": torch.cuda.max_memory_allocated() / 2**30 if self.on_gpu else None,
            "attention": self.backend(),
        }

    def _times(self, micro_batches: list[synthetic.Batch]) -> list[float]:
        """Seconds of each step."""
        if not self.on_gpu:
            times = []
            for _ in range(self.options.steps):
                begin = time.perf_counter()
                self.engine.step(micro_batches)
                times.append(time.perf_counter() - begin)
            return times
        events = [torch.cuda.Event(enable_timing=True) for _ in range(self.options.steps + 1)]
        events[0].record()
        for event in events[1:]:
            self.engine.step(micro_batches)
            event.record()
        torch.cuda.synchronize()
        return [first.elapsed_time(second) / 1000 for first, second in zip(events, events[1:], strict=False)]

    def backend(self) -> str:
        """Return what attends at the present setting."""
        first = self.engine.model.transformer.layers[0].attention
        assert isinstance(first, SelfAttention)
        return first.backend(self.device, torch.bfloat16)

    def profile(self, setting: Setting) -> list[tuple[str, int, float]]:
        """Return the kernels of one step: name, calls, seconds; those that take most first."""
        micro_batches = self.prepare(setting)
        self.engine.step(micro_batches)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.on_gpu:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
            self.engine.step(micro_batches)
            if self.on_gpu:
                torch.cuda.synchronize()
        # On a GPU the kernels themselves; the operators that started them have the same time once more.
        kind = DeviceType.CUDA if self.on_gpu else DeviceType.CPU
        spent = "self_device_time_total" if self.on_gpu else "self_cpu_time_total"
        found = [
            (event.key, event.count, getattr(event, spent) / 1e6)
            for event in profiler.key_averages()
            if event.device_type == kind and not getattr(event, "is_user_annotation", False)
        ]
        return sorted((row for row in found if row[2] > 0), key=lambda row: -row[2])


def profile_text(setting: Setting, kernels: Sequence[tuple[str, int, float]]) -> str:
    """Return a plain table: share of the time, milliseconds, calls, name."""
    total = sum(seconds for _, _, seconds in kernels)
    lines = [f"{setting}: {1000 * total:.1f} ms in {sum(calls for _, calls, _ in kernels)} calls"]
    lines += [
        f"{seconds / total:6.1%} {1000 * seconds:9.2f} ms {calls:6d}  {name[:110]}"
        for name, calls, seconds in kernels[:PROFILED_KERNELS]
    ]
    return "\n".join(lines)


HEAD = (
    *("setting", "attention", "ms per step", "tokens/s", "model TFLOP/s", "MFU"),
    *("of a matrix product", "peak GiB"),
)


def row_of(setting: Setting, row: dict[str, Any]) -> list[Any]:
    if "failed" in row:
        return [str(setting), row["failed"], *[""] * (len(HEAD) - 2)]
    share = "" if row["mfu"] is None else f"{row['mfu']:.1f} %"
    return [
        *(str(setting), row["attention"], 1000 * row["seconds"], row["tokens"], row["tflops"], share),
        *(f"{row['of matmul']:.1f} %", row["peak"]),
    ]


def target(rows: dict[Setting, dict[str, Any]], layers: int) -> report.Target:
    """Compare the best utilisation with the issue's bounds."""
    found = [row["mfu"] for row in rows.values() if row.get("mfu") is not None]
    measured = max(found) if found else "no figure on paper for this device"
    return report.Target(f"MFU, {layers} layers, best setting", measured, LEAST, AIM, "%")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--layers", type=int, help="by default the most that fit, at most 48")
    for name, size in {"hidden": 3072, "heads": 48, "rows": 150_010}.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument(
        "--engine",
        default="auto",
        choices=("auto", "bare", "deepspeed"),
        help="auto: deepspeed where it is installed",
    )
    parser.add_argument("--sweep", default=SWEEP, help="MICRO_BATCH/RECOMPUTED_LAYERS/DROPOUT,...")
    parser.add_argument("--accumulation", type=int, default=4, help="micro batches of a step")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a setting")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before them")
    parser.add_argument("--seconds", type=float, default=360, help="start no other setting after this")
    parser.add_argument("--profile", type=Path, help="also write the kernels of one step here")
    parser.add_argument("--json", type=Path, help="also write all figures here")
    parser.add_argument("--results", type=Path, help="a RESULTS.md whose section 'training gpu' is replaced")
    options = parser.parse_args(arguments)
    if options.engine == "auto":
        has_deepspeed = importlib.util.find_spec("deepspeed") is not None
        options.engine = "deepspeed" if has_deepspeed else "bare"
    return options


@contextlib.contextmanager
def _process_group(options: argparse.Namespace, device: torch.device) -> Iterator[None]:
    if options.engine == "bare":
        yield
        return
    from cogview2.pipeline.distributed.process import World, process_group

    with process_group(World(0, 1, 0, device)):
        yield


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench_gpu_training.py needs a CUDA device, and torch sees none", file=sys.stderr)
        return 1
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    if options.layers is None:
        memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
        options.layers = fitting_layers(options, memory)
        if not options.layers:
            print("no layer fits this device; give smaller --hidden, --rows or --layers", file=sys.stderr)
            return 2
    torch.manual_seed(0)
    facts = measure.environment(device)
    with _process_group(options, device):
        bench = Bench(options, device)
        rows: dict[Setting, dict[str, Any]] = {}
        for setting in read_sweep(options.sweep, options.layers):
            rows[setting] = bench.measure(setting)
            print(f"{setting}: {rows[setting]}", file=sys.stderr, flush=True)
        good = [setting for setting, row in rows.items() if "failed" not in row]
        best = max(good, key=lambda setting: rows[setting]["tflops"]) if good else None
        kernels = profile_text(best, bench.profile(best)) if best is not None else "nothing ran"
    facts["engine"] = f"{bench.engine.name}, {options.accumulation} micro batches a step"
    facts["matmul"] = f"{bench.matmul / 1e12:.3g} TFLOP/s in bf16"
    facts["on paper"] = "not in the table" if bench.peak is None else f"{bench.peak / 1e12:.0f} TFLOP/s"
    parameters = coglm_parameters(bench.config, options.rows) / 1e9
    size = f"{options.layers} layers of {options.hidden}, {options.rows} rows, {parameters:.2f} G parameters"
    if options.profile is not None:
        options.profile.parent.mkdir(parents=True, exist_ok=True)
        options.profile.write_text(kernels + "\n")
    parts = [
        report.facts_table(facts),
        f"### {size}",
        report.table(HEAD, [row_of(setting, row) for setting, row in rows.items()]),
        report.targets_table([target(rows, options.layers)]),
        f"One step at the fastest setting, by kernel:\n\n```\n{kernels}\n```",
    ]
    record = {"environment": facts, "matmul": bench.matmul, "peak": bench.peak, "parameters": parameters}
    record["settings"] = {str(setting): row for setting, row in rows.items()}
    report.publish("\n\n".join(parts), record, "training gpu", options.results, options.json)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
