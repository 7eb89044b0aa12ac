"""Which ways to train a unit there are for a number of ranks, what each needs, and which one to take."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from cogview2.launch.plan.memory import Memory, worst_memory
from cogview2.launch.plan.setup import Setup
from cogview2.launch.plan.timing import Assumptions, StepTime, step_time
from cogview2.pipeline.config import cost
from cogview2.pipeline.config.hardware import Hardware
from cogview2.pipeline.config.stages import Recipe

_MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_ZERO = (0, 1, 2, 3)
SLACK = 1.05
"""A simpler way is taken as long as it is at most this factor slower: predictions are not finer."""


@dataclass(frozen=True)
class Candidate:
    """One way, and what it is predicted to need."""

    setup: Setup
    memory: Memory
    time: StepTime
    budget: float
    """Bytes that a device has for it."""

    @property
    def fits(self) -> bool:
        """Whether its worst moment is within the budget."""
        return self.memory.peak <= self.budget

    def words(self) -> str:
        """Return it in a few words."""
        setup = self.setup
        parts = [f"ZeRO {setup.zero}"]
        parts += [f"pp {setup.pipe_stages}"] if setup.pipe_stages > 1 else []
        parts += ["offload"] if setup.offload_optimizer else []
        parts += ["checkpointing"] if setup.checkpointing else ["no checkpointing"]
        return f"{', '.join(parts)}, micro batch {setup.micro_batch}"


def budget(hardware: Hardware, assumed: Assumptions) -> float:
    """Return the bytes of a device that training may take."""
    return (hardware.memory_gb - assumed.reserve_gb) * 1e9


def evaluate(recipe: Recipe, unit: str, setup: Setup, hardware: Hardware, assumed: Assumptions) -> Candidate:
    """Return what a setup is predicted to need."""
    return Candidate(
        setup,
        worst_memory(recipe, unit, setup),
        step_time(recipe, unit, setup, hardware, assumed),
        budget(hardware, assumed),
    )


def _micro_batches(share: int) -> list[int]:
    """Return the micro batches that divide a data-parallel rank's share of the global batch."""
    return [size for size in _MICRO_BATCHES if share % size == 0]


def _pipe_stages(recipe: Recipe, unit: str, ranks: int) -> list[int]:
    """Return the divisors of the ranks that CogLM's layers allow; the other networks have no pipe stages."""
    most = recipe.coglm.model.layers if unit == cost.COGLM else 1
    return [stages for stages in range(1, min(ranks, most) + 1) if ranks % stages == 0]


def setups(recipe: Recipe, unit: str, own: Setup, *, offload: bool = False) -> Iterator[Setup]:
    """Yield every way that the rules of pipeline/config/deepspeed.py allow; precision and sums stay the recipe's.

    Args:
        recipe: sizes and global batch.
        unit: what is trained.
        own: a setup of the recipe, for everything that does not vary.
        offload: with the optimizer in the host's memory instead.
    """
    train = cost.train_section(recipe, unit)
    zeros = [zero for zero in _ZERO if zero > 0 or own.precision in ("fp32", "autocast")]
    if own.muon:
        zeros = [0]
    checkpoints = (0,) if unit == cost.VQVAE else (0, 1)
    for stages in _pipe_stages(recipe, unit, own.ranks):
        parallel = own.ranks // stages
        share, rest = divmod(train.global_batch, parallel)
        if rest or not share:
            continue
        # fp16 that is summed in fp32, and offload, lose gradients of the tied words between pipe stages.
        if stages > 1 and (offload or (own.precision == "fp16" and own.accumulate == "fp32")):
            continue
        for zero in [zero for zero in zeros if stages == 1 or zero == 1]:
            if offload and zero == 0:
                continue
            for checkpointing in checkpoints:
                for micro in _micro_batches(share):
                    yield replace(
                        own,
                        zero=zero,
                        pipe_stages=stages,
                        micro_batch=micro,
                        accumulation=share // micro,
                        checkpointing=checkpointing,
                        offload_optimizer=offload,
                        offload_parameters=False,
                        overlap=zero == 3 or (zero == 2 and own.overlap),
                        partition=own.partition if isinstance(own.partition, str) else "cost",
                    )


def _simpler(one: Candidate) -> tuple[int, int, int, float]:
    """Order of ways that are about equally fast: fewer pipe stages, lower ZeRO stage, nothing recomputed, less memory."""
    setup = one.setup
    return setup.pipe_stages, setup.zero, setup.checkpointing, one.memory.peak


def recommend(candidates: list[Candidate]) -> Candidate | None:
    """Return the fastest that fits; of those about as fast, the simplest. None when nothing fits."""
    fitting = [one for one in candidates if one.fits]
    if not fitting:
        return None
    fastest = min(one.time.total for one in fitting)
    return min((one for one in fitting if one.time.total <= SLACK * fastest), key=_simpler)


def candidates(
    recipe: Recipe, unit: str, own: Setup, hardware: Hardware, assumed: Assumptions
) -> list[Candidate]:
    """Return all ways with what they need; with offload only where nothing fits without."""
    found = [evaluate(recipe, unit, setup, hardware, assumed) for setup in setups(recipe, unit, own)]
    if not any(one.fits for one in found) and not own.muon:
        found += [
            evaluate(recipe, unit, setup, hardware, assumed)
            for setup in setups(recipe, unit, own, offload=True)
        ]
    return found


def best_of_each(found: list[Candidate]) -> list[Candidate]:
    """Return the best of each (ZeRO stage, pipe stages, offload): the fastest that fits, else the smallest."""
    kinds: dict[tuple[int, int, bool], list[Candidate]] = {}
    for one in found:
        kinds.setdefault((one.setup.pipe_stages, one.setup.zero, one.setup.offload_optimizer), []).append(one)
    return [
        recommend(group) or min(group, key=lambda one: one.memory.peak) for _, group in sorted(kinds.items())
    ]


def reasons(chosen: Candidate, found: list[Candidate]) -> list[str]:
    """Return why `chosen` is recommended, a sentence each."""
    said = []
    others = [one for one in best_of_each(found) if one.setup != chosen.setup]
    unfit = [one for one in others if not one.fits]
    for one in unfit:
        if one.setup.pipe_stages == 1:
            said.append(
                f"{one.words()} needs {one.memory.peak / 1e9:.1f} GB, most of it {one.memory.largest()}"
            )
    if chosen.setup.checkpointing:
        without = [
            one
            for one in found
            if not one.setup.checkpointing
            and (one.setup.zero, one.setup.pipe_stages) == (chosen.setup.zero, chosen.setup.pipe_stages)
        ]
        smallest = min(without, key=lambda one: one.memory.peak, default=None)
        if smallest is not None and not smallest.fits:
            said.append(f"without checkpointing even micro batch 1 needs {smallest.memory.peak / 1e9:.1f} GB")
    piped = [one for one in others if one.fits and one.setup.pipe_stages > chosen.setup.pipe_stages]
    if piped:
        best = min(piped, key=lambda one: one.time.total)
        more = best.time.total / chosen.time.total - 1
        said.append(
            f"pp {best.setup.pipe_stages} would take {more:+.1%} (bubble {best.time.bubble_share:.1%})"
        )
    if chosen.setup.pipe_stages > 1:
        plain = [one for one in others if one.fits and one.setup.pipe_stages == 1]
        if plain:
            best = min(plain, key=lambda one: one.time.total)
            more = best.time.total / chosen.time.total - 1
            said.append(f"pp 1 would take {more:+.1%} ({best.words()})")
        else:
            said.append("nothing with pp 1 fits")
    return said
