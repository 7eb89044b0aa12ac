"""Memory of a rank at the moments when most of it is taken: end of the forward pass, backward pass, update."""

from dataclasses import dataclass

from cogview2.launch.plan.activations import Activations, activations
from cogview2.launch.plan.inventory import inventory
from cogview2.launch.plan.setup import Setup
from cogview2.launch.plan.states import States, states
from cogview2.pipeline.config.stages import Recipe

KINDS = ("weights", "gradients", "master", "optimizer", "activations", "logits", "buffers")
MOMENTS = ("end of forward", "backward begins", "backward ends", "update")


@dataclass(frozen=True)
class Memory:
    """Bytes on the device of one rank. The kinds at the worst moment add up to `peak`."""

    kinds: dict[str, int]
    peak: int
    moment: str
    host: int
    """Bytes in the host's memory for this rank (offload)."""
    pipe_stage: int = 0

    def largest(self) -> str:
        """Return the kind that takes most."""
        return max(self.kinds, key=lambda kind: self.kinds[kind])


def _moments(held: States, used: Activations, setup: Setup) -> dict[str, dict[str, int]]:
    """Return the kinds that move, at each moment."""
    several = setup.accumulation > 1
    begun = held.summing if several else held.standing
    exchange = held.reducing + used.exchange
    # The tied table gets its gradient from the loss and from the first layer: both wait for each other.
    return {
        MOMENTS[0]: {
            "gradients": begun,
            "activations": used.kept,
            "logits": used.loss,
            "buffers": used.exchange,
        },
        MOMENTS[1]: {
            "gradients": begun,
            "activations": used.kept + used.recomputed + used.transient,
            "logits": used.table,
            "buffers": exchange,
        },
        MOMENTS[2]: {
            "gradients": held.summing,
            "activations": max(used.recomputed, used.transient),
            "logits": 2 * used.table,
            "buffers": exchange,
        },
        MOMENTS[3]: {
            "gradients": held.gradients + held.updating,
            "activations": 0,
            "logits": 0,
            "buffers": used.exchange,
        },
    }


def memory_of(held: States, used: Activations, setup: Setup, pipe_stage: int = 0) -> Memory:
    """Join states and activations to the worst moment of a step, from the second step on."""
    moments = _moments(held, used, setup)
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    kinds = dict.fromkeys(KINDS, 0) | moments[moment]
    kinds |= {"weights": held.weights, "master": held.master, "optimizer": held.optimizer}
    kinds["buffers"] += held.buffers
    return Memory(kinds, sum(kinds.values()), moment, held.host, pipe_stage)


def memory(recipe: Recipe, unit: str, setup: Setup, pipe_stage: int = 0, device: str = "cuda") -> Memory:
    """Return the memory of the first data-parallel rank of a pipe stage."""
    held = states(inventory(recipe, unit, setup, pipe_stage), setup)
    return memory_of(held, activations(recipe, unit, setup, pipe_stage, device), setup, pipe_stage)


def worst_memory(recipe: Recipe, unit: str, setup: Setup) -> Memory:
    """Return the memory of the pipe stage that needs most."""
    found = [memory(recipe, unit, setup, pipe_stage) for pipe_stage in range(setup.pipe_stages)]
    return max(found, key=lambda one: one.peak)
