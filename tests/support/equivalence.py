"""One tiny CogLM trained on the same batches in one plain process, and through the engines in every way they are cut."""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from cogview2.pipeline.config.deepspeed import resolve
from cogview2.pipeline.config.model import CogLMConfig
from cogview2.pipeline.config.partition import pipe_stage_bounds
from cogview2.pipeline.config.training import TrainConfig
from cogview2.pipeline.data.objectives import (
    Sample,
    compose_row,
    generation_sample,
    text_sample,
    understanding_sample,
)
from cogview2.pipeline.distributed.process import World
from cogview2.pipeline.models.coglm.masks import attention_mask
from cogview2.pipeline.models.coglm.model import CogLM
from cogview2.pipeline.models.coglm.pipe import init_as_pipe
from cogview2.pipeline.tokenizers.vocabulary import Vocabulary
from cogview2.pipeline.training.engine import TrainingEngine
from cogview2.pipeline.training.modules import Batch
from cogview2.pipeline.training.schedules import learning_rate
from cogview2.pipeline.training.train_modules.coglm import coglm_engine, label_ranges

STEPS, GLOBAL_BATCH, SEED = 20, 8, 5
GRID, TEXT = 4, 8
VOCABULARY = Vocabulary.uniform(40, 60)
CONFIG = CogLMConfig(
    layers=4,
    hidden=32,
    heads=4,
    max_positions=64,
    text_length=TEXT,
    image_position=16,
    dropout=0.0,
    init_std=0.2,
)
"""Ten times the published init_std: with embeddings of 0.02 the first layer norms multiply gradients by 50, and training in
float32 differs from float64 by 7e-4 within these 20 steps, whatever the engine; like this by less than 1e-6."""
TRAIN = TrainConfig.model_validate(
    {
        "steps": STEPS,
        "global_batch": GLOBAL_BATCH,
        "deepspeed": "set by the cell",
        "optimizer": {
            "learning_rate": 3e-3,
            "warmup_steps": 4,
            "schedule": "cosine",
            "weight_decay": 0.1,
            "gradient_clipping": 0.5,  # below every step's norm
        },
    }
)
FIELDS = ("tokens", "position_ids", "roles", "labels", "loss_mask", "loss_weights")


@dataclass(frozen=True)
class Cell:
    """One way to cut the training."""

    zero: int
    dp: int = 1
    pp: int = 1
    accumulation: int = 1
    recompute: bool = False
    json: tuple[tuple[str, Any], ...] = ()
    """Further keys of zero_optimization."""
    offload: tuple[str, ...] = ()
    """Which of offload_optimizer and offload_param are on."""
    partition: str | tuple[int, ...] = "cost"
    precision: str = "fp32"
    """fp32, bf16, fp16, autocast; bf16/fp32 and fp16/fp32: gradients are summed in fp32."""

    @property
    def ranks(self) -> int:
        return self.dp * self.pp

    def __str__(self) -> str:
        words = [f"zero{self.zero}", f"dp{self.dp}", f"pp{self.pp}", f"acc{self.accumulation}"]
        words += ["recompute"] * self.recompute + [*(key for key, _ in self.json), *self.offload]
        words += [] if self.partition == "cost" else ["-".join(map(str, self.partition))]
        words += [] if self.precision == "fp32" else [self.precision.replace("/", "+")]
        return " ".join(words)


@dataclass
class Curve:
    """What training showed at each step, and the weights after it where they were asked for."""

    losses: list[float]
    norms: list[float]
    parts: list[float]
    """Mean cross-entropy of image, English and Chinese labels, one after the other."""
    state: dict[str, torch.Tensor] | None = None


@dataclass(frozen=True)
class Problem:
    """A model and its data; `batch` returns the whole global batch of a step."""

    config: CogLMConfig
    vocabulary: Vocabulary
    train: TrainConfig
    seed: int
    batch: Callable[[int], Batch]


def matrix() -> list[Cell]:
    """Return every allowed cell of {ZeRO} x {data parallel} x {pipe stages} x {accumulation} x {recompute}."""
    shapes = [(zero, dp, 1) for zero in range(4) for dp in (1, 2)]
    shapes += [(zero, dp, pp) for zero in (0, 1) for dp, pp in ((1, 2), (2, 2), (1, 4))]
    return [
        Cell(*shape, accumulation, recompute)
        for shape, accumulation, recompute in itertools.product(shapes, (1, 2), (False, True))
    ]


def samples(step: int) -> list[Sample]:
    """Return the global batch of a step: generation, captioning and text, with 3 to 16 loss positions a sample."""
    rng = np.random.default_rng([SEED, step])
    low, high = VOCABULARY.english[0], VOCABULARY.chinese[1]
    made = []
    for index in range(GLOBAL_BATCH):
        captions = [rng.integers(low, high, 3).tolist(), rng.integers(low, high, 2).tolist()]
        row = compose_row(captions, rng.integers(0, 40, GRID**2), TEXT, VOCABULARY)
        common: dict[str, Any] = {"config": CONFIG, "vocabulary": VOCABULARY}
        # In blocks, so that micro batches and ranks differ in what they hold.
        if index < 3:
            made.append(generation_sample(row, rng, **common))
        elif index < 6:
            made.append(understanding_sample(row, rng, loss_normalisation="region", **common))
        else:
            made.append(text_sample(rng.integers(low, high, TEXT + GRID**2), rng))
    return made


def stacked(group: list[Sample]) -> Batch:
    """Return samples as one micro batch."""
    return {name: torch.from_numpy(np.stack([getattr(s, name) for s in group])) for name in FIELDS}


PROBLEM = Problem(CONFIG, VOCABULARY, TRAIN, SEED, lambda step: stacked(samples(step)))


def micro_batches(step: int, data_rank: int, data_size: int, accumulation: int) -> list[Batch]:
    """Return a data-parallel rank's part of a step's global batch."""
    share = GLOBAL_BATCH // data_size
    mine = samples(step)[data_rank * share : (data_rank + 1) * share]
    size = share // accumulation
    return [stacked(mine[first : first + size]) for first in range(0, share, size)]


def _naive_loss(model: CogLM, batch: Batch, problem: Problem) -> tuple[torch.Tensor, list[float]]:
    """Return the loss over all of the batch, and the means by kind of label."""
    hidden = model(batch["tokens"], batch["position_ids"], attention_mask(batch["roles"]))
    logits = (hidden @ model.transformer.word_embeddings.weight.T).flatten(0, 1).float()
    labels, mask = batch["labels"].flatten(), batch["loss_mask"].flatten()
    losses = F.cross_entropy(logits, labels, reduction="none")
    weights = batch["loss_weights"].flatten() * mask
    kinds = [
        (labels >= low) & (labels < high) & mask
        for _, (low, high) in label_ranges(problem.vocabulary).items()
    ]
    return (losses * weights).sum() / weights.sum(), [losses[kind].mean().item() for kind in kinds]


def reference(
    problem: Problem = PROBLEM, dtype: torch.dtype = torch.float32, weights_dtype: torch.dtype | None = None
) -> Curve:
    """Train in this process: whole batches, torch alone.

    Args:
        problem: what is trained.
        dtype: of the masters.
        weights_dtype: of the weights that the forward pass sees, which the masters are rounded to; the same by default.
    """
    model, how, steps = (
        CogLM(problem.config, problem.vocabulary.rows),
        problem.train.optimizer,
        problem.train.steps,
    )
    init_as_pipe(model, problem.seed)
    model = model.to(weights_dtype or dtype)
    named = dict(model.named_parameters())
    masters = {name: nn.Parameter(p.detach().to(dtype).clone()) for name, p in named.items()}
    decayed = [p for name, p in masters.items() if p.ndim > 1 and "embeddings" not in name]
    others = [p for name, p in masters.items() if p.ndim == 1 or "embeddings" in name]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": how.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=how.learning_rate,
        betas=how.betas,
        eps=how.eps,
        foreach=False,
    )
    curve = Curve([], [], [])
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, how)
        loss, parts = _naive_loss(model, problem.batch(step), problem)
        model.zero_grad()
        loss.backward()
        for name, parameter in named.items():
            assert parameter.grad is not None
            masters[name].grad = parameter.grad.to(dtype)
        norm = nn.utils.clip_grad_norm_(masters.values(), how.gradient_clipping)
        optimizer.step()
        for name, parameter in named.items():
            parameter.data.copy_(masters[name].data)
        curve.losses.append(loss.item())
        curve.norms.append(norm.item())
        curve.parts += parts
    curve.state = {name: value.detach().clone() for name, value in masters.items()}
    return curve


def json_path(cell: Cell, folder: Path) -> str:
    """Return where `write_json` writes."""
    return str(folder / f"{str(cell).replace(' ', '_')}.json")


def write_json(cell: Cell, folder: Path) -> str:
    """Write the cell's DeepSpeed JSON."""
    content: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // (cell.dp * cell.accumulation),
        "zero_optimization": {"stage": cell.zero} | dict(cell.json) | {key: {} for key in cell.offload},
        "pipeline": {"partition": cell.partition},
    }
    if cell.zero == 3:
        content["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # partition small matrices too
    weights, _, sums = cell.precision.partition("/")
    if weights != "fp32":
        content["torch_autocast" if weights == "autocast" else weights] = {"enabled": True}
    if sums:
        content["data_types"] = {"grad_accum_dtype": sums}
    if cell.recompute:
        content["activation_checkpointing"] = {}
    path = json_path(cell, folder)
    Path(path).write_text(json.dumps(content))
    return path


def build(
    cell: Cell,
    json_path: str,
    rank: int,
    start: Path | None = None,
    *,
    cpu: bool = True,
    model: CogLMConfig = CONFIG,
) -> TrainingEngine:
    """Return the cell's engine, by the way that the stage takes."""
    world = World(rank, dist.get_world_size(), rank, torch.device("cpu"))
    train = TRAIN.model_copy(update={"deepspeed": json_path, "pipeline_parallel": cell.pp})
    config = resolve(json_path, train, world.size, cpu=cpu)
    bounds = pipe_stage_bounds(
        model,
        VOCABULARY.rows,
        cell.pp,
        config["pipeline"]["partition"],
        sequence=TEXT + GRID**2,
        loss_positions=GRID**2,
    )
    return coglm_engine(model, VOCABULARY, train, config, bounds, world, SEED, start)


def train(engine: TrainingEngine, steps: int = STEPS, first: int = 0) -> Curve:
    """Train the engine from step `first` to `steps`; losses are those of the global batch."""
    curve = Curve([], [], [])
    for step in range(first, steps):
        batches: list[Batch] = []
        if engine.needs_data:
            batches = micro_batches(step, engine.data_rank, engine.data_size, engine.accumulation)
        output = engine.train_step(step, batches, learning_rate(step, STEPS, TRAIN.optimizer))
        numbers = torch.cat([torch.tensor([output.loss]), output.sums, output.counts]).double()
        if dist.get_world_size() > 1:
            dist.all_reduce(numbers)
        curve.losses.append(numbers[0].item() / dist.get_world_size())
        norm = engine.grad_norm()
        curve.norms.append(float("nan") if norm is None else norm)
        curve.parts += (numbers[1:4] / numbers[4:]).tolist()
    return curve


def run_cell(cell: Cell, folder: Path, rank: int, *, cpu: bool = True) -> dict[str, Any]:
    """Train one cell on the ranks of this launch and free it; returns the fields of its `Curve`."""
    torch.manual_seed(rank)  # nothing may depend on it
    engine = build(cell, json_path(cell, folder), rank, cpu=cpu)
    curve = train(engine)
    state = engine.full_state()
    curve.state = None if state is None else {name: value.detach().clone() for name, value in state.items()}
    engine.close()
    return vars(curve)


def worst_error(found: dict[str, Any], expected: Curve) -> float:
    """Return the largest relative difference of any loss, part of a loss, or gradient norm; infinite for what is no number."""
    errors = [
        abs(ours - theirs) / abs(theirs)
        for name in ("losses", "parts", "norms")
        for ours, theirs in zip(found[name], getattr(expected, name), strict=True)
    ]
    return max(error if error == error else float("inf") for error in errors)
