"""DeepSpeed engines, plain and pipeline parallel, behind one small interface."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from cogview2.pipeline.config.model import CogLMConfig
from cogview2.pipeline.config.training import OptimizerConfig
from cogview2.pipeline.distributed.process import World, gather_objects
from cogview2.pipeline.training.modules import Batch, TrainModule
from cogview2.pipeline.training.optimizers import build_optimizer, parameter_groups
from cogview2.pipeline.weights.files import save_weights

DeepSpeedConfig = dict[str, Any]


@dataclass(frozen=True)
class StepOutput:
    """What one update of this rank gave. `loss` is the mean over its micro batches."""

    loss: float
    sums: torch.Tensor
    counts: torch.Tensor
    extra: dict[str, float]


class TrainingEngine(Protocol):
    """One optimizer update at a time; saving and loading are collective."""

    metric_names: tuple[str, ...]
    data_rank: int
    data_size: int

    def train_step(self, step: int, micro_batches: list[Any], learning_rate: float) -> StepOutput:
        """Run forward and backward over this rank's micro batches, then update once."""

    def grad_norm(self) -> float | None:
        """Return the gradient norm before clipping of the last update, or None where DeepSpeed keeps none."""

    def save(self, folder: str, step: int) -> None:
        """Write the full state below `folder`/ds."""

    def load(self, folder: str) -> None:
        """Read what `save` wrote, with the same topology."""

    def full_state(self) -> dict[str, torch.Tensor] | None:
        """Return the model's whole state in float32 on rank 0, None elsewhere. Collective."""

    @property
    def accumulation(self) -> int:
        """Micro batches per update."""


def _initialize(module: Any, config: DeepSpeedConfig, optimizer: OptimizerConfig) -> Any:
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=module,
        model_parameters=parameter_groups(module, optimizer.weight_decay),
        optimizer=build_optimizer(module, optimizer),
        config=config,
    )
    return engine


def _keep_grad_norm(engine: Any) -> None:
    """Let a plain float32 engine clip as before, and keep the norm, which DeepSpeed throws away there."""

    def clip() -> None:
        engine._global_grad_norm = torch.nn.utils.clip_grad_norm_(
            engine.module.parameters(), engine.gradient_clipping()
        )

    engine.clip_fp32_gradients = clip


def _set_learning_rate(engine: Any, value: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = value


def _whole(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return a frozen parameter, which has no master copy; under ZeRO-3 a rank holds only a share of it."""
    import deepspeed

    if not hasattr(parameter, "ds_id"):
        return parameter.data
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.data.clone()


class _SavingMixin:
    engine: Any

    def grad_norm(self) -> float | None:
        norm = self.engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def save(self, folder: str, step: int) -> None:
        # The universal info cannot be added later, and without it another topology cannot resume.
        info = {
            "universal_checkpoint_version": 0.2,
            "pipeline_replicated_parameter_patterns": self.replicated,
        }
        client_state = {"universal_checkpoint_info": info, "step": step}
        if not self.engine.save_checkpoint(folder, tag="ds", client_state=client_state, save_latest=False):
            raise OSError(f"DeepSpeed could not save to {folder}")

    def load(self, folder: str) -> None:
        path, _ = self.engine.load_checkpoint(folder, tag="ds")
        if path is None:
            raise OSError(f"DeepSpeed found no state in {folder}")

    replicated: tuple[str, ...] | list[str] = ()

    @property
    def accumulation(self) -> int:
        return int(self.engine.gradient_accumulation_steps())


class PlainEngine(_SavingMixin):
    """Data parallel, ZeRO 0 to 3."""

    def __init__(
        self, module: TrainModule, config: DeepSpeedConfig, optimizer: OptimizerConfig, world: World
    ) -> None:
        self.module = module
        self.engine = _initialize(module, config, optimizer)
        _keep_grad_norm(self.engine)
        self.metric_names = module.metric_names
        self.data_rank, self.data_size = world.rank, world.size
        self.device = world.device

    def train_step(self, step: int, micro_batches: list[Batch], learning_rate: float) -> StepOutput:
        _set_learning_rate(self.engine, learning_rate)
        on_device = [
            {name: value.to(self.device) for name, value in batch.items()} for batch in micro_batches
        ]
        self.module.begin_step(step, on_device)
        loss = 0.0
        sums = torch.zeros(len(self.metric_names))
        counts = torch.zeros(len(self.metric_names))
        for batch in on_device:
            output = self.engine(batch)
            self.engine.backward(output.loss)
            # DeepSpeed gives them zeros for gradients, and an optimizer with momentum would move them.
            for parameter in self.module.unused_parameters():
                parameter.grad = None
            self.engine.step()
            loss += float(output.loss.detach()) / len(on_device)
            sums += output.sums.detach().float().cpu()
            counts += output.counts.float().cpu()
        return StepOutput(loss, sums, counts, self.module.end_step(step))

    def full_state(self) -> dict[str, torch.Tensor] | None:
        from deepspeed.utils import safe_get_full_fp32_param

        low_precision = any(p.dtype != torch.float32 for p in self.module.model.parameters())
        partitioned = self.engine.zero_optimization_stage() == 3
        state = {name: buffer for name, buffer in self.module.model.state_dict().items()}
        if low_precision or partitioned:
            # The float32 master weights live in the optimizer, a share on each rank: all must take part.
            for name, parameter in self.module.model.named_parameters():
                full = safe_get_full_fp32_param(parameter) if parameter.requires_grad else _whole(parameter)
                state[name] = full.float().cpu() if dist.get_rank() == 0 else torch.empty(0)
        return state if dist.get_rank() == 0 else None


class PipeEngine(_SavingMixin):
    """Pipeline parallel CogLM with data parallel ZeRO-1."""

    def __init__(
        self, module: Any, config: DeepSpeedConfig, optimizer: OptimizerConfig, model: CogLMConfig
    ) -> None:
        from cogview2.pipeline.models.coglm.loss import PART_NAMES
        from cogview2.pipeline.models.coglm.pipe import TIED_PATTERN

        self.engine = _initialize(module, config, optimizer)
        self.model_config = model
        self.metric_names: tuple[str, ...] = PART_NAMES
        self.replicated = [TIED_PATTERN]
        self.data_rank = self.engine.grid.get_data_parallel_rank()
        self.data_size = self.engine.grid.get_data_parallel_world_size()

    def train_step(self, step: int, micro_batches: list[Batch], learning_rate: float) -> StepOutput:
        _set_learning_rate(self.engine, learning_rate)
        needs_data = self.engine.is_first_stage() or self.engine.is_last_stage()
        loss = self.engine.train_batch(data_iter=self._iterator(micro_batches) if needs_data else None)
        parts = self.engine.get_additional_losses() or {}
        names = self.metric_names
        sums = torch.tensor([float(parts.get(f"{name}_loss_sum", 0.0)) for name in names])
        counts = torch.tensor([float(parts.get(f"{name}_labels", 0.0)) for name in names])
        return StepOutput(float(loss), sums, counts, {})

    @staticmethod
    def _iterator(micro_batches: list[Batch]) -> Iterator[tuple[Any, Any]]:
        for batch in micro_batches:
            yield (
                (batch["tokens"], batch["position_ids"], batch["roles"]),
                (batch["labels"], batch["loss_mask"], batch["loss_weights"]),
            )

    def full_state(self) -> dict[str, torch.Tensor] | None:
        from deepspeed.utils import safe_get_full_fp32_param

        from cogview2.pipeline.models.coglm.pipe import plain_name

        part = {}
        for name, parameter in self.engine.module.named_parameters():
            full = parameter if parameter.dtype == torch.float32 else safe_get_full_fp32_param(parameter)
            part[plain_name(name, self.model_config)] = full.detach().float().cpu()
        # Every pipe stage holds its own layers; equal copies (data parallel, tied) overwrite each other.
        parts = gather_objects(part if self.data_rank == 0 else {})
        if dist.get_rank() != 0:
            return None
        return {name: tensor for part in parts for name, tensor in part.items()}


def export_weights(engine: TrainingEngine, path: Any, metadata: dict[str, str]) -> None:
    """Write the model's weights from rank 0; collective."""
    state = engine.full_state()
    if state is not None:
        save_weights(path, state, metadata)
