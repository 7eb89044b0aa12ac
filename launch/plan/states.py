"""Bytes of weights, gradients, master weights, optimizer states and buffers of one rank, by DeepSpeed's own rules.

Which optimizer wrapper runs decides (deepspeed/runtime/engine.py, 0.19.8). With n numbers of a parameter group, d
data-parallel ranks, a(n) = n rounded up to 2d, w bytes a weight:

    ZeRO 0                            weights w n, gradients w n, states 8 n
    ZeRO 1, bf16 summed in fp32       (BF16_Optimizer) weights 2 a(n), gradients 4 a(n) + 2 n, master 4 a(n)/d, states 8 a(n)/d
    ZeRO 1 or 2, else                 weights w a(n), master 4 a(n)/d, states 8 a(n)/d; gradients while they are summed:
                                      w n (ZeRO 1), own share (ZeRO 2); after the reduction the own share, whole parameters
                                      that touch it, or exactly 4 a(n)/d where ZeRO 2 sums 16-bit gradients in fp32
    ZeRO 3                            everything by shares of each parameter, rounded up: p = ceil(size/d)

A test compares every kind with the tensors of real engines (tests/distributed/test_plan_memory.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cogview2.launch.plan.inventory import Inventory
from cogview2.launch.plan.setup import Setup

_MASTER, _ADAM, _MUON = 4, 8, 4
"""Bytes of fp32 master weights, of AdamW's two averages, of Muon's one."""
_ALL_REDUCE = 500_000_000
"""Numbers that DeepSpeed reduces together outside ZeRO."""


@dataclass(frozen=True)
class States:
    """Bytes on the device of one rank that live from step to step, and two moments when more is there."""

    weights: int = 0
    gradients: int = 0
    """Between the backward pass and the update: what the update reads."""
    master: int = 0
    optimizer: int = 0
    buffers: int = 0
    """Of the modules, and of ZeRO from the start of training on."""
    standing: int = 0
    """Gradients that take memory before the first micro batch of a step."""
    summing: int = 0
    """Gradients while micro batches are added up: at most."""
    reducing: int = 0
    """Buffers of the reduction during the backward pass."""
    updating: int = 0
    """Further copies of gradients during the update."""
    host: int = 0
    """In the host's memory, with offload."""

    @property
    def held(self) -> int:
        """What no moment of a step goes without."""
        return self.weights + self.master + self.optimizer + self.buffers


def aligned(numbers: int, data_parallel: int) -> int:
    """Return the size of a flat group: ZeRO's shares start on even numbers."""
    unit = 2 * data_parallel
    return -(-numbers // unit) * unit


def touching(sizes: Sequence[int], data_parallel: int, rank: int) -> int:
    """Return the numbers of all parameters that have a part in the share of `rank`."""
    share = aligned(sum(sizes), data_parallel) // data_parallel
    start, stop, position, found = rank * share, (rank + 1) * share, 0, 0
    for size in sizes:
        if position < stop and position + size > start:
            found += size
        position += size
    return found


def _adam_bytes(inventory: Inventory, setup: Setup) -> int:
    if not setup.muon:
        return _ADAM * inventory.trained
    return _MUON * sum(inventory.matrices) + _ADAM * sum(inventory.others)


def _plain(inventory: Inventory, setup: Setup) -> States:
    """Without ZeRO: DeepSpeed reduces copies of gradients, and keeps nothing else."""
    gradients = setup.weight_bytes * inventory.trained
    most = min(inventory.trained, _ALL_REDUCE + max(max(group) for group in inventory.groups))
    return States(
        weights=setup.weight_bytes * inventory.total,
        gradients=gradients,
        optimizer=_adam_bytes(inventory, setup),
        buffers=inventory.buffer_bytes,
        summing=gradients,
        reducing=setup.communicate_bytes * most * (setup.data_parallel > 1),
    )


def _sizes(inventory: Inventory, setup: Setup) -> tuple[int, int, int]:
    """Return numbers: flat groups, this rank's share of them, the largest share of one group."""
    flats = [aligned(sum(group), setup.data_parallel) for group in inventory.groups]
    return sum(flats), sum(flats) // setup.data_parallel, max(flats) // setup.data_parallel


def _bf16_summed_in_fp32(inventory: Inventory, setup: Setup) -> States:
    flat, share, _ = _sizes(inventory, setup)
    gradients = 4 * flat + 2 * inventory.trained
    # Flat groups that fit are joined, which copies them; a larger one is reduced in place.
    groups = [aligned(sum(group), setup.data_parallel) for group in inventory.groups]
    joined = sum(groups) if len(groups) > 1 and groups[0] <= _ALL_REDUCE else 0
    copies = 4 * joined + (setup.communicate_bytes != 4) * setup.communicate_bytes * max(max(groups), joined)
    return States(
        weights=2 * (flat + sum(inventory.frozen)),
        gradients=gradients,
        master=_MASTER * share,
        optimizer=_ADAM * share,
        buffers=inventory.buffer_bytes,
        standing=4 * flat,
        summing=gradients,
        updating=copies * (setup.data_parallel > 1),
    )


def _sharded(inventory: Inventory, setup: Setup, rank: int) -> States:
    """ZeRO 1 and 2 without offload."""
    flat, share, largest = _sizes(inventory, setup)
    width, mixed = setup.weight_bytes, setup.accumulate_bytes != setup.weight_bytes
    own = width * sum(touching(group, setup.data_parallel, rank) for group in inventory.groups)
    bucket = width * setup.bucket * (1 + setup.overlap) if setup.contiguous else 0
    if setup.communicate_bytes != width:
        bucket += setup.communicate_bytes * setup.bucket  # a bucket travels in another type
    if mixed:
        own = 4 * share
    # The flat copy of a group's gradients, then its fp32 copy where it is not fp32 already; the flat one of the compact
    # form is the gradients themselves.
    updating = 0 if mixed else (width + (4 if width != 4 else 0)) * largest
    summing = own
    if setup.zero == 1:
        summing = width * inventory.trained
    elif not mixed and setup.accumulation > 1:
        summing = 2 * own  # the new micro batch's beside the sum
    return States(
        weights=width * (flat + sum(inventory.frozen)),
        gradients=own,
        master=_MASTER * share,
        optimizer=_ADAM * share,
        buffers=inventory.buffer_bytes,
        summing=summing,
        reducing=bucket,
        updating=updating,
    )


def _offloaded(inventory: Inventory, setup: Setup, rank: int) -> States:
    """ZeRO 1 and 2 with the optimizer in the host's memory: fp32 weights, states and gradients, 16-bit weights."""
    flat, share, _ = _sizes(inventory, setup)
    width, largest = setup.weight_bytes, max(max(group) for group in inventory.groups)
    mixed = setup.accumulate_bytes != width
    bucket = width * setup.bucket * (1 + setup.overlap)
    own = width * sum(touching(group, setup.data_parallel, rank) for group in inventory.groups)
    own = 4 * share if mixed else own
    return States(
        weights=width * (flat + sum(inventory.frozen)),
        buffers=inventory.buffer_bytes + width * largest,
        summing=setup.accumulate_bytes * inventory.trained if setup.zero == 1 else own,
        reducing=bucket,
        host=(_MASTER + _ADAM + 4 + width) * share + own * (setup.accumulation > 1) + width * largest,
    )


def _share_of_each(sizes: Sequence[int], data_parallel: int) -> int:
    return sum(-(-size // data_parallel) for size in sizes)


def _fully_sharded(inventory: Inventory, setup: Setup) -> States:
    """ZeRO 3."""
    d, width = setup.data_parallel, setup.weight_bytes
    trained = sum(_share_of_each(group, d) for group in inventory.groups)
    largest = max(_share_of_each(group, d) for group in inventory.groups)
    small = [
        size
        for size in (*inventory.matrices, *inventory.others, *inventory.frozen)
        if size <= setup.persistent
    ]
    weights = width * (trained + _share_of_each(inventory.frozen, d))
    whole = width * sum(small) * (d > 1)
    # While layers run: gathered parameters, at most `live`, and the next ones on their way.
    gathered = width * min(inventory.total, setup.live + setup.prefetch) * (d > 1)
    bucket = setup.communicate_bytes * setup.bucket if setup.contiguous else 0
    travelling = setup.communicate_bytes * min(setup.bucket, inventory.trained) * (d > 1)
    master, optimizer = _MASTER * trained, _ADAM * trained
    gradients = setup.accumulate_bytes * trained
    if setup.offload_optimizer:
        return States(
            weights=weights * (not setup.offload_parameters),
            buffers=inventory.buffer_bytes + whole + bucket,
            reducing=gathered + travelling,
            host=master + optimizer + 4 * trained + gradients + weights * setup.offload_parameters,
        )
    updated = min(largest, setup.sub_group)
    return States(
        weights=weights,
        gradients=gradients,
        master=master,
        optimizer=optimizer,
        buffers=inventory.buffer_bytes + whole + bucket,
        standing=gradients,
        summing=gradients,
        reducing=gathered + travelling,
        updating=(setup.accumulate_bytes + (4 if setup.accumulate_bytes != 4 else 0)) * updated,
    )


def states(inventory: Inventory, setup: Setup, rank: int = 0) -> States:
    """Return the bytes of one rank.

    Args:
        inventory: the parameters of its model (of its pipe stage).
        setup: how it is trained.
        rank: among the data-parallel ranks; shares differ by what of a parameter lies across a border.
    """
    if setup.zero == 0:
        return _plain(inventory, setup)
    if setup.zero == 3:
        return _fully_sharded(inventory, setup)
    if setup.offload_optimizer:
        return _offloaded(inventory, setup, rank)
    if setup.zero == 1 and setup.precision == "bf16" and setup.accumulate == "fp32":
        return _bf16_summed_in_fp32(inventory, setup)
    return _sharded(inventory, setup, rank)
