"""The checkpoints of a unit, as its job must find them."""

from collections.abc import Mapping
from typing import Any

from cogview2.pipeline.config.deepspeed import precision
from cogview2.pipeline.config.training import TrainConfig
from cogview2.pipeline.stage_dir import StageDirectory
from cogview2.pipeline.training.checkpoint import Checkpointer
from cogview2.pipeline.training.state.identity import Identity
from cogview2.pipeline.training.state.manifest import Topology
from cogview2.stages._runner import StageContext


def checkpointer(
    context: StageContext, unit: StageDirectory, train: TrainConfig, deepspeed: Mapping[str, Any]
) -> Checkpointer:
    """Return the checkpointer of a unit.

    Args:
        context: of the stage.
        unit: the stage or the part of it that trains.
        train: its section of the recipe.
        deepspeed: its resolved configuration.
    """
    recipe, run = context.recipe, context.run
    identity = Identity(run.fingerprint(recipe, unit.name), run.settings(recipe, unit.name), recipe.seed)
    topology = Topology(
        ranks=context.world.size,
        pipe_stages=train.pipeline_parallel,
        zero=deepspeed["zero_optimization"]["stage"],
        precision=precision(dict(deepspeed)),
    )
    return Checkpointer(unit.checkpoints, context.world, identity, topology, train.checkpoint, context.lock)
