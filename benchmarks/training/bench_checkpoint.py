"""What it costs to commit a checkpoint: ours beside DeepSpeed's own, of the same engine, in turns.

Ranks are processes of this machine with gloo and ZeRO 1. DeepSpeed's `save_checkpoint` is measured alone, and followed by
fsync of the files that it wrote; ours verifies nothing less than a power loss: staging, sha256 while writing, fsync of files
and folders, a rename. Seconds are of the wall, the slowest rank's. Ours writes less: masters and moments once, no second copy
of the weights beside them; the seconds of a gigabyte stand beside.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import rank_processes
import synthetic
import torch

from cogview2.pipeline.config.deepspeed import resolve
from cogview2.pipeline.config.model import CogLMConfig, VocabularyConfig
from cogview2.pipeline.config.training import CheckpointConfig, TrainConfig
from cogview2.pipeline.data.sample_plan import DataState, SamplePlan
from cogview2.pipeline.distributed.process import World, barrier, gather_objects
from cogview2.pipeline.training.checkpoint import Checkpointer
from cogview2.pipeline.training.engine import PlainEngine
from cogview2.pipeline.training.state.identity import Identity
from cogview2.pipeline.training.state.manifest import Topology
from cogview2.pipeline.training.train_modules.coglm import CogLMTrainModule

sys.path.append(str(Path(__file__).resolve().parents[1] / "local_attention"))
import measure  # noqa: E402
import report  # noqa: E402

BARE, SYNCED, OURS = "bare DeepSpeed", "bare DeepSpeed, then fsync", "ours"
LEAST, AIM = 1.15, 1.0
"""Bounds of our time over DeepSpeed's with fsync."""


def _engine(options: argparse.Namespace, world: World, folder: Path) -> PlainEngine:
    path = folder / f"zero1_rank{world.rank}.json"
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}))
    train = TrainConfig(steps=10, global_batch=world.size, deepspeed=str(path))
    model = CogLMConfig(
        layers=options.layers,
        hidden=options.hidden,
        heads=options.heads,
        dropout=0.0,
        vocabulary=VocabularyConfig(rows=options.rows),
    )
    module = CogLMTrainModule(model, synthetic.vocabulary(options.rows))
    engine = PlainEngine(module, resolve(str(path), train, world.size, cpu=True), train.optimizer, world)
    batch = synthetic.samples(model, options.rows, 1, world.rank, torch.device("cpu"))
    engine.train_step(0, [batch], 1e-4)  # the optimizer has its moments from the first step on
    return engine


def _sync(folder: Path, rank: int) -> None:
    """Sync what this rank wrote, and on rank 0 what all did besides."""
    for path in folder.rglob("*"):
        mine = f"_rank_{rank}_" in path.name
        if path.is_dir() or mine or (rank == 0 and "_rank_" not in path.name):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def _memory(line: str) -> int:
    """Return a line of this process's status in bytes: VmRSS, or its peak VmHWM."""
    for text in Path("/proc/self/status").read_text().splitlines():
        if text.startswith(line):
            return int(text.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {line}")


def _forget_peak() -> int:
    """Let the peak begin at what is used now, and return that."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def measure_rank(options: argparse.Namespace, world: World, folder: Path) -> dict[str, Any]:
    """Save in every way, in turns: name -> seconds of each turn, bytes, bytes by which the peak of a rank's memory rose."""
    engine = _engine(options, world, folder)
    plan = SamplePlan([1024], 0)

    def bare(target: Path, synced: bool) -> None:
        engine.engine.save_checkpoint(str(target), tag="ds", save_latest=False)
        if synced:
            _sync(target, world.rank)

    def ours(target: Path) -> None:
        topology = Topology(world.size, 1, 1, "float32")
        writer = Checkpointer(target, world, Identity("benchmark"), topology, CheckpointConfig())
        writer.save(engine, 1, DataState.at(plan, "d", 0), torch.zeros(2, 1))

    ways: dict[str, Callable[[Path], None]] = {
        BARE: partial(bare, synced=False),
        SYNCED: partial(bare, synced=True),
        OURS: ours,
    }
    found: dict[str, Any] = {name: {"seconds": [], "bytes": 0, "peak": 0} for name in ways}
    for number in range(options.turns + 1):
        names = list(ways)[number % 3 :] + list(ways)[: number % 3]  # nobody always comes after the same one
        for name in names:
            target = folder / "unit" / "checkpoints"
            if world.is_first:
                target.mkdir(parents=True)
                os.sync()  # what earlier turns left is not written in this one
            barrier()
            before, begin = _forget_peak(), time.monotonic()
            ways[name](target)
            seconds = max(gather_objects(time.monotonic() - begin))
            peak = max(gather_objects(_memory("VmHWM") - before))
            if number > 0:  # the first turn warms up
                found[name]["seconds"].append(seconds)
                found[name]["peak"] = max(found[name]["peak"], peak)
            if world.is_first:
                found[name]["bytes"] = sum(p.stat().st_size for p in target.rglob("*") if p.is_file())
                print(f"turn {number}, {name}: {seconds:.2f} s", file=sys.stderr, flush=True)
                shutil.rmtree(folder / "unit")
            barrier()
    return found


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, size in {
        "layers": 7,
        "hidden": 1024,
        "heads": 16,
        "rows": 8192,
        "ranks": 2,
        "turns": 6,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument(
        "--folder", type=Path, help="where the checkpoints are written (default: a temporary folder)"
    )
    parser.add_argument("--results", type=Path, help="a RESULTS.md whose section 'checkpoint' is replaced")
    parser.add_argument("--json", type=Path, help="also write all figures here")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    facts = measure.environment(torch.device("cpu")) | {"deepspeed": deepspeed.__version__}
    found = rank_processes.run(partial(measure_rank, options), options.ranks, options.folder)
    median = {name: statistics.median(figures["seconds"]) for name, figures in found.items()}
    rows = [
        (
            name,
            median[name],
            min(found[name]["seconds"]),
            f"{median[name] / median[SYNCED]:.2f}x",
            found[name]["bytes"] / options.ranks / 1e6,
            median[name] / (found[name]["bytes"] / 1e9),
            found[name]["peak"] / 2**20,
        )
        for name in (BARE, SYNCED, OURS)
    ]
    head = ("way", "median s", "least s", f"of {SYNCED!r}", "MB a rank", "s/GB", "memory MiB")
    target = report.Target(
        "our median over DeepSpeed's with fsync", median[OURS] / median[SYNCED], LEAST, AIM, at_most=True
    )
    parts = [
        report.facts_table(facts),
        f"### {options.ranks} ranks, ZeRO 1, {options.layers} layers of {options.hidden}, {options.rows} rows, float32",
        report.table(head, rows),
        report.targets_table([target]),
    ]
    report.publish(
        "\n\n".join(parts),
        {"environment": facts, "turns": found},
        "checkpoint",
        options.results,
        options.json,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
