"""What our trainer and DeepSpeed cost over a bare torch loop of the same model, same ranks, same batches, same optimizer.

Ranks are processes of this machine, one thread each, gloo. All candidates train a copy of one small CogLM, in turns. A
turn is one whole `Trainer.fit` of ours (with its log lines and heartbeats), or as many steps of a loop; the first step of
a turn and what comes after the last one are not timed. Seconds are process CPU time, summed over the ranks, the least of
the turns, so that other processes cost little; waiting for the other rank shows in the wall time beside it.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import rank_processes
import synthetic
import torch
from torch.nn.parallel import DistributedDataParallel

from cogview2.pipeline.config.deepspeed import resolve
from cogview2.pipeline.config.model import CogLMConfig, VocabularyConfig
from cogview2.pipeline.config.training import TrainConfig
from cogview2.pipeline.data.sample_plan import SamplePlan
from cogview2.pipeline.distributed.process import World, barrier, gather_objects
from cogview2.pipeline.stage_dir import StageDirectory
from cogview2.pipeline.training.checkpoint import Checkpointer
from cogview2.pipeline.training.engine import PlainEngine
from cogview2.pipeline.training.meters import Work
from cogview2.pipeline.training.modules import Batch, TrainModule
from cogview2.pipeline.training.optimizers import parameter_groups
from cogview2.pipeline.training.preemption import StopFlag
from cogview2.pipeline.training.schedules import learning_rate
from cogview2.pipeline.training.state.identity import Identity
from cogview2.pipeline.training.state.manifest import Topology
from cogview2.pipeline.training.train_modules.coglm import CogLMTrainModule
from cogview2.pipeline.training.trainer import Trainer

sys.path.append(str(Path(__file__).resolve().parents[1] / "local_attention"))
import measure  # noqa: E402
import report  # noqa: E402

BARE = "bare torch loop"
LEAST, AIM = 1.10, 1.00
"""Bounds of our time over the bare loop's."""


class Batches:
    """The same micro batches for every candidate; notes when each step asks for its own."""

    def __init__(self, micro_batches: list[list[Batch]]) -> None:
        self._steps = micro_batches
        self.stamps: list[tuple[float, float]] = []
        self.plan, self.dataset_sha256 = SamplePlan([1024], 0), "0" * 64

    def step(self, step: int) -> list[Batch]:
        self.stamps.append((time.process_time(), time.monotonic()))
        return self._steps[step % len(self._steps)]

    def take(self) -> tuple[float, float]:
        """CPU and wall seconds from the second step to the beginning of the last one."""
        first, last = self.stamps[1], self.stamps[-1]
        self.stamps.clear()
        return last[0] - first[0], last[1] - first[1]


class Case:
    """What all candidates of one number of ranks share."""

    def __init__(self, options: argparse.Namespace, world: World, folder: Path) -> None:
        self.world, self.folder = world, folder
        self.model = CogLMConfig(
            layers=options.layers,
            hidden=options.hidden,
            heads=options.heads,
            dropout=0.0,
            vocabulary=VocabularyConfig(rows=options.rows),
        )
        self.vocabulary = synthetic.vocabulary(options.rows)
        together = options.micro_batch * options.accumulation * world.size
        self.accumulation = options.accumulation
        self.configs = {stage: self._json(options.micro_batch, stage) for stage in (0, 1)}
        self.train = TrainConfig(
            steps=options.steps + 2, global_batch=together, log_every=5, deepspeed=self.configs[0]
        )
        self.batches = Batches([self._micro_batches(options, step) for step in range(4)])

    def _json(self, micro_batch: int, stage: int) -> str:
        path = self.folder / f"zero{stage}_rank{self.world.rank}.json"
        content = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "zero_optimization": {"stage": stage},
            "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        }
        path.write_text(json.dumps(content))
        return str(path)

    def _micro_batches(self, options: argparse.Namespace, step: int) -> list[Batch]:
        first = (step * self.world.size + self.world.rank) * options.accumulation
        return [
            synthetic.samples(
                self.model, options.rows, options.micro_batch, first + index, torch.device("cpu")
            )
            for index in range(options.accumulation)
        ]

    def module(self) -> TrainModule:
        """The same fresh weights at every call."""
        torch.manual_seed(0)
        return CogLMTrainModule(self.model, self.vocabulary)

    def deepspeed_config(self, stage: int) -> dict[str, Any]:
        return resolve(self.configs[stage], self.train, self.world.size, cpu=True)


Turn = Callable[[], float]
"""Trains `TrainConfig.steps` steps and returns this rank's loss of the last one."""


def ours(case: Case, stage: int) -> Turn:
    """Trainer and engine of the project, as the stages put them together."""
    engine = PlainEngine(case.module(), case.deepspeed_config(stage), case.train.optimizer, case.world)
    work = Work(synthetic.train_flops(case.model, case.vocabulary.rows), synthetic.sequence_of(case.model), 1)

    def turn() -> float:
        with _shared_folder(case) as folder:
            unit = StageDirectory(folder, "pretrain_coglm").create()
            topology = Topology(case.world.size, 1, stage, "float32")
            result = Trainer(
                engine=engine,
                batches=case.batches,
                train=case.train,
                stage=unit,
                checkpointer=Checkpointer(
                    unit.checkpoints, case.world, Identity("benchmark"), topology, case.train.checkpoint
                ),
                world=case.world,
                stop=StopFlag(),
                work=work,
            ).fit()
            barrier()
        assert result.loss is not None
        return result.loss

    return turn


@contextlib.contextmanager
def _shared_folder(case: Case) -> Iterator[Path]:
    """A fresh folder that all ranks know, gone afterwards."""
    made = tempfile.TemporaryDirectory(dir=case.folder) if case.world.is_first else None
    yield Path(gather_objects(made.name if made is not None else "")[0])
    if made is not None:
        made.cleanup()


def bare(case: Case) -> Turn:
    """What a short script would do; on several ranks with DistributedDataParallel."""
    module, train = case.module(), case.train
    whole = DistributedDataParallel(module) if case.world.size > 1 else module
    settings = train.optimizer
    optimizer = torch.optim.AdamW(
        parameter_groups(module, settings.weight_decay),
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        fused=True,
    )

    def turn() -> float:
        loss = torch.zeros(())
        for step in range(train.steps):
            micro_batches = case.batches.step(step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, train.steps, settings)
            optimizer.zero_grad()
            loss = torch.zeros(())
            for index, batch in enumerate(micro_batches):
                last = index == len(micro_batches) - 1
                with contextlib.nullcontext() if last or whole is module else whole.no_sync():
                    output = whole(batch).loss / len(micro_batches)
                    output.backward()
                loss += output.detach()
            torch.nn.utils.clip_grad_norm_(module.parameters(), settings.gradient_clipping)
            optimizer.step()
            float(loss)  # everybody looks at the loss
        return float(loss)

    return turn


def bare_deepspeed(case: Case, stage: int) -> Turn:
    """DeepSpeed's own loop, without our trainer."""
    module, train = case.module(), case.train
    groups = parameter_groups(module, train.optimizer.weight_decay)
    engine, *_ = deepspeed.initialize(
        model=module, model_parameters=groups, config=case.deepspeed_config(stage)
    )

    def turn() -> float:
        loss = torch.zeros(())
        for step in range(train.steps):
            micro_batches = case.batches.step(step)
            for group in engine.optimizer.param_groups:
                group["lr"] = learning_rate(step, train.steps, train.optimizer)
            loss = torch.zeros(())
            for batch in micro_batches:
                output = engine(batch).loss
                engine.backward(output)
                engine.step()
                loss += output.detach() / len(micro_batches)
            float(loss)
        return float(loss)

    return turn


def candidates(case: Case) -> dict[str, Turn]:
    """All candidates by name, the peers before ours."""
    found: dict[str, Turn] = {BARE: bare(case)}
    for stage in (0, 1):
        found[f"bare DeepSpeed loop, ZeRO-{stage}"] = bare_deepspeed(case, stage)
        found[f"ours, ZeRO-{stage}"] = ours(case, stage)
    return found


def measure_rank(options: argparse.Namespace, world: World, folder: Path) -> dict[str, Any]:
    """Run all candidates on this rank, in turns: name -> CPU and wall seconds of each turn, and losses."""
    case = Case(options, world, folder)
    turns = candidates(case)
    found: dict[str, Any] = {name: {"cpu": [], "wall": [], "losses": []} for name in turns}
    for number in range(options.turns):
        for name, turn in turns.items():
            barrier()
            loss = statistics.mean(gather_objects(turn()))
            cpu, wall = case.batches.take()
            found[name]["cpu"].append(sum(gather_objects(cpu)))
            found[name]["wall"].append(max(gather_objects(wall)))
            found[name]["losses"].append(loss)
            if world.is_first:
                shown = f"{found[name]['cpu'][-1]:.2f} s CPU, {found[name]['wall'][-1]:.2f} s wall"
                print(f"{world.size} ranks, turn {number + 1}, {name}: {shown}", file=sys.stderr, flush=True)
    return found


def ratio(found: dict[str, Any], name: str, clock: str) -> float:
    """Return a candidate's seconds over the bare loop's, the least of the turns of each: others only add to them."""
    return min(found[name][clock]) / min(found[BARE][clock])


def table(found: dict[str, Any], steps: int) -> str:
    rows = []
    for name, figures in found.items():
        row: list[Any] = [name]
        for clock in ("cpu", "wall"):
            row += [1000 * min(figures[clock]) / steps, f"{ratio(found, name, clock):.3f}x"]
        rows.append([*row, f"{figures['losses'][-1]:.5f}"])
    head = ("candidate", "CPU ms per step", "of bare", "wall ms per step", "of bare", "last loss")
    return report.table(head, rows)


def targets(results: dict[int, dict[str, Any]]) -> list[report.Target]:
    return [
        report.Target(
            f"CPU time over the bare loop, {ranks} rank{'s' * (ranks > 1)}, ZeRO-{stage}",
            ratio(found, f"ours, ZeRO-{stage}", "cpu"),
            LEAST,
            AIM,
            at_most=True,
        )
        for ranks, found in results.items()
        for stage in (0, 1)
    ]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = {"layers": 4, "hidden": 256, "heads": 4, "rows": 8192, "micro-batch": 2, "accumulation": 1}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--ranks", default="1,2", help="comma-separated")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a turn")
    parser.add_argument("--turns", type=int, default=5, help="of every candidate")
    parser.add_argument("--results", type=Path, help="a RESULTS.md whose section 'engine' is replaced")
    parser.add_argument("--json", type=Path, help="also write all figures here")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    facts = measure.environment(torch.device("cpu")) | {
        "deepspeed": deepspeed.__version__,
        "threads": "1 per rank",
    }
    results = {
        ranks: rank_processes.run(partial(measure_rank, options), ranks)
        for ranks in map(int, options.ranks.split(","))
    }
    size = f"{options.layers} layers of {options.hidden}, {options.rows} rows, 512 tokens, micro batch {options.micro_batch}"
    parts = [report.facts_table(facts), f"### {size} x {options.accumulation}"]
    for ranks, found in results.items():
        parts += [f"{ranks} rank{'s' * (ranks > 1)}:", table(found, options.steps)]
    parts.append(report.targets_table(targets(results)))
    record = {"environment": facts, "turns": results}
    report.publish("\n\n".join(parts), record, "engine", options.results, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
