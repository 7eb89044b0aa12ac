"""Nothing that is wrong with a checkpoint passes silently, and nothing of it is interpreted before it is verified."""

import hashlib
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equivalence
import forked_ranks
import pytest
import torch

from cogview2.pipeline.config.training import CheckpointConfig
from cogview2.pipeline.data.sample_plan import DataState, SamplePlan
from cogview2.pipeline.distributed.process import World
from cogview2.pipeline.distributed.seeding import random_state
from cogview2.pipeline.training import checkpoint
from cogview2.pipeline.training.checkpoint import Checkpointer
from cogview2.pipeline.training.engine import TrainingEngine
from cogview2.pipeline.training.state.files import (
    WEIGHT,
    Entry,
    RankState,
    StateReader,
    file_name,
    write_rank_state,
)
from cogview2.pipeline.training.state.identity import Identity
from cogview2.pipeline.training.state.manifest import MANIFEST, FileRecord, Topology, folder_name

PLAN = SamplePlan([10], 3)
RANKS = 3
"""Their files are all written by this process."""


class Engine:
    """Parameters of three ranks; counts how often a state is interpreted."""

    def __init__(self, value: float = -1.0) -> None:
        self.value = value
        self.loads = 0

    def state(self, rank: int = 0) -> RankState:
        numbers = torch.arange(100.0) + self.value + 1000 * rank
        own = random_state() | {"meters": torch.zeros(2, 1)}
        entries = {Entry(WEIGHT, 0, f"w{rank}"): numbers, Entry("exp_avg", 0, f"w{rank}"): numbers * 0.5}
        return RankState(entries, {f"w{rank}": (100,)}, own)

    def load(self, reader: StateReader) -> None:
        self.loads += 1
        self.value = reader.whole("w0")[0].item()


def _checkpointer(folder: Path) -> Checkpointer:
    world, config = World(0, 1, 0, torch.device("cpu")), CheckpointConfig(keep_last=2)
    return Checkpointer(folder, world, Identity("a"), Topology(RANKS, 1, 0, "float32"), config)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage with the checkpoints of steps 2 and 4, each written by three ranks."""
    folder = tmp_path_factory.mktemp("stage") / "checkpoints"
    folder.mkdir()
    for step in (2, 4):
        writer, engine = _checkpointer(folder), Engine(step)
        staging = writer._staging(step)
        staging.mkdir()
        records = []
        for rank in range(RANKS):
            digest, size = write_rank_state(staging / file_name(rank), engine.state(rank))
            records.append(FileRecord(size, digest))
        writer._commit(step, DataState.at(PLAN, "d", step), records)
    return folder.parent


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "checkpoints" / folder_name(4)).iterdir())


def _passes(good: Path, tmp_path: Path, damage: Callable[[Path], None]) -> bool:
    """Return whether a damaged checkpoint of step 4 is taken for good: loaded, or looked into before it was verified."""
    stage = tmp_path / "copy"
    shutil.copytree(good, stage, symlinks=True)
    try:
        damage(stage)
        engine = Engine()
        restored = _checkpointer(stage / "checkpoints").restore(engine)  # type: ignore[arg-type]
        assert restored is not None
        if restored.step == 4:
            return True
        assert (restored.step, engine.value, engine.loads) == (2, 2, 1)
        assert len(list((stage / "checkpoints" / "quarantine").iterdir())) == 1
        return False
    finally:
        shutil.rmtree(stage)


def _flip(rng: random.Random) -> Callable[[Path], None]:
    def damage(stage: Path) -> None:
        path = rng.choice(_files(stage))
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(data))

    return damage


def _flips_that_pass(good: Path, tmp_path: Path, count: int) -> int:
    rng = random.Random(11)
    return sum(_passes(good, tmp_path, _flip(rng)) for _ in range(count))


def test_no_flipped_bit_passes(good: Path, tmp_path: Path) -> None:
    """200 flips over all files of a checkpoint, the manifest included."""
    assert _flips_that_pass(good, tmp_path, 200) == 0


def _of_another_step(path: Path) -> None:
    shutil.copyfile(path.parents[1] / folder_name(2) / path.name, path)


def _as_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def _as_outer_link(path: Path) -> None:
    target = path.parents[2] / "outside"
    path.rename(target)
    path.symlink_to(target)


def _as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _twice(path: Path) -> None:
    shutil.copyfile(path, path.with_name(f"{path.name}.copy"))


def _script_beside(path: Path) -> None:
    (path.parent / "zero_to_fp32.py").write_text("raise SystemExit")


def _hidden_beside(path: Path) -> None:
    (path.parent / ".hidden").write_bytes(b"")


STRUCTURAL: list[Callable[[Path], Any]] = [
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    lambda path: path.write_bytes(path.read_bytes()[:-1]),
    lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    lambda path: path.write_bytes(bytes(path.stat().st_size)),
    lambda path: path.unlink(),
    _of_another_step,
    _as_link,
    _as_outer_link,
    _as_folder,
    _as_pipe,
    _twice,
    _script_beside,
    _hidden_beside,
]


def _structural_that_pass(good: Path, tmp_path: Path) -> tuple[int, int]:
    tried = passed = 0
    for index in range(len(_files(good))):
        for change in STRUCTURAL:
            tried += 1
            passed += _passes(good, tmp_path, lambda stage, i=index, c=change: c(_files(stage)[i]))  # type: ignore[misc]
    return tried, passed


def test_no_structural_damage_passes(good: Path, tmp_path: Path) -> None:
    tried, passed = _structural_that_pass(good, tmp_path)
    print(f"{passed} of {tried} structural damages pass")
    assert tried >= 60 and passed == 0


def test_without_verification_flips_pass(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above see a checkpointer that believes the sizes."""
    monkeypatch.setattr(checkpoint, "damage", lambda *_: None)
    monkeypatch.setattr(DataState, "from_dict", lambda values: DataState.at(PLAN, "d", 4))
    assert _flips_that_pass(good, tmp_path, 20) > 0


def test_a_manifest_that_hides_a_file_is_not_believed(good: Path, tmp_path: Path) -> None:
    def damage(stage: Path) -> None:
        path = stage / "checkpoints" / folder_name(4) / MANIFEST
        path.write_text(path.read_text().replace(file_name(2), "rank_00009.safetensors"))

    assert not _passes(good, tmp_path, damage)


def test_nothing_pickled_is_ever_read(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader has no use for pickle at all."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("torch.load was called")

    monkeypatch.setattr(torch, "load", refuse)
    engine = Engine()
    restored = _checkpointer(good / "checkpoints").restore(engine)  # type: ignore[arg-type]
    assert restored is not None and (restored.step, engine.value) == (4, 4)


def _state_of(engine: TrainingEngine) -> dict[str, torch.Tensor]:
    """Return everything that training goes on from: weights, masters, moments, counters."""
    bare: Any = engine.engine  # type: ignore[attr-defined]
    found = {str(entry): tensor for entry, tensor in engine.state().entries.items()}
    found |= {f"weight of {name}": parameter.data for name, parameter in bare.module.named_parameters()}
    return found | {"steps": torch.tensor([bare.global_steps, bare.global_samples])}


def _digest(engine: TrainingEngine) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(_state_of(engine).items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def _load_bare(engine: TrainingEngine, folder: Path) -> str:
    """Load DeepSpeed's own checkpoint into an engine that knows nothing; returns a digest of what it knows then."""
    for tensor in _state_of(engine).values():
        tensor.zero_()
    engine.engine.load_checkpoint(str(folder))  # type: ignore[attr-defined]
    return _digest(engine)


def _flip_bare(folder: Path, json_path: str, flips: int, seed: int) -> dict[str, dict[str, int]]:
    """Flip bits, one at a time, in a checkpoint that DeepSpeed saves and loads: file -> what became of them -> how many."""
    cell, model = equivalence.Cell(1), equivalence.CONFIG.model_copy(update={"hidden": 128})
    engine = equivalence.build(cell, json_path, 0, model=model)
    batches = equivalence.micro_batches(0, 0, 1, 1)
    engine.train_step(0, batches, 1e-3)
    engine.engine.save_checkpoint(str(folder), tag="flipped")  # type: ignore[attr-defined]
    good = _load_bare(engine, folder), engine.train_step(1, batches, 1e-3).loss
    rng, found = random.Random(seed), {}
    for _ in range(flips):
        path = rng.choice(sorted((folder / "flipped").iterdir()))
        at, bit = rng.randrange(path.stat().st_size), 1 << rng.randrange(8)
        counts = found.setdefault(path.name, {"silent": 0, "raised": 0, "without effect": 0})
        _flip_at(path, at, bit)
        try:
            digest = _load_bare(engine, folder)
        except Exception:
            counts["raised"] += 1
        else:
            same = digest == good[0] and engine.train_step(1, batches, 1e-3).loss == good[1]
            counts["without effect" if same else "silent"] += 1
        _flip_at(path, at, bit)
    assert (_load_bare(engine, folder), engine.train_step(1, batches, 1e-3).loss) == good
    return found


def _flip_at(path: Path, at: int, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ bit]))


@pytest.mark.slow
@pytest.mark.distributed
def test_bare_deepspeed_does_not_notice_flips(tmp_path: Path) -> None:
    """The same on DeepSpeed's own files: the figure beside ours, and proof that such flips do harm."""
    path, seed = equivalence.write_json(equivalence.Cell(1), tmp_path), 11
    (found,) = forked_ranks.run_ranks(lambda _: _flip_bare(tmp_path / "bare", path, 200, seed), 1, limit=600)
    print(f"bare DeepSpeed, seed {seed}: {found}")
    assert sum(counts["silent"] for counts in found.values()) > 0
