"""Who holds a job up is named: two real ranks, of which one is slow at one thing."""

import json
import logging
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forked_ranks import run_ranks
from torch import nn

from cogview2.pipeline.config.deepspeed import resolve
from cogview2.pipeline.config.model import CogLMConfig
from cogview2.pipeline.config.training import TrainConfig
from cogview2.pipeline.data.sample_plan import SamplePlan
from cogview2.pipeline.distributed.process import World
from cogview2.pipeline.models.coglm.masks import IMAGE
from cogview2.pipeline.models.coglm.pipe import PipeBlock
from cogview2.pipeline.stage_dir import StageDirectory
from cogview2.pipeline.tokenizers.vocabulary import Vocabulary
from cogview2.pipeline.training.checkpoint import Checkpointer
from cogview2.pipeline.training.engine import PlainEngine, TrainingEngine
from cogview2.pipeline.training.meters import Work
from cogview2.pipeline.training.modules import Batch, LossOutput, TrainModule
from cogview2.pipeline.training.preemption import StopFlag
from cogview2.pipeline.training.state.identity import Identity
from cogview2.pipeline.training.state.manifest import Topology
from cogview2.pipeline.training.straggler import StragglerWatch
from cogview2.pipeline.training.train_modules.coglm import coglm_engine
from cogview2.pipeline.training.trainer import Trainer

pytestmark = pytest.mark.distributed
STEPS, SHORT, LONG = 6, 0.06, 0.3
Seconds = tuple[float, float]
"""Of reading and of the forward pass."""
CASES: dict[str, tuple[Seconds, Seconds]] = {
    "even": ((SHORT, SHORT), (SHORT, SHORT)),
    "rank 1 reads slowly": ((0.0, SHORT), (LONG, SHORT)),
    "rank 0 computes slowly": ((SHORT, LONG), (SHORT, SHORT)),
}
WARNED = {"rank 1 sleeps": ((0.0, 0.0), (0.0, LONG)), "normal": ((0.0, 0.0), (0.0, 0.0))}
WARNED_STEPS = {"rank 1 sleeps": 20, "normal": 500}


class Model(TrainModule):
    """A linear model whose forward pass takes as long as it is told."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.model, self.seconds = nn.Linear(8, 8), seconds

    def forward(self, batch: Batch) -> LossOutput:
        time.sleep(self.seconds)
        return LossOutput(self.model(batch["x"]).square().mean(), torch.zeros(0), torch.zeros(0))


def _fit(rank: int, engine: TrainingEngine, train: TrainConfig, stage: StageDirectory, step: Any) -> None:
    world = World(rank, 2, rank, torch.device("cpu"))
    batches: Any = SimpleNamespace(step=step, plan=SamplePlan([64], 0), dataset_sha256="0" * 64)
    Trainer(
        engine=engine,
        batches=batches,
        train=train,
        stage=stage,
        checkpointer=Checkpointer(
            stage.checkpoints, world, Identity("f"), Topology(2, 1, 0, "float32"), train.checkpoint
        ),
        world=world,
        stop=StopFlag(),
        work=Work(flops_per_sample=1e9, tokens_per_sample=512, images_per_sample=1, peak_flops_per_rank=1e12),
    ).fit()


def _data_parallel(rank: int, name: str, stage: StageDirectory, steps: int = STEPS) -> None:
    reading, computing = (CASES | WARNED)[name][rank]
    train = TrainConfig(steps=steps, global_batch=4, log_every=steps, deepspeed="debug")
    world = World(rank, 2, rank, torch.device("cpu"))
    torch.manual_seed(0)
    engine = PlainEngine(Model(computing), resolve("debug", train, 2, cpu=True), train.optimizer, world)

    def step(_: int) -> list[Batch]:
        time.sleep(reading)
        return [{"x": torch.ones(2, 8)}] * engine.accumulation

    _fit(rank, engine, train, stage, step)


def _pipeline(rank: int, stage: StageDirectory) -> None:
    """Two pipe stages, of which the second has a slow layer; its neighbour waits for it, and is not blamed."""
    config = CogLMConfig(
        layers=2, hidden=32, heads=2, dropout=0.0, max_positions=40, text_length=8, image_position=20
    )
    train = TrainConfig(
        steps=STEPS, global_batch=8, log_every=STEPS, deepspeed="coglm_tiny_pp", pipeline_parallel=2
    )
    how = resolve("coglm_tiny_pp", train, 2, cpu=True)
    world = World(rank, 2, rank, torch.device("cpu"))
    engine = coglm_engine(config, Vocabulary.uniform(30, 27), train, how, (0, 3, 6), world, 0)
    block = next(module for module in engine.module.modules() if isinstance(module, PipeBlock))
    block.register_forward_pre_hook(lambda *_: time.sleep(LONG if rank == 1 else SHORT))
    tokens = torch.randint(0, 30, (4, 28))
    batch = {
        "tokens": tokens[:, :-1],
        "position_ids": torch.arange(27).expand(4, -1),
        "roles": torch.full((4, 27), IMAGE),
        "labels": tokens[:, 1:],
        "loss_mask": torch.ones(4, 27, dtype=torch.bool),
        "loss_weights": torch.ones(4, 27),
    }
    _fit(rank, engine, train, stage, lambda _: [batch] * engine.accumulation)


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, StageDirectory]:
    folder = tmp_path_factory.mktemp("meters")
    found = {name: StageDirectory(folder / name, "pretrain_coglm").create() for name in (*CASES, "pipeline")}

    def work(rank: int) -> dict[str, Any]:
        for name in CASES:
            _data_parallel(rank, name, found[name])
        _pipeline(rank, found["pipeline"])
        return {}

    run_ranks(work, 2)
    return found


def _line(stage: StageDirectory) -> dict[str, Any]:
    return dict(json.loads(stage.metrics.read_text().splitlines()[-1]))


def test_the_rank_that_reads_slowly_is_named(stages: dict[str, StageDirectory]) -> None:
    line = _line(stages["rank 1 reads slowly"])
    assert (line["slowest"], line["slowest_rank"]) == ("rank 1", 1)
    # It needs 0.36 s where the other needs 0.06 s.
    assert 3 < line["slowest_ratio"] < 7
    assert 0.5 < line["data_wait"] < 1
    beat = stages["rank 1 reads slowly"].heartbeat()
    assert beat is not None and beat.slowest == "rank 1" and beat.meters["slowest_ratio"] > 3


def test_the_rank_that_computes_slowly_is_named_though_all_steps_take_equally_long(
    stages: dict[str, StageDirectory],
) -> None:
    line = _line(stages["rank 0 computes slowly"])
    assert (line["slowest"], line["slowest_rank"]) == ("rank 0", 0)
    assert 2 < line["slowest_ratio"] < 4  # 0.36 s against 0.12 s
    assert line["data_wait"] < 0.4


def test_the_pipe_stage_that_computes_slowly_is_named(stages: dict[str, StageDirectory]) -> None:
    line = _line(stages["pipeline"])
    assert (line["slowest"], line["slowest_rank"]) == ("rank 1", 1)
    assert 2 < line["slowest_ratio"] < 6  # 0.3 s against 0.06 s, each micro batch


def test_nobody_is_named_in_an_even_job(stages: dict[str, StageDirectory]) -> None:
    line = _line(stages["even"])
    assert not {"slowest", "slowest_rank", "slowest_ratio"} & set(line)
    beat = stages["even"].heartbeat()
    assert beat is not None and beat.slowest is None


def _warnings(folder: Path, *names: str) -> dict[str, list[str]]:
    """Return what rank 0 of each case warned of."""
    found = {name: StageDirectory(folder / name, "pretrain_coglm").create() for name in names}

    def work(rank: int) -> dict[str, Any]:
        said: dict[str, list[str]] = {name: [] for name in names}
        for name, stage in found.items():
            handler = logging.Handler(logging.WARNING)
            handler.emit = lambda record, to=said[name]: to.append(record.getMessage())  # type: ignore[method-assign,misc]
            logging.getLogger(Trainer.__module__).addHandler(handler)
            _data_parallel(rank, name, stage, WARNED_STEPS[name])
            logging.getLogger(Trainer.__module__).removeHandler(handler)
        return said

    first, second = run_ranks(work, 2)
    assert not any(second.values())  # once is enough
    return dict(first)


@pytest.mark.slow
def test_a_rank_that_sleeps_is_warned_of_within_20_steps_and_none_is_in_500_normal_ones(
    tmp_path: Path,
) -> None:
    said = _warnings(tmp_path, *WARNED)
    assert len(said["rank 1 sleeps"]) == 1 and not said["normal"]
    assert (
        ": rank 1 holds the others up: it needs 0.3 s or more to read and compute" in said["rank 1 sleeps"][0]
    )


@pytest.mark.slow
def test_mutant_nobody_watches_for_stragglers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StragglerWatch, "add", lambda *_: None)
    assert not _warnings(tmp_path, "rank 1 sleeps")["rank 1 sleeps"]


def test_rates_agree_with_each_other(stages: dict[str, StageDirectory]) -> None:
    line = _line(stages["even"])
    assert line["seconds_per_step"] >= 2 * SHORT
    assert line["samples_per_second"] == pytest.approx(4 / line["seconds_per_step"])
    assert line["tokens_per_second"] == pytest.approx(512 * line["samples_per_second"])
    assert line["model_tflops"] == pytest.approx(2 * line["model_tflops_per_rank"])
    assert line["mfu"] == pytest.approx(line["model_tflops_per_rank"])  # of a peak of 1 TFLOP/s
    assert line["peak_memory_gib"] > 0.01
    beat = stages["even"].heartbeat()
    assert beat is not None and beat.unit == "tokens/s" and beat.throughput == line["tokens_per_second"]
