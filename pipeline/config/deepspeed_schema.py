"""The DeepSpeed keys that a file in ds_configs/ may hold; DeepSpeed itself accepts unknown ones silently."""

from typing import Annotated, Literal

from pydantic import Field

from cogview2.pipeline.config.base import Config

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]


class OptimizerParamsJson(Config):
    """How AdamW is computed; what it computes (learning rate, betas, ...) stands in the recipe."""

    torch_adam: bool = True
    """torch's own fused AdamW; false takes DeepSpeed's kernels, which are compiled at the first use."""
    adam_w_mode: Literal[True] = True


class OptimizerJson(Config):
    """The optimizer's implementation."""

    type: Literal["AdamW"] = "AdamW"
    params: OptimizerParamsJson = OptimizerParamsJson()


class Bf16Json(Config):
    """bfloat16 weights and activations, fp32 master weights."""

    enabled: bool = True


class Fp16Json(Config):
    """float16 weights and activations, fp32 master weights, a loss scale that follows the gradients."""

    enabled: bool = True
    initial_scale_power: Count = 16
    """The first loss scale is 2 to this power."""
    loss_scale_window: Positive = 1000
    """Steps without overflow after which the scale doubles."""
    hysteresis: Positive = 2
    """Overflows before the scale is halved; each of them skips its step."""
    min_loss_scale: Annotated[float, Field(gt=0)] = 1
    """An overflow at this scale ends training."""


class AutocastJson(Config):
    """torch autocast: fp32 weights, low-precision matrix products."""

    enabled: bool = True
    dtype: Literal["bfloat16", "float16"] = "bfloat16"


class DataTypesJson(Config):
    """Type in which gradients are summed over micro batches and, unless communication_data_type says otherwise, ranks."""

    grad_accum_dtype: Literal["fp32", "bf16", "fp16"]


class OffloadJson(Config):
    """Optimizer state or parameters live in the host's memory."""

    device: Literal["cpu"] = "cpu"
    pin_memory: bool = True


class ZeroJson(Config):
    """ZeRO partitioning."""

    stage: Annotated[int, Field(ge=0, le=3)]
    contiguous_gradients: bool | None = None
    reduce_scatter: bool | None = None
    reduce_bucket_size: Positive | None = None
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
    """Where this section stands, even empty, the activations inside each layer are computed again in the backward pass.

    DeepSpeed's own settings of it belong to its re-entrant checkpointing, which is never used.
    """


class PipelineJson(Config):
    """Pipe stages of CogLM; nothing here counts without train.pipeline_parallel above 1."""

    partition: Literal["cost", "parameters", "uniform"] | tuple[Positive, ...] = "cost"
    """See pipeline/config/partition.py; a list gives the blocks of each pipe stage."""
    activation_checkpoint_interval: Count | None = None
    """Layers that are recomputed together, 0 for none; by default 1 where `activation_checkpointing` stands, else 0."""


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
    communication_data_type: Literal["fp32", "bf16", "fp16"] | None = None
    """Type in which gradients are summed over ranks; by default that of data_types.grad_accum_dtype, else of the weights."""
    activation_checkpointing: ActivationCheckpointingJson | None = None
    pipeline: PipelineJson = PipelineJson()
    comms_logger: CommsLoggerJson | None = None
    wall_clock_breakdown: bool = False
    dump_state: bool = False
