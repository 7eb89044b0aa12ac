"""A whole plan as plain values: what `--json` prints and every table is made from."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from cogview2.launch.plan import storage
from cogview2.launch.plan.sampling import evaluation_pictures, sampling
from cogview2.launch.plan.setup import Setup, setup_of
from cogview2.launch.plan.timing import Assumptions
from cogview2.launch.plan.topologies import (
    Candidate,
    best_of_each,
    candidates,
    evaluate,
    reasons,
    recommend,
)
from cogview2.pipeline.config import cost
from cogview2.pipeline.config.deepspeed import resolve
from cogview2.pipeline.config.hardware import Hardware
from cogview2.pipeline.config.stages import STAGES, Recipe
from cogview2.pipeline.config.units import hosts_used, resolve_unit, units_of
from cogview2.pipeline.errors import ConfigError

Values = dict[str, Any]


def _candidate(recipe: Recipe, unit: str, one: Candidate, assumed: Assumptions) -> Values:
    setup, train = one.setup, cost.train_section(recipe, unit)
    hours = train.steps * one.time.total / 3600
    samples = train.global_batch / one.time.total
    saved = storage.checkpoint(recipe, unit, setup, assumed)
    return {
        "words": one.words(),
        "zero": setup.zero,
        "pipe_stages": setup.pipe_stages,
        "data_parallel": setup.data_parallel,
        "micro_batch": setup.micro_batch,
        "accumulation": setup.accumulation,
        "checkpointing": bool(setup.checkpointing),
        "offload": setup.offload_optimizer,
        "precision": setup.precision,
        "accumulate": setup.accumulate,
        "fits": one.fits,
        "memory": one.memory.kinds,
        "peak": one.memory.peak,
        "moment": one.memory.moment,
        "worst_pipe_stage": one.memory.pipe_stage,
        "host_memory": one.memory.host,
        "step": asdict(one.time),
        "mfu": one.time.mfu,
        "samples_per_second": samples,
        "tokens_per_second": samples * cost.tokens_per_sample(recipe, unit),
        "hours": hours,
        "gpu_hours": hours * setup.ranks,
        "checkpoint": asdict(saved),
        "checkpoint_share": saved.seconds
        / max(train.checkpoint.every_steps * one.time.total + saved.seconds, 1e-9),
    }


def _own(recipe: Recipe, unit: str, ranks: int) -> tuple[Setup | None, str | None]:
    """Return the recipe's own way on these ranks, or why `run` and `submit` would refuse it."""
    train = cost.train_section(recipe, unit)
    try:
        return setup_of(resolve_unit(recipe, unit, ranks), train, ranks), None
    except ConfigError as error:
        return None, str(error)


def _template(recipe: Recipe, unit: str, ranks: int) -> Setup:
    """Return a setup with the recipe's precision, on as many ranks as it takes to have one, for what does not vary."""
    train = cost.train_section(recipe, unit)
    widest = train.model_copy(update={"global_batch": 720_720 * ranks})
    multiple = ranks * train.pipeline_parallel
    return replace(setup_of(resolve(train.deepspeed, widest, multiple), widest, multiple), ranks=ranks)


def _too_big(unit: str, one: Candidate, hardware: str, remedy: str) -> str:
    kind = one.memory.largest()
    return (
        f"{unit}: {one.words()} needs {one.memory.peak / 1e9:.1f} GB on each of {one.setup.ranks} ranks, "
        f"{one.memory.kinds[kind] / 1e9:.1f} GB of it {kind}, but {hardware} has {one.budget / 1e9:.0f} GB to give; {remedy}"
    )


def _remedy(recommended: Candidate | None) -> str:
    if recommended is None:
        return "use more ranks or larger devices"
    return f"use {recommended.words()}"


def unit_plan(
    recipe: Recipe, unit: str, ranks: int, hardware: Hardware, name: str, assumed: Assumptions
) -> Values:
    """Return the plan of one training unit; `refusal` says why its own way cannot run."""
    train, sizes = cost.train_section(recipe, unit), cost.unit_cost(recipe, unit)
    own, refusal = _own(recipe, unit, ranks)
    found = candidates(recipe, unit, own or _template(recipe, unit, ranks), hardware, assumed)
    best = recommend(found)
    chosen = None if own is None else evaluate(recipe, unit, own, hardware, assumed)
    if chosen is not None and not chosen.fits:
        refusal = _too_big(unit, chosen, name, _remedy(best))
    elif refusal is not None:
        refusal = f"{unit}: {refusal}"
    if not found:
        refusal = (
            f"{unit}: a global batch of {train.global_batch} has no equal share for {ranks} ranks; "
            f"use at most {train.global_batch} ranks that divide it, or change train.global_batch"
        )
    elif best is None:
        smallest = min(found, key=lambda one: one.memory.peak)
        refusal = _too_big(unit, smallest, name, _remedy(None))
    samples = train.steps * train.global_batch
    return {
        "unit": unit,
        "ranks": ranks,
        "parameters": sizes.parameters,
        "trained": sizes.trained,
        "steps": train.steps,
        "samples_per_step": train.global_batch,
        "tokens_per_step": train.global_batch * sizes.tokens,
        "samples": samples,
        "tokens": samples * sizes.tokens,
        "model_flops": samples * sizes.train,
        "flops_per_sample": sizes.train,
        "own": None if chosen is None else _candidate(recipe, unit, chosen, assumed),
        "recommended": None if best is None else _candidate(recipe, unit, best, assumed),
        "why": [] if best is None else reasons(best, found),
        "compared": [_candidate(recipe, unit, one, assumed) for one in best_of_each(found)],
        "refusal": refusal,
    }


def _ranks_used(recipe: Recipe, stage: str, slots: Sequence[int]) -> int:
    """Return the ranks that a stage runs on; all of them where it is refused, for the plan of each unit says why."""
    try:
        return sum(slots[: hosts_used(recipe, stage, slots)])
    except ConfigError:
        return sum(slots)


def _cascade(units: list[Values], way: str, evaluating: float, ranks: int, shards: int) -> Values | None:
    """Return time and disk of the whole cascade, every unit in the same way; None where one of them has none."""
    taken = [unit[way] for unit in units]
    if any(one is None or not one["fits"] for one in taken):
        return None
    hours = sum(one["hours"] for one in taken) + evaluating
    disk = sum(one["checkpoint"]["disk"] + one["checkpoint"]["exported"] for one in taken) + shards
    gpu_hours = sum(one["gpu_hours"] for one in taken) + evaluating * ranks
    return {"hours": hours, "gpu_hours": gpu_hours, "disk": disk}


def hosts_of(ranks: int, hardware: Hardware) -> list[int]:
    """Return the ranks of each host when all but the last are full."""
    return [min(hardware.per_host, ranks - first) for first in range(0, ranks, hardware.per_host)]


def plan(
    recipe: Recipe,
    slots: Sequence[int],
    name: str,
    hardware: Hardware,
    assumed: Assumptions,
    *,
    stages: Sequence[str] = tuple(STAGES),
    pictures: int | None = None,
) -> Values:
    """Return the plan of a cascade.

    Args:
        recipe: what is trained.
        slots: ranks of each host; a stage may use fewer hosts than there are (`hosts_used`).
        name: of the device, for messages.
        hardware: the device.
        assumed: see there.
        stages: those that are planned.
        pictures: in the source, where the recipe does not say.
    """
    ranks = sum(slots)
    units = [
        unit_plan(recipe, unit, used, hardware, name, assumed) | {"idle_ranks": ranks - used}
        for stage in stages
        if units_of(stage)
        for used in [_ranks_used(recipe, stage, slots)]
        for unit in units_of(stage)
    ]
    drawn = sampling(recipe, hardware, assumed)
    evaluated = evaluation_pictures(recipe)
    found = storage.data(recipe, pictures)
    evaluating = "evaluate" in stages
    hours = evaluated * drawn.seconds_per_picture / ranks / 3600 * evaluating
    epochs = {unit["unit"]: unit["samples"] / found.pictures if found.pictures else None for unit in units}
    return {
        "recipe": recipe.name,
        "ranks": ranks,
        "hosts": len(slots),
        "hardware": {"name": name, **hardware.model_dump()},
        "assumptions": asdict(assumed),
        "units": units,
        "sampling": asdict(drawn),
        "evaluate": {"pictures": evaluated, "hours": hours, "gpu_hours": hours * ranks}
        if evaluating
        else None,
        "data": asdict(found) | {"epochs": epochs},
        "cascade": {
            way: _cascade(units, way, hours, ranks, found.size or 0) for way in ("own", "recommended")
        },
        "refusals": [unit["refusal"] for unit in units if unit["refusal"] is not None],
    }
