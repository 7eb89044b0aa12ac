"""The DeepSpeed configuration of a stage: a checked JSON (how) joined with the recipe's section (what)."""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from cogview2 import ds_configs
from cogview2.pipeline.config.deepspeed_schema import AutocastJson, Bf16Json, DeepSpeedJson, Fp16Json
from cogview2.pipeline.config.problems import Origins, validate
from cogview2.pipeline.config.training import OptimizerConfig, TrainConfig
from cogview2.pipeline.config.yaml_reader import MAX_BYTES, KeyPath
from cogview2.pipeline.errors import ConfigError

_NEVER = 1_000_000_000
_RECIPE_KEYS = {
    "train_batch_size": "train.global_batch",
    "gradient_accumulation_steps": "train.global_batch (accumulation is derived from it)",
    "gradient_clipping": "train.optimizer.gradient_clipping",
    "scheduler": "train.optimizer.schedule",
    "steps_per_print": "train.log_every",
}
_RECIPE_OPTIMIZER_KEYS = {
    "lr": "learning_rate",
    "betas": "betas",
    "eps": "eps",
    "weight_decay": "weight_decay",
}


def find_json(name_or_path: str) -> Path:
    """Return the file of a configuration: a path when it ends in .json, else a name in ds_configs/."""
    if name_or_path.endswith(".json"):
        return Path(name_or_path)
    try:
        return ds_configs.path(name_or_path)
    except KeyError as error:
        raise ConfigError(f"{error.args[0]}; or give the path of a .json file") from error


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key, value in pairs:
        if key in mapping:
            raise ValueError(f"key {key!r} stands twice")
        mapping[key] = value
    return mapping


def _refuse_recipe_keys(data: Any, path: Path) -> None:
    """Refuse the keys whose only place is the recipe: no knob stands in both files."""
    if not isinstance(data, dict):
        return
    for key, place in _RECIPE_KEYS.items():
        if key in data:
            raise ConfigError(
                f"{path}: {key!r} = {data[key]!r} belongs in the recipe; delete it and set {place}"
            )
    optimizer = data.get("optimizer")
    params = optimizer.get("params") if isinstance(optimizer, dict) else None
    for key, place in _RECIPE_OPTIMIZER_KEYS.items():
        if isinstance(params, dict) and key in params:
            raise ConfigError(
                f"{path}: optimizer.params.{key} = {params[key]!r} belongs in the recipe; "
                f"delete it and set train.optimizer.{place}"
            )


def read_json(name_or_path: str) -> DeepSpeedJson:
    """Read and check one DeepSpeed JSON.

    Raises:
        ConfigError: missing, not JSON, an unknown key (with the nearest known one), or a key of the recipe.
    """
    path = find_json(name_or_path)
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_BYTES).decode("utf-8")
        data = json.loads(text, object_pairs_hook=_refuse_duplicates)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; name a DeepSpeed JSON") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error}); correct it") from error
    _refuse_recipe_keys(data, path)
    origins: dict[KeyPath, str] = {}
    return validate(
        DeepSpeedJson, data, Origins(origins, str(path)), lambda key: f"correct it in {path.name}"
    )


def data_parallel_size(train: TrainConfig, world_size: int) -> int:
    """Return the number of data-parallel ranks; refuses a world size that the pipe stages do not divide."""
    if world_size % train.pipeline_parallel:
        raise ConfigError(
            f"train.pipeline_parallel {train.pipeline_parallel} does not divide the {world_size} ranks; "
            f"use a multiple of {train.pipeline_parallel} ranks, or --set launch.ranks=..."
        )
    return world_size // train.pipeline_parallel


def micro_batch_size(train: TrainConfig, wanted: int | Literal["auto"], data_parallel: int) -> int:
    """Return the micro batch; `auto` is a rank's whole share of the global batch. Refuses ranks without an equal share."""
    if wanted != "auto":
        return wanted
    share, remainder = divmod(train.global_batch, data_parallel)
    if remainder or not share:
        fits = max(1, share) * data_parallel
        raise ConfigError(
            f"train.global_batch {train.global_batch} does not split over {data_parallel} data-parallel ranks; "
            f"use a global batch of {fits} or {fits + data_parallel}"
        )
    return share


def accumulation_steps(train: TrainConfig, micro_batch: int, data_parallel: int) -> int:
    """Return global batch / (micro batch x data-parallel ranks); refuse a remainder, with what fits."""
    together = micro_batch * data_parallel
    steps, remainder = divmod(train.global_batch, together)
    if remainder or not steps:
        below = steps * together
        fits = f"{below} or {below + together}" if below else f"{together}"
        micros = [
            size for size in range(1, micro_batch + 1) if train.global_batch % (size * data_parallel) == 0
        ]
        micro = f", or a micro batch of {micros[-1]}" if micros else ""
        raise ConfigError(
            f"train.global_batch {train.global_batch} is not a multiple of micro batch {micro_batch} x "
            f"{data_parallel} data-parallel ranks = {together}; use a global batch of {fits}{micro}"
        )
    return steps


def _enabled(section: Bf16Json | Fp16Json | AutocastJson | None) -> bool:
    return section is not None and section.enabled


def _precision_problems(how: DeepSpeedJson, cpu: bool) -> Iterator[str]:
    bf16, fp16, autocast = (_enabled(section) for section in (how.bf16, how.fp16, how.torch_autocast))
    stage = how.zero_optimization.stage
    if bf16 + fp16 + autocast > 1:
        yield "more than one of bf16, fp16 and torch_autocast is enabled; keep one"
    if fp16 and cpu:
        yield "fp16 does not train on CPUs; use bf16, or leave both out"
    if (bf16 or fp16) and stage == 0:
        yield (
            f"{'bf16' if bf16 else 'fp16'} with zero_optimization.stage 0 follows another trajectory than every other "
            "stage; use stage 1"
        )
    if autocast and how.torch_autocast is not None and how.torch_autocast.dtype == "float16":
        yield (
            "torch_autocast with dtype float16 clips gradients that are still scaled; use fp16, or dtype bfloat16"
        )
    own = "bf16" if bf16 else "fp16" if fp16 else "fp32"
    sums = how.data_types.grad_accum_dtype if how.data_types is not None else own
    if sums not in ("fp32", own):
        yield f"data_types.grad_accum_dtype {sums} does not go with weights in {own}; use fp32 or {own}"
    travels = how.communication_data_type
    if travels not in (None, "fp32", own):
        yield f"communication_data_type {travels} does not go with weights in {own}; use fp32 or {own}"


def _pipeline_problems(how: DeepSpeedJson, train: TrainConfig) -> Iterator[str]:
    stages, zero = train.pipeline_parallel, how.zero_optimization
    if stages == 1:
        return
    if zero.stage >= 2:
        yield (
            f"zero_optimization.stage {zero.stage} does not work with train.pipeline_parallel {stages}; "
            "use stage 1, or pipeline_parallel 1"
        )
    if _enabled(how.torch_autocast):
        yield (
            f"torch_autocast does not reach the loss and the recomputed layers with train.pipeline_parallel {stages}; "
            "use bf16, or pipeline_parallel 1"
        )
    if zero.overlap_comm:
        yield (
            f"zero_optimization.overlap_comm has no effect with train.pipeline_parallel {stages}; "
            "delete it, or use pipeline_parallel 1"
        )
    sums = how.data_types.grad_accum_dtype if how.data_types is not None else None
    if sums == "fp32" and (_enabled(how.fp16) or (_enabled(how.bf16) and zero.offload_optimizer is not None)):
        what = "fp16" if _enabled(how.fp16) else "offload_optimizer"
        yield (
            f"data_types.grad_accum_dtype fp32 with {what} does not add up the gradients of the tied word embeddings with "
            f"train.pipeline_parallel {stages}; delete data_types, or use bf16 without offload_optimizer"
        )
    counts = how.pipeline.partition
    if not isinstance(counts, str) and len(counts) != stages:
        yield (
            f"pipeline.partition has {len(counts)} counts for train.pipeline_parallel {stages}; give {stages} of them"
        )


def _zero_problems(how: DeepSpeedJson) -> Iterator[str]:
    zero = how.zero_optimization
    if zero.offload_optimizer is not None and zero.stage == 0:
        yield "offload_optimizer has no effect with zero_optimization.stage 0; use stage 1, 2 or 3, or delete it"
    if zero.round_robin_gradients:
        yield (
            "round_robin_gradients hands out masters of other parameters (DeepSpeed's own mapping of names ignores its order), "
            "so that no checkpoint or export of it would be right; delete it"
        )
    if zero.offload_param is not None and zero.stage != 3:
        yield f"offload_param needs zero_optimization.stage 3, not {zero.stage}; change one of them"


def _muon_problems(how: DeepSpeedJson, train: TrainConfig) -> Iterator[str]:
    if train.optimizer.kind != "muon":
        return
    stage = how.zero_optimization.stage
    if how.zero_optimization.offload_optimizer is not None:
        yield "offload_optimizer does not go with train.optimizer.kind muon; delete it, or use adamw"
    if stage != 0 or train.pipeline_parallel > 1:
        yield (
            "train.optimizer.kind muon needs whole matrices on every rank; use zero_optimization.stage 0 "
            f"(not {stage}) without pipeline_parallel, or kind adamw"
        )


def _refuse_contradictions(how: DeepSpeedJson, train: TrainConfig, name: str, cpu: bool) -> None:
    """Refuse what DeepSpeed computes wrongly, ignores, or finds out only once all ranks run (docs/parallelism.md)."""
    problems = (
        _precision_problems(how, cpu),
        _muon_problems(how, train),
        _pipeline_problems(how, train),
        _zero_problems(how),
    )
    for problem in itertools.chain(*problems):
        raise ConfigError(f"{name}: {problem}")


def resolve(json_name: str, train: TrainConfig, world_size: int, *, cpu: bool = False) -> dict[str, Any]:
    """Return the complete configuration for `deepspeed.initialize`.

    Args:
        json_name: name in ds_configs/ or path of a JSON.
        train: the recipe's training section of the stage.
        world_size: ranks of the job.
        cpu: the ranks run on CPUs; then torch's AdamW is used whatever the JSON says (no compiler needed).

    Raises:
        ConfigError: the JSON cannot be used, or contradicts the recipe.
    """
    how = read_json(json_name)
    _refuse_contradictions(how, train, json_name, cpu)
    data_parallel = data_parallel_size(train, world_size)
    micro_batch = micro_batch_size(train, how.train_micro_batch_size_per_gpu, data_parallel)
    accumulation = accumulation_steps(train, micro_batch, data_parallel)
    config = how.model_dump(mode="json", exclude_none=True)
    config["train_micro_batch_size_per_gpu"] = micro_batch
    config["train_batch_size"] = math.prod((micro_batch, accumulation, data_parallel))
    config["gradient_accumulation_steps"] = accumulation
    config["gradient_clipping"] = train.optimizer.gradient_clipping
    config["steps_per_print"] = _NEVER
    _resolve_optimizer(config, train.optimizer, cpu)
    if how.data_types is not None:
        # By default they travel in the type of the weights, and what was summed in fp32 is rounded on the way.
        config.setdefault("communication_data_type", how.data_types.grad_accum_dtype)
    pipeline = config["pipeline"]
    pipeline.setdefault("activation_checkpoint_interval", int(how.activation_checkpointing is not None))
    # Re-entrant checkpointing, the default, silently drops gradients when a segment's inputs are integers.
    pipeline["use_reentrant"] = False
    return config


def _resolve_optimizer(config: dict[str, Any], optimizer: OptimizerConfig, cpu: bool) -> None:
    params = config["optimizer"]["params"]
    params["torch_adam"] = params["torch_adam"] or cpu
    if params["torch_adam"]:
        params["fused"] = True  # one kernel; the default takes a tenth of a small network's step
        if "offload_optimizer" in config["zero_optimization"]:
            # DeepSpeed asks to be told that no kernel of its own is wanted.
            config |= {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
    params |= {
        "lr": optimizer.learning_rate,
        "betas": list(optimizer.betas),
        "eps": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
    }
    if optimizer.kind == "muon":
        del config["optimizer"]  # the engine gets the optimizer itself


def precision(config: dict[str, Any]) -> str:
    """Return in words what decides the rounding of a resolved configuration: weights, autocast, sums of gradients."""
    weights: str = weights_dtype(config)
    autocast = config.get("torch_autocast", {})
    sums = config.get("data_types", {}).get("grad_accum_dtype")
    words = [weights]
    words += [f"autocast {autocast.get('dtype', 'bfloat16')}"] if autocast.get("enabled") else []
    words += [f"sums {sums}"] if sums is not None and weights != "float32" else []
    return " ".join(words)


def weights_dtype(config: dict[str, Any]) -> Literal["float32", "bfloat16", "float16"]:
    """Return the type in which a resolved configuration keeps the weights on the device; masters are always float32."""
    for section, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        if config.get(section, {}).get("enabled"):
            return dtype  # type: ignore[return-value]  # one of the two above
    return "float32"
