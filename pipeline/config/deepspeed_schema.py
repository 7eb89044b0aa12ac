"""The DeepSpeed keys that a file in ds_configs/ may hold; DeepSpeed itself accepts unknown ones silently."""

from typing import Annotated, Literal

from pydantic import Field

from cogview2.pipeline.config.base import Config

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]


class OptimizerParamsJson(Config):
    """How AdamW is computed; what it computes (learning rate, betas, ...) stands in the recipe."""

    torch_adam: bool = False
    """torch's AdamW in place of DeepSpeed's fused kernel, which is compiled at the first use."""
    adam_w_mode: Literal[True] = True


class OptimizerJson(Config):
    """The optimizer's implementation."""

    type: Literal["AdamW"] = "AdamW"
    params: OptimizerParamsJson = OptimizerParamsJson()


class Bf16Json(Config):
    """bfloat16 weights and activations, fp32 master weights."""

    enabled: bool = True


class Fp16Json(Config):
    """float16 with a loss scale; 0 means dynamic."""

    enabled: bool = True
    loss_scale: Annotated[float, Field(ge=0)] = 0
    initial_scale_power: Count = 16
    loss_scale_window: Positive = 1000
    hysteresis: Positive = 2
    min_loss_scale: Annotated[float, Field(gt=0)] = 1


class AutocastJson(Config):
    """torch autocast: fp32 weights, low-precision matrix products."""

    enabled: bool = True
    dtype: Literal["bfloat16", "float16"] = "bfloat16"


class DataTypesJson(Config):
    """Type in which gradients are summed over micro batches."""

    grad_accum_dtype: Literal["fp32", "bf16", "fp16"]


class OffloadJson(Config):
    """Where optimizer state or parameters live when not on the device."""

    device: Literal["none", "cpu", "nvme"]
    nvme_path: str | None = None
    pin_memory: bool = True
    buffer_count: Positive | None = None
    buffer_size: Positive | None = None


class ZeroJson(Config):
    """ZeRO partitioning."""

    stage: Annotated[int, Field(ge=0, le=3)]
    contiguous_gradients: bool | None = None
    reduce_scatter: bool | None = None
    reduce_bucket_size: Positive | None = None
    allgather_partitions: bool | None = None
    allgather_bucket_size: Positive | None = None
    overlap_comm: bool | None = None
    round_robin_gradients: bool | None = None
    sub_group_size: Positive | None = None
    offload_optimizer: OffloadJson | None = None
    offload_param: OffloadJson | None = None
    stage3_prefetch_bucket_size: Count | None = None
    stage3_param_persistence_threshold: Count | None = None
    stage3_max_live_parameters: Count | None = None
    stage3_max_reuse_distance: Count | None = None
    stage3_gather_16bit_weights_on_model_save: bool | None = None


class ActivationCheckpointingJson(Config):
    """Recompute activations in the backward pass."""

    partition_activations: bool = False
    cpu_checkpointing: bool = False
    contiguous_memory_optimization: bool = False
    number_checkpoints: Positive | None = None
    synchronize_checkpoint_boundary: bool = False
    profile: bool = False


class PipelineJson(Config):
    """Pipe stages: how layers are shared out, and how many of them make one recomputed segment (0: none)."""

    partition: Literal["uniform", "parameters"] = "parameters"
    activation_checkpoint_interval: Count = 0


class CommsLoggerJson(Config):
    """Log of the collectives."""

    enabled: bool = False
    verbose: bool = False
    prof_all: bool = False


class DeepSpeedJson(Config):
    """One file of ds_configs/: the "how" of a training stage."""

    train_micro_batch_size_per_gpu: Positive | Literal["auto"]
    """Samples of one forward pass on one rank; auto: the rank's whole share of train.global_batch."""
    optimizer: OptimizerJson = OptimizerJson()
    bf16: Bf16Json | None = None
    fp16: Fp16Json | None = None
    torch_autocast: AutocastJson | None = None
    data_types: DataTypesJson | None = None
    zero_optimization: ZeroJson
    zero_force_ds_cpu_optimizer: bool | None = None
    zero_allow_untested_optimizer: bool | None = None
    communication_data_type: Literal["fp32", "bf16", "fp16"] | None = None
    prescale_gradients: bool | None = None
    gradient_predivide_factor: Annotated[float, Field(gt=0)] | None = None
    activation_checkpointing: ActivationCheckpointingJson | None = None
    pipeline: PipelineJson = PipelineJson()
    comms_logger: CommsLoggerJson | None = None
    wall_clock_breakdown: bool = False
    dump_state: bool = False
