"""Bytes on disk: checkpoints, exported weights, token shards; and whether there is data enough."""

from dataclasses import dataclass

from cogview2.launch.plan.inventory import inventory
from cogview2.launch.plan.setup import Setup
from cogview2.launch.plan.states import states
from cogview2.launch.plan.timing import Assumptions
from cogview2.pipeline.config import cost
from cogview2.pipeline.config.data import GENERATED_SOURCE
from cogview2.pipeline.config.stages import Recipe

_TAR_BLOCK, _NPY_HEADER = 512, 128
_JSON, _CAPTION_IDS = 400, 24
"""A sample's captions and metadata in bytes, and ids of one caption: what shards hold depends on the data, hardly on these."""
_INDEX_ENTRY = 170


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint of one unit, over all ranks."""

    size: int
    seconds: float
    """To write it and to read it back for its checksum, at the assumed speed."""
    disk: int
    """Those that are kept, and the one being written."""
    exported: int
    """The weights of the finished unit, float32."""


def checkpoint_bytes(recipe: Recipe, unit: str, setup: Setup) -> int:
    """Return the size of a checkpoint: weights once, master weights and averages in shares; tied words on both ends.

    ZeRO 3 saves no weights besides the masters, but for frozen ones.
    """
    total = 0
    for pipe_stage in range(setup.pipe_stages):
        kept = inventory(recipe, unit, setup, pipe_stage)
        if setup.zero == 0:
            found = states(kept, setup)
            total += found.weights + found.optimizer + kept.buffer_bytes
            continue
        if setup.zero == 3:
            shares = sum(-(-size // setup.data_parallel) for group in kept.groups for size in group)
            total += setup.data_parallel * 12 * shares + setup.weight_bytes * sum(kept.frozen)
        else:
            shares = sum(-(-sum(group) // (2 * setup.data_parallel)) * 2 for group in kept.groups)
            total += setup.data_parallel * 12 * shares + setup.weight_bytes * kept.total
        total += kept.buffer_bytes
    return total


def checkpoint(recipe: Recipe, unit: str, setup: Setup, assumed: Assumptions) -> Checkpoint:
    """Return what the checkpoints of a unit take."""
    size = checkpoint_bytes(recipe, unit, setup)
    keep = cost.train_section(recipe, unit).checkpoint.keep_last
    exported = 4 * cost.unit_cost(recipe, unit).parameters
    return Checkpoint(size, 2 * size / (assumed.disk_gb_s * 1e9), (keep + 1) * size, exported)


def sample_bytes(recipe: Recipe) -> int:
    """Return the size of one picture's sample in a shard, with its entry in the index."""
    grids = (recipe.data.base_grid**2, cost.superres_positions(recipe))
    arrays = [*[_CAPTION_IDS] * len(recipe.data.languages), *grids]
    members = [_JSON, *[_NPY_HEADER + 4 * numbers for numbers in arrays]]
    blocks = sum(1 + -(-size // _TAR_BLOCK) for size in members)
    return blocks * _TAR_BLOCK + _INDEX_ENTRY


@dataclass(frozen=True)
class Data:
    """The training pictures, as token shards."""

    pictures: int | None
    """None: not known; the source is not looked at."""
    sample_bytes: int
    shards: int | None
    size: int | None
    problems: tuple[str, ...]


def data(recipe: Recipe, pictures: int | None) -> Data:
    """Return what the shards take, and what there is too little of.

    Args:
        recipe: sizes of samples, shards and global batches.
        pictures: in the source; a recipe of generated drawings says it itself.
    """
    if pictures is None and recipe.data.source == GENERATED_SOURCE:
        pictures = recipe.data.drawings.count
    each = sample_bytes(recipe)
    if pictures is None:
        return Data(None, each, None, None, ())
    shards = -(-pictures // recipe.shards.samples_per_shard)
    problems = [
        f"{unit}: a global batch of {batch} is more than the {pictures} pictures: a step would see some of them twice"
        for unit in cost.UNITS
        if (batch := cost.samples_per_step(recipe, unit)) > pictures
    ]
    return Data(pictures, each, shards, pictures * each, tuple(problems))
