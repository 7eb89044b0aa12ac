"""What a changed recipe means for the stages that were already started with the old one."""

from dataclasses import dataclass
from typing import Any

from cogview2.pipeline import fsops
from cogview2.pipeline.config.stages import STAGES, Recipe
from cogview2.pipeline.errors import ConfigError
from cogview2.pipeline.run_dir import (
    REPEATABLE,
    RunDirectory,
    settings,
    units,
    units_read_by,
)

RESTART_FLAG = "--restart-stale"


@dataclass(frozen=True)
class Change:
    """One value that differs between two recipes."""

    key: str
    old: Any
    new: Any


def changes(old: Recipe, new: Recipe, unit: str) -> list[Change]:
    """Return the values that differ among those that a unit (`finetune_superres/direct`) depends on."""
    before, after = settings(old, unit), settings(new, unit)
    names = [*before, *(name for name in after if name not in before)]
    return [
        Change(name, before.get(name), after.get(name))
        for name in names
        if before.get(name) != after.get(name)
    ]


def touched(run: RunDirectory, unit: str) -> bool:
    """Return whether a unit has results, finished or not: an attempt that failed at once binds nobody."""
    stage = run.stage(unit)
    begun = any(stage.checkpoints.glob("step_*")) or any(stage.output.glob("*"))
    return begun or stage.done_path.exists()


def set_aside(run: RunDirectory, unit: str) -> str:
    """Move the folder of a unit to RUN/stale/NNNN-unit and return that name."""
    folder = fsops.make_dirs(run.path / "stale")
    target = folder / f"{len(list(folder.iterdir())) + 1:04d}-{unit.replace('/', '.')}"
    with run.stage(unit.partition("/")[0]).lock("the launcher, setting a stage aside"):
        fsops.replace(run.stage(unit).path, target)
    return str(target.relative_to(run.path))


def withdraw(run: RunDirectory, unit: str) -> None:
    """Delete the DONE record of a unit, so that it runs again in its folder, over what it made before."""
    with run.stage(unit.partition("/")[0]).lock("the launcher, running a stage again"):
        fsops.remove_tree(run.stage(unit).done_path)


def accept_recipe(run: RunDirectory, new: Recipe, *, restart_stale: bool) -> list[str]:
    """Make `new` the recipe of an existing run.

    Stages that were started with other values of what they depend on are refused, or with `restart_stale` set
    aside together with every started stage that reads their outputs. A repeatable stage takes any values: it
    runs again.

    Returns:
        One line for each stage that was set aside.

    Raises:
        ConfigError: a stage was started with another value; the message names key, old value and new value.
    """
    old = run.load_recipe()
    aside: list[str] = []
    stale: set[str] = set()
    for stage in STAGES:
        for unit in units(stage):
            reads_stale = any(read in stale for read in units_read_by(unit, new))
            different = [] if stage in REPEATABLE else changes(old, new, unit)
            if not touched(run, unit) or not (different or reads_stale):
                continue
            if not restart_stale:
                first = different[0]
                more = f" (and {len(different) - 1} more keys)" if len(different) > 1 else ""
                raise ConfigError(
                    f"stage {unit} of {run.path} was started with {first.key} = {first.old!r}, now it is "
                    f"{first.new!r}{more}; put the old value back, choose another --name, or set the "
                    f"stage and those after it aside with {RESTART_FLAG}"
                )
            why = f"{different[0].key} changed" if different else "its inputs are made anew"
            aside.append(f"{unit}: {why}, the old one is in {set_aside(run, unit)}")
            stale.add(unit)
    if old != new:
        run.write_recipe(new)
    return aside
