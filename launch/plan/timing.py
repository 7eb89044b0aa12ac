"""Predicted time of a step: products, memory traffic, communication, pipeline bubble, update.

For one micro batch of t tokens on one rank,

    compute = FLOPs executed / (peak x matrix_efficiency x t / (t + ramp_tokens))
            + bytes moved / (memory bandwidth x memory_efficiency)

The bytes moved are those of everything that is no matrix product. Norms, GELU, dropout and residual sums read and write
about 1.5 times what the layers keep in the forward pass and twice that in the backward pass; recomputed layers once more.
Then each gradient is written and added up: `_gradient_bytes` follows DeepSpeed's copies.

A pipeline of P stages with m micro batches takes (m + P - 1) rounds of its slowest stage, so its bubble is
(P - 1) / (m + P - 1) of the time. Collectives of n ranks on V bytes take, as rings,

    reduce-scatter or all-gather: V (n - 1)/n / bandwidth, all-reduce: twice that

DeepSpeed reduces with all-reduces in ZeRO 0, 1 and 2: once a step in ZeRO 0 and 1, for every micro batch in ZeRO 2; ZeRO
1 and 2 gather the weights after the update. ZeRO 3 gathers the weights in every forward and backward pass and
reduce-scatters gradients for every micro batch. Besides its bandwidth a collective takes a hop from each rank of the ring
to the next; ZeRO 3 has about one gather for each layer and pass.
"""

from dataclasses import dataclass, replace

from cogview2.launch.plan.activations import activations
from cogview2.launch.plan.inventory import Inventory, inventory, pipe_bounds
from cogview2.launch.plan.setup import Setup
from cogview2.launch.plan.states import states
from cogview2.pipeline.config import cost
from cogview2.pipeline.config.hardware import Hardware
from cogview2.pipeline.config.stages import Recipe

_GB = 1e9
_UPDATE_BYTES = 28
"""AdamW reads gradient, weight and both averages in float32, writes the last three: bytes of one number."""


@dataclass(frozen=True)
class Assumptions:
    """What a plan takes for granted; all of it is printed."""

    matrix_efficiency: float = 0.65
    """Share of the peak that large matrix products reach; what keeps them waiting is counted for itself."""
    ramp_tokens: float = 256.0
    """Tokens of a micro batch at which products reach half of that."""
    memory_efficiency: float = 0.8
    """Share of the memory's bandwidth that everything else reaches."""
    network_efficiency: float = 0.8
    """Share of the links' bandwidth that collectives reach."""
    overlap: float = 0.7
    """Share of the communication with overlap_comm that hides behind compute."""
    pcie_gb_s: float = 25.0
    """Between a device and its host, for offload (PCIe 4.0 x16)."""
    host_memory_gb_s: float = 200.0
    """Of a host, shared by its ranks, for offload."""
    disk_gb_s: float = 2.0
    """At which one job writes, reads and checks checkpoints."""
    hop_near_us: float = 1.0
    """From one rank of a ring to the next in the same host."""
    hop_far_us: float = 5.0
    """From one host to the next."""
    zero3_layer_ms: float = 5.0
    """Host time of ZeRO 3's hooks for a layer and micro batch; its kernels cannot start faster. 9.6 ms were measured on one
    core of a small virtual machine (12 layers, one rank); servers' cores are taken to be twice as fast."""
    reserve_gb: float = 4.0
    """Memory of each device for the CUDA context, NCCL, cuBLAS and what these formulas do not know, in 10^9 bytes."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, and what they are made of."""

    total: float
    compute: float
    """Of the slowest pipe stage."""
    bubble: float
    """Waiting for the pipeline to fill and to drain."""
    reduce: float
    """Gradients, as far as it does not hide behind compute."""
    gather: float
    """Weights: after the update, or in every pass (ZeRO 3)."""
    pipe: float
    """Activations and gradients between pipe stages, and the tied table."""
    update: float
    bubble_share: float
    """(P - 1) / (m + P - 1)."""
    volume: dict[str, float]
    """Bytes that one rank sends in a step, by purpose."""
    mfu: float
    """Model FLOPs / (time x peak)."""


def bus_bandwidth(ranks: int, hardware: Hardware) -> float:
    """Return the bytes a second of a ring of neighbouring ranks, as each of them sees it.

    A ring enters and leaves each host once, over the share of its network cards that its members there have.
    """
    if ranks <= hardware.per_host:
        return hardware.link_gb_s * _GB
    return min(hardware.link_gb_s, hardware.network_gb_s) * _GB


def _latency(ranks: int, hardware: Hardware, assumed: Assumptions) -> float:
    """Return the seconds that one turn around a ring takes for nothing."""
    far = -(-ranks // hardware.per_host) if ranks > hardware.per_host else 0
    return ((ranks - 1 - far) * assumed.hop_near_us + far * assumed.hop_far_us) * 1e-6 if ranks > 1 else 0.0


def _turns(recipe: Recipe, unit: str, setup: Setup, kept: Inventory) -> tuple[float, float]:
    """Return how many turns around the ring the reductions and the gathers of one step take."""
    buckets = -(-kept.trained // setup.bucket)
    if setup.zero == 3:
        layers = recipe.coglm.model.layers if unit != cost.VQVAE else len(kept.others) / 8
        return buckets * setup.accumulation, 2 * layers * setup.accumulation
    return 2 * buckets * (setup.accumulation if setup.zero == 2 else 1), len(kept.groups) * (setup.zero > 0)


def _layer_flops(recipe: Recipe, setup: Setup) -> list[float]:
    """Return the executed FLOPs of each pipe stage for one sample of CogLM."""
    config, rows = recipe.coglm.model, cost.vocabulary_rows(recipe)
    flops = cost.coglm_layer_flops(
        config, rows, cost.coglm_sequence(recipe), cost.coglm_loss_positions(recipe)
    )
    passes = [3 + bool(setup.checkpointing)] * (len(flops) - 1) + [3]
    bounds = pipe_bounds(recipe, setup)
    return [
        sum(passes[layer] * flops[layer] for layer in range(bounds[k], bounds[k + 1]))
        for k in range(setup.pipe_stages)
    ]


def _executed(recipe: Recipe, unit: str, setup: Setup) -> list[float]:
    if unit == cost.COGLM and setup.pipe_stages > 1:
        return _layer_flops(recipe, setup)
    return [cost.hardware_flops_per_sample(recipe, unit, checkpointing=setup.checkpointing > 0)]


def _gradient_bytes(setup: Setup) -> float:
    """Return the bytes that are read and written for one gradient of one micro batch, besides its reduction.

    BF16_Optimizer (ZeRO 1 that sums bf16 in fp32): written (2), added to a zeroed one (6, and 2 for zeroing), widened (6),
    added to the sum (12). Else: written, and added where several are summed; ZeRO 2 and 3 copy it to a bucket, which
    may travel in another type.
    """
    width, travels = setup.weight_bytes, setup.communicate_bytes
    if setup.zero == 1 and setup.precision == "bf16" and setup.accumulate == "fp32":
        return 28.0
    if setup.zero <= 1:
        return width * (4 if setup.accumulation > 1 else 1)
    widened = width + travels if travels != width else 0
    return 3 * width + widened + 3 * setup.accumulate_bytes / setup.data_parallel


def _traffic(recipe: Recipe, unit: str, setup: Setup, pipe_stage: int, kept: Inventory) -> float:
    """Return the bytes that the operations of one micro batch move besides matrix products."""
    used = activations(recipe, unit, replace(setup, checkpointing=0, accumulation=1), pipe_stage)
    passes = 3.5 + (1.5 if setup.checkpointing else 0)
    return passes * used.kept + 3 * used.loss + kept.trained * _gradient_bytes(setup)


def _rounds(
    recipe: Recipe, unit: str, setup: Setup, parts: list[Inventory], hardware: Hardware, assumed: Assumptions
) -> list[float]:
    """Return the seconds of one micro batch on each pipe stage."""
    peak = hardware.peak(_kind(unit, setup)) * assumed.matrix_efficiency
    moving = hardware.memory_gb_s * _GB * assumed.memory_efficiency
    tokens = setup.micro_batch * cost.tokens_per_sample(recipe, unit)
    ramp = tokens / (tokens + assumed.ramp_tokens) if tokens else 1.0
    host = 0.0
    if setup.zero == 3 and unit != cost.VQVAE:
        host = recipe.coglm.model.layers * assumed.zero3_layer_ms * 1e-3
    return [
        max(
            host,
            setup.micro_batch * flops / (peak * ramp)
            + _traffic(recipe, unit, setup, stage, parts[stage]) / moving,
        )
        for stage, flops in enumerate(_executed(recipe, unit, setup))
    ]


def _kind(unit: str, setup: Setup) -> str:
    return "tf32" if unit == cost.VQVAE and setup.products == "fp32" else setup.products


def _communication(setup: Setup, kept: Inventory) -> dict[str, float]:
    """Return the bytes that a rank sends for gradients and weights in one step, over a ring of its data-parallel group."""
    d, micro = setup.data_parallel, setup.accumulation
    ring = (d - 1) / d
    gradients, weights = setup.communicate_bytes * kept.trained, setup.weight_bytes * kept.trained
    if setup.zero == 3:
        everything = setup.weight_bytes * kept.total
        return {"reduce": ring * gradients * micro, "gather": 2 * ring * everything * micro}
    return {
        "reduce": 2 * ring * gradients * (micro if setup.zero == 2 else 1),
        "gather": ring * weights * (setup.zero > 0),
    }


def step_time(
    recipe: Recipe, unit: str, setup: Setup, hardware: Hardware, assumed: Assumptions = Assumptions()
) -> StepTime:
    """Return the predicted time of one step; the module says how."""
    peak = hardware.peak(_kind(unit, setup))
    stages = range(setup.pipe_stages)
    parts = [inventory(recipe, unit, setup, stage) for stage in stages]
    moving = hardware.memory_gb_s * _GB * assumed.memory_efficiency
    rounds = _rounds(recipe, unit, setup, parts, hardware, assumed)
    slowest, m = max(rounds), setup.accumulation
    compute, bubble = m * slowest, (setup.pipe_stages - 1) * slowest
    largest = max(parts, key=lambda part: part.trained)
    volume = _communication(setup, largest)
    ring = bus_bandwidth(setup.data_parallel, hardware) * assumed.network_efficiency
    turn = _latency(setup.data_parallel, hardware, assumed)
    reductions, gathers = _turns(recipe, unit, setup, largest)
    hidden = 1 - assumed.overlap if setup.overlap else 1.0
    reduce = (volume["reduce"] / ring + reductions * turn) * hidden
    gather = (volume["gather"] / ring + gathers * turn) * (hidden if setup.zero == 3 else 1.0)
    volume["pipe"], pipe = _pipe(recipe, setup, hardware, assumed)
    share = max(states(part, setup).master or 4 * part.trained for part in parts) / 4
    update = share * (_UPDATE_BYTES + setup.weight_bytes + setup.accumulate_bytes) / moving
    if setup.offload_optimizer:
        # Gradients down and weights up, then AdamW in the host's memory.
        share = largest.trained / setup.data_parallel
        neighbours = min(setup.ranks, hardware.per_host)
        update = share * (setup.weight_bytes + setup.communicate_bytes) / (assumed.pcie_gb_s * _GB)
        update += share * _UPDATE_BYTES * neighbours / (assumed.host_memory_gb_s * _GB)
    total = compute + bubble + reduce + gather + pipe + update
    samples = setup.micro_batch * m * setup.data_parallel
    useful = cost.train_flops_per_sample(recipe, unit) * samples
    return StepTime(
        total=total,
        compute=compute,
        bubble=bubble,
        reduce=reduce,
        gather=gather,
        pipe=pipe,
        update=update,
        bubble_share=(setup.pipe_stages - 1) / (m + setup.pipe_stages - 1),
        volume=volume,
        mfu=useful / (total * setup.ranks * peak),
    )


def _pipe(recipe: Recipe, setup: Setup, hardware: Hardware, assumed: Assumptions) -> tuple[float, float]:
    """Return bytes and seconds of a middle pipe stage's exchange with both neighbours, and of the tied table.

    Pipe stage p of data-parallel rank r is rank p x d + r (DeepSpeed's topology), so its neighbours are d ranks away.
    """
    if setup.pipe_stages == 1:
        return 0.0, 0.0
    config, d = recipe.coglm.model, setup.data_parallel
    message = setup.compute_bytes * setup.micro_batch * cost.coglm_sequence(recipe) * config.hidden
    rounds = setup.accumulation + setup.pipe_stages - 1
    near = d * setup.pipe_stages <= hardware.per_host
    speed = hardware.link_gb_s if near else hardware.network_gb_s / hardware.per_host
    seconds_per_byte = 1 / (speed * _GB * assumed.network_efficiency)
    # The tied table's gradients: an all-reduce of two ranks.
    table = setup.accumulate_bytes * cost.vocabulary_rows(recipe) * config.hidden
    volume = 2 * message * rounds + table
    return volume, volume * seconds_per_byte
