"""The tables of docs/scaling.md, made from plans of cogview2_6b; a test compares the two."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from cogview2.launch.plan.memory import KINDS
from cogview2.launch.plan.results import hosts_of, plan
from cogview2.launch.plan.table import seconds
from cogview2.launch.plan.timing import Assumptions
from cogview2.pipeline.config.hardware import find_hardware
from cogview2.pipeline.config.loading import load_recipe

CLUSTERS = ((8, "a100_80"), (64, "a100_80"), (256, "a100_40"), (1024, "h100_80"))
"""Ranks and device of each paper plan."""
STAGE = "pretrain_coglm"
WAYS = (("recipe", "own"), ("best", "recommended"))


def command(ranks: int, hardware: str) -> str:
    """Return the command that prints the figures of a cluster."""
    return f"cogview2 plan cogview2_6b --ranks {ranks} --hardware {hardware} --stages {STAGE}"


@cache
def figures(ranks: int, hardware: str) -> dict[str, Any]:
    """Return the plan of CogLM's pretraining on a cluster, as `--json` prints it."""
    recipe, device = load_recipe("cogview2_6b", []), find_hardware(hardware)
    return plan(recipe, hosts_of(ranks, device), hardware, device, Assumptions(), stages=(STAGE,))


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(row) for row in rows]
    lines.insert(1, " | ".join("---" for _ in rows[0]))
    return "\n".join(f"| {line} |" for line in lines)


def _each_way() -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Return (label, unit, way) of every cluster and way that there is."""
    found = []
    for ranks, hardware in CLUSTERS:
        (unit,) = figures(ranks, hardware)["units"]
        found += [
            (f"{ranks} {hardware}, {name}", unit, unit[key]) for name, key in WAYS if unit[key] is not None
        ]
    return found


def topologies() -> str:
    """Return topology, time and utilisation of every cluster."""
    rows: list[tuple[str, ...]] = [
        ("ranks, way", "ZeRO", "pp", "dp", "micro batch", "checkpointing", "step", "MFU", "days", "GPU-hours")
    ]
    for label, _, way in _each_way():
        rows.append(
            (
                label,
                str(way["zero"]),
                str(way["pipe_stages"]),
                str(way["data_parallel"]),
                f"{way['micro_batch']} x {way['accumulation']}",
                "yes" if way["checkpointing"] else "no",
                seconds(way["step"]["total"]),
                f"{way['mfu']:.0%}",
                f"{way['hours'] / 24:,.1f}",
                f"{way['gpu_hours']:,.0f}",
            )
        )
    return _markdown(rows)


def memories() -> str:
    """Return the memory of a rank by kind, in 10^9 bytes, at its worst moment."""
    rows: list[tuple[str, ...]] = [("ranks, way", *KINDS, "peak", "worst at")]
    for label, _, way in _each_way():
        kinds = [f"{way['memory'][kind] / 1e9:.1f}" for kind in KINDS]
        rows.append((label, *kinds, f"{way['peak'] / 1e9:.1f}", way["moment"]))
    return _markdown(rows)


def communication() -> str:
    """Return what a rank sends in a step, and what of a step is no compute."""
    rows: list[tuple[str, ...]] = [
        ("ranks, way", "reduce GB", "gather GB", "pipe GB", "reduce", "gather", "pipe", "bubble", "update")
    ]
    for label, _, way in _each_way():
        step = way["step"]
        sent = [f"{step['volume'][part] / 1e9:.1f}" for part in ("reduce", "gather", "pipe")]
        shares = [
            f"{step[part] / step['total']:.1%}" for part in ("reduce", "gather", "pipe", "bubble", "update")
        ]
        rows.append((label, *sent, *shares))
    return _markdown(rows)


def pipelines() -> str:
    """Return the best way of each number of pipe stages, against the best of all."""
    rows: list[tuple[str, ...]] = [("ranks", *[f"pp {stages}" for stages in (1, 2, 4, 8, 16, 32)])]
    for ranks, hardware in CLUSTERS:
        (unit,) = figures(ranks, hardware)["units"]
        cells = [f"{ranks} {hardware}"]
        for stages in (1, 2, 4, 8, 16, 32):
            ways = [one for one in unit["compared"] if one["pipe_stages"] == stages and one["fits"]]
            best = min(ways, key=lambda one: one["step"]["total"], default=None)
            cells.append(
                "-"
                if best is None
                else f"{seconds(best['step']['total'])}, bubble {best['step']['bubble_share']:.0%}"
            )
        rows.append(tuple(cells))
    return _markdown(rows)


def limits() -> str:
    """Return the figures of what breaks first, of the best way of every cluster."""
    rows: list[tuple[str, ...]] = [
        (
            "ranks",
            "samples a rank and step",
            "checkpoint",
            "its share of the time",
            "tokens/s",
            "shards read",
        )
    ]
    for ranks, hardware in CLUSTERS:
        found = figures(ranks, hardware)
        (unit,) = found["units"]
        way = unit["recommended"]
        rate = way["samples_per_second"] * found["data"]["sample_bytes"] / 1e6
        rows.append(
            (
                f"{ranks} {hardware}",
                f"{unit['samples_per_step'] / ranks:g}",
                f"{way['checkpoint']['size'] / 1e9:.1f} GB in {seconds(way['checkpoint']['seconds'])}",
                f"{way['checkpoint_share']:.1%}",
                f"{way['tokens_per_second']:,.0f}",
                f"{rate:.0f} MB/s",
            )
        )
    return _markdown(rows)


def tables() -> dict[str, str]:
    """Return every table of docs/scaling.md by its name there."""
    return {
        "topologies": topologies(),
        "memory": memories(),
        "communication": communication(),
        "pipelines": pipelines(),
        "limits": limits(),
    }


if __name__ == "__main__":
    for name, table in tables().items():
        print(f"<!-- {name} -->\n{table}\n")
