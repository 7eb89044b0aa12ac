"""A run directory: one recipe, its stages, and what each of them depends on."""

import contextlib
import time
from pathlib import Path
from typing import Any

from cogview2.pipeline import fsops
from cogview2.pipeline.config.base import Config, fingerprint
from cogview2.pipeline.config.loading import load_recipe, recipe_yaml
from cogview2.pipeline.config.stages import STAGES, Recipe
from cogview2.pipeline.errors import RunDirectoryError
from cogview2.pipeline.locking import exclusive, is_held
from cogview2.pipeline.stage_dir import DoneRecord, StageDirectory

__all__ = [
    "DEPENDENCIES",
    "PARTS",
    "REPEATABLE",
    "DoneRecord",
    "RunDirectory",
    "StageDirectory",
    "recipe_parts",
    "units",
    "units_read_by",
]

DEPENDENCIES: dict[str, tuple[str, ...]] = {
    "train_tokenizer": (),
    "train_vqvae": (),
    "shard_dataset": ("train_tokenizer", "train_vqvae"),
    "pretrain_coglm": ("train_tokenizer", "shard_dataset"),
    "finetune_superres": ("train_tokenizer", "train_vqvae", "shard_dataset", "pretrain_coglm"),
    "evaluate": ("train_tokenizer", "train_vqvae", "shard_dataset", "pretrain_coglm", "finetune_superres"),
}
"""Stage -> the stages whose outputs it reads."""

PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "finetune_superres": {"direct": ("direct_sr",), "iterative": ("iterative_sr",)},
}
"""Stage that trains several models -> part -> the sections of the recipe that this part depends on."""

REPEATABLE: frozenset[str] = frozenset({"evaluate"})
"""Stages that run again when their part of the recipe or their inputs changed: nothing reads their outputs,
and each result keeps a name made from all that it depends on. Every other stage is refused, or set aside."""


def units(stage: str) -> list[str]:
    """Return the folders below stages/ that get a DONE.json each: the stage itself, or its parts."""
    return [f"{stage}/{part}" for part in PARTS[stage]] if stage in PARTS else [stage]


def units_read_by(unit: str, recipe: Recipe) -> list[str]:
    """Return the units whose outputs a unit (or a whole stage) reads."""
    found = [read for needed in DEPENDENCIES[unit.partition("/")[0]] for read in units(needed)]
    if unit == "finetune_superres/iterative" and recipe.iterative_sr.model.init == "direct":
        found.append("finetune_superres/direct")
    return found


def recipe_parts(unit: str) -> tuple[str, ...]:
    """Return the recipe's sections that a unit (`train_vqvae`, `finetune_superres/direct`) depends on."""
    stage, _, part = unit.partition("/")
    return PARTS[stage][part] if part else STAGES[stage]


def section(recipe: Recipe, dotted: str) -> Any:
    """Return the value of `recipe` at a dotted key."""
    value: Any = recipe
    for name in dotted.split("."):
        value = getattr(value, name)
    return value


class RunDirectory:
    """runs/<name>/: everything that a run knows."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path).absolute()

    @property
    def recipe_path(self) -> Path:
        """recipe.yaml: the resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def lock_path(self) -> Path:
        """run.lock."""
        return self.path / "run.lock"

    @property
    def started_path(self) -> Path:
        """STARTED: from here on a stage without a good checkpoint must not silently begin at step 0."""
        return self.path / "STARTED"

    @property
    def report_path(self) -> Path:
        """report.html."""
        return self.path / "report.html"

    def deepspeed_path(self, unit: str) -> Path:
        """Return where the resolved DeepSpeed configuration of a unit is kept, for people."""
        return self.path / "deepspeed" / f"{unit.replace('/', '.')}.json"

    def exists(self) -> bool:
        """Return whether this is a run directory."""
        return self.recipe_path.is_file()

    def create(self, recipe: Recipe) -> "RunDirectory":
        """Make the directory and write the recipe; a directory that holds anything but a lock is refused."""
        fsops.make_dirs(self.path)
        foreign = [entry.name for entry in self.path.iterdir() if entry.name != self.lock_path.name]
        if foreign:
            raise RunDirectoryError(
                f"{self.path} is not empty (it holds {sorted(foreign)[0]}) and is no run directory; "
                "choose another --name or --runs-dir"
            )
        fsops.make_dirs(self.path / "stages")
        fsops.make_dirs(self.path / "deepspeed")
        fsops.write_json(self.started_path, {"time": time.time()})
        self.write_recipe(recipe)
        return self

    def write_recipe(self, recipe: Recipe) -> None:
        """Write the resolved recipe, with its fingerprint in the first line."""
        header = f"# The resolved recipe of this run, defaults included. Fingerprint {fingerprint(recipe)}\n"
        fsops.write_text(self.recipe_path, header + recipe_yaml(recipe))

    def load_recipe(self) -> Recipe:
        """Return the run's recipe; a folder without one is refused."""
        if not self.exists():
            raise RunDirectoryError(
                f"{self.path} is no run directory (it has no recipe.yaml); check the name"
            )
        return load_recipe(self.recipe_path, [])

    def stage(self, name: str) -> StageDirectory:
        """Return the folder of a stage (`train_vqvae`) or of one part of it (`finetune_superres/direct`)."""
        return StageDirectory(self.path / "stages" / name, name)

    def lock(self, purpose: str) -> contextlib.AbstractContextManager[None]:
        """Hold the run while something changes it. Raises LockedError naming the holder."""
        fsops.make_dirs(self.path)
        return exclusive(self.lock_path, purpose)

    def is_locked(self) -> bool:
        """Return whether a launcher works in this run now."""
        return is_held(self.lock_path)

    def is_done(self, stage: str) -> bool:
        """Return whether every unit of the stage has its DONE record."""
        return all(self.stage(unit).done() is not None for unit in units(stage))

    def inputs(self, unit: str, recipe: Recipe) -> dict[str, str]:
        """Return `unit/path` -> sha256 of the outputs that a unit (or a whole stage) reads.

        Only stages that are done count; the launcher starts a stage when all that it needs are.
        """
        found: dict[str, str] = {}
        for read in units_read_by(unit, recipe):
            record = self.stage(read).done()
            if record is not None:
                found |= {f"{read}/{name}": made.sha256 for name, made in record.outputs.items()}
        return dict(sorted(found.items()))

    def fingerprint(self, recipe: Recipe, unit: str) -> str:
        """Return the identity of a unit's result: its sections of the recipe, the seed, and its inputs."""
        values = [section(recipe, dotted) for dotted in recipe_parts(unit)]
        plain = [value.model_dump(mode="json") if isinstance(value, Config) else value for value in values]
        sections = dict(zip(recipe_parts(unit), plain, strict=True))
        return fingerprint(
            {"unit": unit, "seed": recipe.seed, "sections": sections, "inputs": self.inputs(unit, recipe)}
        )
