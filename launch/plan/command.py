"""The command `cogview2 plan`."""

import argparse
import json
from pathlib import Path

from cogview2.launch.cascade import select_stages
from cogview2.launch.hostfile import read_hostfile
from cogview2.launch.plan.results import hosts_of, plan
from cogview2.launch.plan.table import grid, text
from cogview2.launch.plan.timing import Assumptions
from cogview2.pipeline.config.hardware import Hardware, find_hardware, hardware_table
from cogview2.pipeline.config.loading import load_recipe, shipped_recipes
from cogview2.pipeline.config.stages import Recipe
from cogview2.pipeline.errors import ConfigError, ExitCode

SUMMARY = "memory, time, disk and topology of a recipe, before anything starts"
DEFAULT_HARDWARE = "a100_80"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `cogview2 plan`."""
    parser.add_argument(
        "recipe", metavar="RECIPE", nargs="?", help=f"a .yaml file, or one of: {', '.join(shipped_recipes())}"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--hosts", type=Path, metavar="FILE", help="a line `NAME slots=N` for each host")
    where.add_argument("--ranks", type=int, metavar="N", help="devices (default: the recipe's launch.ranks)")
    parser.add_argument(
        "--hardware",
        metavar="NAME",
        help=f"device of the table (default: the recipe's launch.hardware, else {DEFAULT_HARDWARE})",
    )
    parser.add_argument("--stages", metavar="A..B", help="a range, a list a,b, or one stage (default: all)")
    parser.add_argument("--pictures", type=int, metavar="N", help="pictures of the source")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one key of the recipe"
    )
    parser.add_argument("--list-hardware", action="store_true", help="print the hardware table")
    parser.add_argument(
        "--json", action="store_true", help="print the plan as JSON; sizes in bytes, times in seconds"
    )


def _list_hardware() -> None:
    rows: list[tuple[str, ...]] = [
        ("name", "GB", "GB/s", "TFLOP/s by type", "a host", "link GB/s", "network GB/s")
    ]
    for name, one in hardware_table().items():
        kinds = ", ".join(f"{kind} {value:g}" for kind, value in one.tflops.items())
        numbers = (one.memory_gb, one.memory_gb_s)
        links = (one.per_host, one.link_gb_s, one.network_gb_s)
        rows.append((name, *[f"{n:g}" for n in numbers], kinds, *[f"{n:g}" for n in links]))
    print("\n".join(grid(rows, 0)))


def _slots_and_hardware(arguments: argparse.Namespace, recipe: Recipe) -> tuple[list[int], str, Hardware]:
    name = arguments.hardware or recipe.launch.hardware or DEFAULT_HARDWARE
    hardware = find_hardware(name)
    if arguments.hosts is not None:
        slots = [host.slots for host in read_hostfile(arguments.hosts)]
        return slots, name, hardware.model_copy(update={"per_host": max(slots)})
    ranks = arguments.ranks if arguments.ranks is not None else recipe.launch.ranks
    if not 1 <= ranks <= 1 << 20:
        raise ConfigError(f"--ranks {ranks}: a plan needs at least 1 rank and at most {1 << 20}")
    return hosts_of(ranks, hardware), name, hardware


def run(arguments: argparse.Namespace) -> int:
    """Print a plan.

    Returns:
        0, or 78 when the recipe's own way cannot run: after the plan one sentence for each stage says why.

    Raises:
        ConfigError: the recipe, the host list or the hardware's name cannot be used.
    """
    if arguments.list_hardware:
        _list_hardware()
        return ExitCode.DONE
    if arguments.recipe is None:
        raise ConfigError(f"plan needs a recipe: a .yaml file, or one of {', '.join(shipped_recipes())}")
    if arguments.pictures is not None and arguments.pictures < 1:
        raise ConfigError(f"--pictures {arguments.pictures}: must be at least 1")
    recipe = load_recipe(arguments.recipe, list(arguments.set))
    slots, name, hardware = _slots_and_hardware(arguments, recipe)
    stages = select_stages(arguments.stages)
    found = plan(recipe, slots, name, hardware, Assumptions(), stages=stages, pictures=arguments.pictures)
    print(json.dumps(found, indent=1) if arguments.json else text(found))
    if found["refusals"]:
        raise ConfigError("\n".join(found["refusals"]))
    return ExitCode.DONE
