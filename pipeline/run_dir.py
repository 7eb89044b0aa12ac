"""A run directory: one recipe, its stages, and what each of them depends on."""

import contextlib
import fnmatch
import time
from pathlib import Path
from typing import Any

from cogview2.pipeline import fsops
from cogview2.pipeline.attempt import PROBE_PREFIX, redacted
from cogview2.pipeline.config.base import fingerprint, flat
from cogview2.pipeline.config.loading import load_recipe, recipe_yaml
from cogview2.pipeline.config.stages import STAGES, Recipe
from cogview2.pipeline.config.training import identity
from cogview2.pipeline.errors import CheckpointError, RunDirectoryError
from cogview2.pipeline.locking import Held, exclusive, is_held
from cogview2.pipeline.stage_dir import DoneRecord, StageDirectory
from cogview2.pipeline.weights_manifest import KINDS, digests, is_weights_folder

__all__ = [
    "DEPENDENCIES",
    "MODEL_FILES",
    "PARTS",
    "REPEATABLE",
    "DoneRecord",
    "RunDirectory",
    "StageDirectory",
    "needed_stages",
    "outside_weights",
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


MODEL_FILES: dict[str, tuple[str, tuple[str, ...]]] = {
    "icetk-text": ("train_tokenizer", ("tokenizer.model", "vocabulary.json")),
    "icetk-image": ("train_vqvae", ("weights.safetensors",)),
    "coglm": ("pretrain_coglm", ("weights.safetensors",)),
    "direct-sr": ("finetune_superres/direct", ("weights.safetensors",)),
    "iterative-sr": ("finetune_superres/iterative", ("weights.safetensors",)),
}
"""Kind of model (weights_manifest.KINDS) -> the unit that makes it, and its files in that unit's output folder."""

_OUTSIDE: dict[str, dict[str, tuple[str, ...]]] = {
    "train_tokenizer": {"tokenizer.take_from": ("icetk-text",)},
    "train_vqvae": {"vqvae.take_from": ("icetk-image",), "vqvae.init_from": ("icetk-image",)},
    "pretrain_coglm": {"coglm.init_from": ("coglm",)},
    "finetune_superres/direct": {"direct_sr.init_from": ("direct-sr",)},
    "finetune_superres/iterative": {"iterative_sr.init_from": ("iterative-sr",)},
    "evaluate": {"evaluate.weights": KINDS},
}
"""Unit -> keys of the recipe that name a run or a weights folder -> kinds of models that are read from there."""


def units(stage: str) -> list[str]:
    """Return the folders below stages/ that get a DONE.json each: the stage itself, or its parts."""
    return [f"{stage}/{part}" for part in PARTS[stage]] if stage in PARTS else [stage]


def needed_stages(stage: str, recipe: Recipe) -> tuple[str, ...]:
    """Return the stages whose outputs a stage reads under this recipe."""
    needed = DEPENDENCIES[stage]
    if stage == "evaluate" and recipe.evaluate.weights is not None:  # drawn by models from elsewhere
        return tuple(name for name in needed if name not in ("pretrain_coglm", "finetune_superres"))
    return needed


def outside_weights(unit: str, recipe: Recipe) -> dict[str, str]:
    """Return `key of the recipe` -> path, for the models that a unit reads from other runs or weights folders."""
    values = {key: section(recipe, key) for key in _OUTSIDE.get(unit, {})}
    return {key: value for key, value in values.items() if value is not None}


def split_step(weights: str) -> tuple[str, int | None]:
    """Return path and step of `PATH@STEP`; the step is None where there is none."""
    path, at, step = weights.rpartition("@")
    return (path, int(step)) if at and step.isdigit() else (weights, None)


def _outside_digests(key: str, value: str, kinds: tuple[str, ...]) -> dict[str, str]:
    """Return kind -> sha256 of what the run or weights folder `value` holds of `kinds`."""
    path, step = split_step(value)
    if step is not None:  # CogLM comes from a checkpoint of that step
        kinds = tuple(kind for kind in kinds if kind != "coglm")
    if is_weights_folder(Path(path)):
        return digests(Path(path), kinds)
    other = RunDirectory(Path(path))
    if not other.exists():
        raise CheckpointError(
            f"{key} {value}: {path} is neither a run nor a weights folder; check the path, or make one with "
            "cogview2 weights import"
        )
    found: dict[str, str] = {}
    for kind in kinds:
        unit, names = MODEL_FILES[kind]
        record = other.stage(unit).done()
        if record is None or any(f"output/{name}" not in record.outputs for name in names):
            raise CheckpointError(f"{key} {value}: stage {unit} of that run is not done; run it first")
        found |= {f"{kind}/{name}": record.outputs[f"output/{name}"].sha256 for name in names}
    return found


def units_read_by(unit: str, recipe: Recipe) -> list[str]:
    """Return the units whose outputs a unit (or a whole stage) reads."""
    stages = needed_stages(unit.partition("/")[0], recipe)
    found = [read for needed in stages for read in units(needed)]
    iterative = recipe.iterative_sr
    if unit == "finetune_superres/iterative" and iterative.model.init == "direct" and not iterative.init_from:
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


def settings(recipe: Recipe, unit: str) -> dict[str, Any]:
    """Return the values of the recipe that a unit's result depends on, by dotted key."""
    found: dict[str, Any] = {}
    for dotted in (*recipe_parts(unit), "seed"):
        found |= flat(identity(section(recipe, dotted)), dotted)
    return found


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
        ours = (
            f"{self.lock_path.name}*",  # with the leases beside it
            f"{PROBE_PREFIX}*",
        )  # a look at the hosts that was killed leaves its token
        names = [entry.name for entry in self.path.iterdir()]
        foreign = [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in ours)]
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
        variables = recipe.launch.environment
        secret = redacted(variables) != dict(sorted(variables.items()))
        mode = 0o600 if secret else fsops.FILE_MODE  # its owner's alone
        fsops.write_text(self.recipe_path, header + recipe_yaml(recipe), mode=mode)

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

    def lock(self, purpose: str) -> contextlib.AbstractContextManager[Held]:
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

        Only stages that are done count; the launcher starts a stage when all that it needs are. Models from other
        runs and weights folders stand beside them as `key of the recipe:kind`.

        Raises:
            CheckpointError: such a model is not there; for a unit that is done already its record is believed.
        """
        found = self._outside_inputs(unit, recipe)
        for read in units_read_by(unit, recipe):
            record = self.stage(read).done()
            if record is not None:
                found |= {f"{read}/{name}": made.sha256 for name, made in record.outputs.items()}
        return dict(sorted(found.items()))

    def _outside_inputs(self, unit: str, recipe: Recipe) -> dict[str, str]:
        found: dict[str, str] = {}
        record = self.stage(unit).done()
        for key, path in outside_weights(unit, recipe).items():
            try:
                made = _outside_digests(key, path, _OUTSIDE[unit][key])
                found |= {f"{key}:{name}": digest for name, digest in made.items()}
            except CheckpointError:
                if record is None:
                    raise
                found |= {name: made for name, made in record.inputs.items() if name.startswith(f"{key}:")}
        return found

    def fingerprint(self, recipe: Recipe, unit: str) -> str:
        """Return the identity of a unit's result: its sections of the recipe, the seed, and its inputs."""
        return fingerprint({"unit": unit, **self.settings(recipe, unit)})

    def settings(self, recipe: Recipe, unit: str) -> dict[str, Any]:
        """Return everything that a unit's result depends on, by dotted key: values of the recipe, digests of inputs."""
        inputs = {f"input {name}": digest for name, digest in self.inputs(unit, recipe).items()}
        return settings(recipe, unit) | inputs


def named_run(name: str, runs: Path) -> RunDirectory:
    """Return the run at the path `name`, or of that name below `runs`.

    Raises:
        RunDirectoryError: there is neither.
    """
    for path in (Path(name), runs / name):
        if RunDirectory(path).exists():
            return RunDirectory(path)
    raise RunDirectoryError(
        f"no run {name!r}: neither a run directory nor a name in {runs}; check --runs-dir"
    )
