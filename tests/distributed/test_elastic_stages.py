"""The VQVAE and both super-resolutions go on in another topology as if nothing had changed: the codebook too."""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import equivalence
import numpy as np
import pytest
import torch
import torch.distributed as dist
from equivalence import CONFIG, GLOBAL_BATCH, SEED, VOCABULARY, Cell
from forked_ranks import run_ranks

from cogview2.pipeline.config.deepspeed import resolve
from cogview2.pipeline.config.model import DirectSRConfig, IterativeSRConfig, VQVAEConfig
from cogview2.pipeline.config.stages import LossWeights, VQVAEStageConfig
from cogview2.pipeline.config.training import TrainConfig
from cogview2.pipeline.data.objectives import direct_sr_sample, iterative_sr_sample
from cogview2.pipeline.data.sample_plan import rank_slice
from cogview2.pipeline.distributed.process import World
from cogview2.pipeline.models.sr.direct import DirectSR
from cogview2.pipeline.models.sr.iterative import IterativeSR
from cogview2.pipeline.training.engine import PlainEngine
from cogview2.pipeline.training.modules import Batch, TrainModule
from cogview2.pipeline.training.schedules import learning_rate
from cogview2.pipeline.training.state.files import StateReader, file_name, write_rank_state
from cogview2.pipeline.training.train_modules import vqvae
from cogview2.pipeline.training.train_modules.code_candidates import CodeCandidates
from cogview2.pipeline.training.train_modules.sr import DirectSRTrainModule, IterativeSRTrainModule

pytestmark = pytest.mark.distributed
CUT, STEPS = 5, 9
CODES, SIDE = 32, 16
WHOLE = Cell(0, 1)
CELLS = [
    WHOLE,
    Cell(0, 1, accumulation=2),
    Cell(1, 1),
    Cell(0, dp=2),
    Cell(1, dp=2, accumulation=2),
    Cell(1, dp=4),
]
MORE, FEWER = (WHOLE, Cell(1, dp=2)), (Cell(1, dp=2), Cell(0, 1, accumulation=2))
BEFORE = "VQVAE, codebook from data before the cut"
TABLES = ("quantize.embed.weight", "quantize.embed_avg", "quantize.cluster_size", "use.recent")
Move = tuple[str, Cell, Cell]
"""What is trained, before the cut, after it."""


@dataclass(frozen=True)
class Stage:
    """What is trained: the same start on every rank, and the global batch of any step."""

    build: Callable[[TrainConfig], TrainModule]
    batch: Callable[[int], Batch]
    train: TrainConfig = equivalence.TRAIN.model_copy(update={"steps": STEPS})
    most_zero: int = 1
    """Highest ZeRO stage: weights that are not trained in every step have counters of their own."""


def _vqvae(codebook_at: int, train: TrainConfig, *, other_rates_every: int = 1) -> TrainModule:
    model = VQVAEConfig(
        base_channels=8, encoder_res_blocks=1, latent_channels=8, codebook_size=CODES, norm_groups=2,
        decoder_multipliers=((1, 1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1)), encoder_multipliers=(1, 1, 1),
    )  # fmt: skip
    config = VQVAEStageConfig(
        model=model,
        # Smooth: the slope of an absolute difference jumps where rounding changes its sign.
        loss=LossWeights(l1=0.0, l2=10.0, ms_ssim=0.0, perceptual=0.0),
        train=train,
        autoencoder_steps=codebook_at,
        restart_after=1,
        other_rates_every=other_rates_every,
    )
    return vqvae.VQVAETrainModule(config, SEED)


def _pictures(step: int) -> Batch:
    """Coloured patches with a little noise: latents that lie far enough apart for the nearest code to be certain."""
    rng = np.random.default_rng([SEED, step])
    patches = rng.random((GLOBAL_BATCH, 3, SIDE // 4, SIDE // 4), np.float32)
    noise = rng.random((GLOBAL_BATCH, 3, SIDE, SIDE), np.float32)
    return {"pixels": torch.from_numpy(0.9 * patches.repeat(4, axis=2).repeat(4, axis=3) + 0.1 * noise)}


def _direct(train: TrainConfig) -> TrainModule:
    config = DirectSRConfig(text_length=4, local_kernel=(3, 3), cross_kernel=(3, 3))
    return DirectSRTrainModule(DirectSR(CONFIG, config, 2, 2, VOCABULARY.rows), VOCABULARY)


def _iterative(train: TrainConfig) -> TrainModule:
    config = IterativeSRConfig(text_length=4, local_kernel=(3, 3))
    return IterativeSRTrainModule(IterativeSR(CONFIG, config, 4, VOCABULARY.rows), VOCABULARY)


def _superres(kind: str, step: int) -> Batch:
    rng = np.random.default_rng([SEED, step])
    common: dict[str, Any] = {"coglm": CONFIG, "vocabulary": VOCABULARY}
    samples = []
    for index in range(GLOBAL_BATCH):
        text = rng.integers(VOCABULARY.english[0], VOCABULARY.chinese[1], 1 + index % 4).tolist()
        base, fine = rng.integers(0, 40, 4), rng.integers(0, 40, 16)
        if kind == "direct":
            direct = DirectSRConfig(text_length=4)
            samples.append(direct_sr_sample(text, base, fine, config=direct, **common))
        else:
            iterative = IterativeSRConfig(text_length=4)
            samples.append(iterative_sr_sample(text, fine, rng, config=iterative, **common))
    return equivalence.stacked(samples)


STAGES = {
    BEFORE: Stage(partial(_vqvae, 1), _pictures),
    "VQVAE, codebook from data at the cut": Stage(partial(_vqvae, CUT), _pictures),
    "VQVAE, rates in turn": Stage(partial(_vqvae, 1, other_rates_every=2), _pictures, most_zero=0),
    "direct": Stage(_direct, partial(_superres, "direct")),
    "iterative": Stage(_iterative, partial(_superres, "iterative")),
}


@pytest.fixture(autouse=True)
def few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the latents of these small batches, as of large ones in earnest."""
    monkeypatch.setattr(vqvae, "_INIT_LATENTS_PER_CODE", 3)
    monkeypatch.setattr(vqvae, "_RESTART_LATENTS_PER_CODE", 2)
    monkeypatch.setattr(vqvae, "_LEAST_RESTART_LATENTS", 40)


def _engine(stage: Stage, cell: Cell, folder: Path, rank: int) -> PlainEngine:
    world = World(rank, dist.get_world_size(), rank, torch.device("cpu"))
    train = stage.train.model_copy(update={"deepspeed": equivalence.json_path(cell, folder)})
    torch.manual_seed(SEED)
    module = stage.build(train)
    torch.manual_seed(rank)  # nothing may depend on it
    return PlainEngine(module, resolve(train.deepspeed, train, world.size, cpu=True), train.optimizer, world)


def _train(stage: Stage, engine: PlainEngine, first: int, last: int) -> dict[str, list[float]]:
    """Return the losses of the global batch, the norms, and how many codes were restarted."""
    found: dict[str, list[float]] = {"losses": [], "norms": [], "restarted": []}
    for step in range(first, last):
        mine = rank_slice(0, GLOBAL_BATCH, engine.data_rank, engine.data_size)
        part = {name: value[mine.start : mine.stop] for name, value in stage.batch(step).items()}
        parts = {name: value.chunk(engine.accumulation) for name, value in part.items()}
        batches = [{name: parts[name][k] for name in parts} for k in range(engine.accumulation)]
        output = engine.train_step(step, batches, learning_rate(step, STEPS, stage.train.optimizer))
        loss = torch.tensor(output.loss, dtype=torch.float64)
        dist.all_reduce(loss)
        norm = engine.grad_norm()
        assert norm is not None
        found["losses"].append(loss.item() / engine.data_size)
        found["norms"].append(norm)
        found["restarted"].append(output.extra.get("codes_restarted", 0.0))
    return found


def _saved(name: str, cell: Cell, folder: Path) -> Path:
    return folder / f"{name} by {cell}"


def _save(engine: PlainEngine, path: Path, rank: int) -> None:
    if rank == 0:
        path.mkdir()
    dist.barrier()
    write_rank_state(path / file_name(rank), engine.state())
    dist.barrier()


def _uncut(names: list[str], folder: Path, rank: int) -> dict[str, Any]:
    """Train in one process, never stopped; what it had at the cut is saved too."""
    found = {}
    for name in names:
        engine = _engine(STAGES[name], WHOLE, folder, rank)
        before = _train(STAGES[name], engine, 0, CUT)
        _save(engine, _saved(name, WHOLE, folder), rank)
        found[name] = _second_half(STAGES[name], engine) | {"restarted before": before["restarted"]}
        engine.close()
    return found


def _second_half(stage: Stage, engine: PlainEngine) -> dict[str, Any]:
    curve = _train(stage, engine, CUT, STEPS)
    return curve | {"buffers": {key: value.clone() for key, value in engine._buffers().items()}}


def _first_part(saved: list[tuple[str, Cell]], folder: Path, rank: int) -> None:
    for name, cell in saved:
        engine = _engine(STAGES[name], cell, folder, rank)
        _train(STAGES[name], engine, 0, CUT)
        _save(engine, _saved(name, cell, folder), rank)
        engine.close()


def _second_part(moves: list[Move], folder: Path, rank: int) -> dict[str, Any]:
    found = {}
    for name, old, new in moves:
        engine = _engine(STAGES[name], new, folder, rank)
        engine.load(StateReader(_saved(name, old, folder)))
        found[f"{name}: {old} -> {new}"] = _second_half(STAGES[name], engine)
        engine.close()
    return found


def _error(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Return the largest relative difference: of a loss or norm, of a codebook's table by its largest number."""
    idle = [curve["buffers"].get("use.idle_steps", np.zeros(0)) for curve in (found, expected)]
    if found["restarted"] != expected["restarted"] or not np.array_equal(*idle):
        return float("inf")
    pairs = [np.abs(np.subtract(found[key], expected[key]) / expected[key]) for key in ("losses", "norms")]
    pairs += [
        np.abs(value - expected["buffers"][key]) / np.abs(expected["buffers"][key]).max()
        for key, value in found["buffers"].items()
        if key in TABLES
    ]
    return float(np.nan_to_num(max(part.max() for part in pairs), nan=float("inf")))


def _worst_errors(moves: list[Move], folder: Path) -> dict[str, float]:
    """Return the largest relative error of each move against one process that was never stopped."""
    for cell in dict.fromkeys([WHOLE, *(cell for _, *pair in moves for cell in pair)]):
        equivalence.write_json(cell, folder)
    names = list(dict.fromkeys(name for name, *_ in moves))
    expected = run_ranks(partial(_uncut, names, folder), 1, limit=300)[0]
    for name, curve in expected.items():
        print(
            f"{name}: codes restarted before the cut {curve['restarted before']}, after it {curve['restarted']}"
        )
    saved = list(dict.fromkeys((name, old) for name, old, _ in moves if old != WHOLE))
    for ranks in sorted({cell.ranks for _, cell in saved}):
        group = [(name, cell) for name, cell in saved if cell.ranks == ranks]
        run_ranks(partial(_first_part, group, folder), ranks, limit=300)
    errors = {}
    for ranks in sorted({new.ranks for *_, new in moves}):
        mine = [move for move in moves if move[-1].ranks == ranks]
        found = run_ranks(partial(_second_part, mine, folder), ranks, limit=600)[0]
        errors |= {name: _error(curve, expected[name.split(":")[0]]) for name, curve in found.items()}
    print(json.dumps(errors, indent=1))
    return errors


EVERY: list[Move] = [
    (name, old, new)
    for name, stage in STAGES.items()
    for old, new in itertools.product(CELLS, CELLS)
    if max(old.zero, new.zero) <= stage.most_zero
]
GATE: list[Move] = [(BEFORE, *MORE), ("iterative", *FEWER)]


@pytest.mark.parametrize(
    "moves", [GATE, pytest.param(EVERY, marks=pytest.mark.slow)], ids=["gate", "every move"]
)
def test_another_topology_goes_on_as_if_nothing_had_changed(tmp_path: Path, moves: list[Move]) -> None:
    errors = _worst_errors(moves, tmp_path)
    print(f"{len(errors)} moves, worst relative error {max(errors.values()):.1e}")
    assert len(errors) == len(moves)
    assert {name: error for name, error in errors.items() if not error < 1e-5} == {}


def _of_this_rank(candidates: CodeCandidates) -> torch.Tensor | None:
    return None if candidates._rank else torch.cat(candidates._kept).float()


def _of_the_last_micro_batch(candidates: CodeCandidates) -> torch.Tensor | None:
    candidates._kept = candidates._kept[-1:]
    return _ON_FIRST(candidates)


def _draws_of_its_own(candidates: CodeCandidates, *args: Any, **kwargs: Any) -> None:
    _INIT(candidates, *args, **kwargs)
    candidates._next = 0


_ON_FIRST, _INIT = CodeCandidates.on_first, CodeCandidates.__init__


@pytest.mark.parametrize(
    ("name", "weaker", "pair"),
    [
        ("on_first", _of_this_rank, MORE),
        pytest.param("on_first", _of_the_last_micro_batch, FEWER, marks=pytest.mark.slow),
        pytest.param("__init__", _draws_of_its_own, MORE, marks=pytest.mark.slow),
    ],
)
def test_candidates_that_depend_on_the_topology_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, weaker: Any, pair: tuple[Cell, Cell]
) -> None:
    monkeypatch.setattr(CodeCandidates, name, weaker)
    assert min(_worst_errors([(BEFORE, *pair)], tmp_path).values()) > 1e-4
