"""How one training unit is spread over ranks: what of a resolved DeepSpeed configuration costs memory and time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cogview2.pipeline.config.training import TrainConfig

Precision = Literal["fp32", "bf16", "fp16", "autocast"]
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# DeepSpeed's own defaults (deepspeed/runtime/zero/config.py).
_BUCKET, _PREFETCH, _PERSISTENT, _LIVE, _SUB_GROUP = (
    500_000_000,
    50_000_000,
    100_000,
    1_000_000_000,
    1_000_000_000,
)


@dataclass(frozen=True)
class Setup:
    """One way to train one unit. Sizes in numbers, not bytes, where not said otherwise."""

    ranks: int
    zero: int
    pipe_stages: int
    micro_batch: int
    accumulation: int
    checkpointing: int
    """Layers that are recomputed together; 0: none are."""
    precision: Precision = "bf16"
    accumulate: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Type in which gradients are summed over micro batches."""
    communicate: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Type in which they travel."""
    offload_optimizer: bool = False
    offload_parameters: bool = False
    muon: bool = False
    contiguous: bool = True
    """Gradients are copied into one bucket before they are reduced."""
    overlap: bool = False
    """Reductions run beside the backward pass, with a second bucket."""
    bucket: int = _BUCKET
    prefetch: int = _PREFETCH
    persistent: int = _PERSISTENT
    """ZeRO 3: parameters up to this size stay whole."""
    live: int = _LIVE
    """ZeRO 3: most gathered parameters at one time."""
    sub_group: int = _SUB_GROUP
    partition: str | Sequence[int] = "cost"

    @property
    def data_parallel(self) -> int:
        """Ranks that see different samples."""
        return self.ranks // self.pipe_stages

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight in the model."""
        return 2 if self.precision in ("bf16", "fp16") else 4

    @property
    def compute_bytes(self) -> int:
        """Bytes of an activation."""
        return 4 if self.precision == "fp32" else 2

    @property
    def accumulate_bytes(self) -> int:
        """Bytes of a gradient that is summed over micro batches."""
        return _BYTES[self.accumulate]

    @property
    def communicate_bytes(self) -> int:
        """Bytes of a gradient on its way."""
        return _BYTES[self.communicate]

    @property
    def products(self) -> str:
        """The kind of matrix products, as in the hardware table."""
        return "bf16" if self.precision == "autocast" else self.precision


def setup_of(resolved: Mapping[str, Any], train: TrainConfig, ranks: int) -> Setup:
    """Return the setup of a configuration that `pipeline/config/deepspeed.py::resolve` made for `ranks` ranks."""
    zero, pipeline = resolved["zero_optimization"], resolved.get("pipeline", {})

    def on(section: str) -> bool:
        return section in resolved and bool(resolved[section].get("enabled", True))

    precision: Precision = "fp32"
    for name, section in (("bf16", "bf16"), ("fp16", "fp16"), ("autocast", "torch_autocast")):
        if on(section):
            precision = name  # type: ignore[assignment]  # one of the literals above
    weights: Any = precision if precision in ("bf16", "fp16") else "fp32"
    stage, pipe_stages = int(zero["stage"]), train.pipeline_parallel
    checkpointing = int("activation_checkpointing" in resolved)
    if pipe_stages > 1:
        checkpointing = int(pipeline.get("activation_checkpoint_interval", 0))
    return Setup(
        ranks=ranks,
        zero=stage,
        pipe_stages=pipe_stages,
        micro_batch=int(resolved["train_micro_batch_size_per_gpu"]),
        accumulation=int(resolved["gradient_accumulation_steps"]),
        checkpointing=checkpointing,
        precision=precision,
        accumulate=resolved.get("data_types", {}).get("grad_accum_dtype", weights),
        communicate=resolved.get("communication_data_type", weights),
        offload_optimizer="offload_optimizer" in zero,
        offload_parameters="offload_param" in zero,
        muon=train.optimizer.kind == "muon",
        contiguous=bool(zero.get("contiguous_gradients", True)),
        overlap=bool(zero.get("overlap_comm", stage == 3)) and pipe_stages == 1,
        bucket=int(zero.get("reduce_bucket_size", _BUCKET)),
        prefetch=int(zero.get("stage3_prefetch_bucket_size", _PREFETCH)),
        persistent=int(zero.get("stage3_param_persistence_threshold", _PERSISTENT)),
        live=int(zero.get("stage3_max_live_parameters", _LIVE)),
        sub_group=int(zero.get("sub_group_size", _SUB_GROUP)),
        partition=pipeline.get("partition", "cost"),
    )
