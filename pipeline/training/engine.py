"""DeepSpeed engines, plain and pipeline parallel, behind one small interface."""

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist

from cogview2.pipeline.config.model import CogLMConfig
from cogview2.pipeline.config.training import OptimizerConfig
from cogview2.pipeline.distributed.process import World, gather_objects
from cogview2.pipeline.errors import NumericError
from cogview2.pipeline.models.not_finite import spoil_gradient
from cogview2.pipeline.training.modules import Batch, LossOutput, TrainModule
from cogview2.pipeline.training.normalisation import mean_mass, weight_mass
from cogview2.pipeline.training.optimizers import build_optimizer, parameter_groups
from cogview2.pipeline.training.state.files import RankState, StateReader
from cogview2.pipeline.training.state.resumable import Resumable
from cogview2.pipeline.weights.files import save_weights

DeepSpeedConfig = dict[str, Any]
_MODEL = "model."
"""Where a TrainModule keeps the model, in the names of its parameters."""
_AT_LEAST_SCALE = "loss scale already at minimum"
"""In the message with which DeepSpeed's loss scaler gives up."""


@dataclass(frozen=True)
class StepOutput:
    """What one update of this rank gave; the means over ranks are those of the global batch."""

    loss: float
    """Mean over its micro batches."""
    sums: torch.Tensor
    counts: torch.Tensor
    extra: dict[str, float]
    """Further numbers to log, equal on all ranks; under fp16 `loss_scale` and `skipped_steps` (all so far)."""
    finite: bool
    """Whether the gradients of all ranks were finite; if not, the update was applied nowhere. Under fp16 always true: its
    loss scale follows such gradients, and is lowered."""


class TrainingEngine(Protocol):
    """One optimizer update at a time; saving and loading are collective."""

    metric_names: tuple[str, ...]
    data_rank: int
    data_size: int
    needs_data: bool
    """Whether this rank reads micro batches; middle pipe stages do not, and take an empty list."""
    module: Any
    """What runs the forward pass of a micro batch: the meters time it."""

    def train_step(self, step: int, micro_batches: list[Any], learning_rate: float) -> StepOutput:
        """Run forward and backward over this rank's micro batches, then update once."""

    def grad_norm(self) -> float | None:
        """Return the gradient norm before clipping of the last update; None when it was skipped."""

    def state(self) -> RankState:
        """Return what this rank writes into a checkpoint: views of what it holds now."""

    def load(self, reader: StateReader) -> None:
        """Take the state over that engines of any topology wrote. Collective."""

    def full_state(self) -> dict[str, torch.Tensor] | None:
        """Return the model's whole state in float32 on rank 0, None elsewhere. Collective."""

    @property
    def accumulation(self) -> int:
        """Micro batches per update."""

    def close(self) -> None:
        """Give the memory of weights, gradients and optimizer back; the engine cannot be used any more."""


def _initialize(module: Any, config: DeepSpeedConfig, optimizer: OptimizerConfig) -> Any:
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=module,
        model_parameters=parameter_groups(module, optimizer.weight_decay),
        optimizer=build_optimizer(module, optimizer),
        config=config,
    )
    return engine


@dataclass
class _Update:
    """How an update went."""

    extra: dict[str, float]
    applied: bool = False
    finite: bool = False


def _drop_unless_finite(norm: torch.Tensor, parameters: list[torch.nn.Parameter]) -> None:
    """Take the gradients away when their norm, the same on all ranks, is not finite: the optimizer then changes nothing."""
    if not math.isfinite(norm):
        for parameter in parameters:
            parameter.grad = None


def _clip(engine: Any) -> None:
    """Clip the gradients of a float32 engine without ZeRO, and keep the norm, which DeepSpeed throws away there.

    Pipe stages add up their squares, and a matrix of which several of them hold a copy counts once; DeepSpeed's own
    clipping gives each pipe stage another norm.
    """
    parameters = [p for p in engine.module.parameters() if p.grad is not None]
    if not hasattr(engine, "grid"):
        engine._global_grad_norm = torch.nn.utils.clip_grad_norm_(parameters, engine.gradient_clipping())
        _drop_unless_finite(engine._global_grad_norm, parameters)
        return
    owned = [p.grad for p in parameters if p.grad is not None and not getattr(p, "ds_pipe_replicated", False)]
    square = torch.zeros((), device=engine.device)
    if owned:
        square += torch.nn.utils.get_total_norm(owned).square()
    dist.all_reduce(square, group=engine.grid.get_pipe_parallel_group())
    norm = square.sqrt()
    torch.nn.utils.clip_grads_with_norm_(parameters, engine.gradient_clipping(), norm)
    engine._global_grad_norm = norm
    _drop_unless_finite(norm, parameters)


def _whole(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return a frozen parameter, which has no master copy; under ZeRO-3 a rank holds only a share of it."""
    import deepspeed

    if not hasattr(parameter, "ds_id"):
        return parameter.data
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.data.clone()


class _DeepSpeed(Resumable):
    """What both engines do with DeepSpeed's."""

    def __init__(self, module: Any, config: DeepSpeedConfig, optimizer: OptimizerConfig) -> None:
        self.engine = _initialize(module, config, optimizer)
        self.engine.clip_fp32_gradients = partial(_clip, self.engine)

    @contextmanager
    def _update(self, step: int, learning_rate: float) -> Iterator[_Update]:
        """Make one update inside; what is yielded tells afterwards how it went, the same on all ranks.

        Raises:
            NumericError: gradients that overflow at the least loss scale of fp16.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        update = _Update({})
        try:
            yield update
        except Exception as error:
            if _AT_LEAST_SCALE not in str(error):
                raise
            raise NumericError(
                f"the gradients of step {step + 1} overflow even at the least loss scale of fp16; use bf16, or lower "
                "train.optimizer.learning_rate"
            ) from error
        # ZeRO leaves a step out whose gradients are not finite; without ZeRO, clipping has taken them away.
        update.applied = self.engine.was_step_applied() and self.grad_norm() is not None
        update.finite = update.applied or self.engine.fp16_enabled()
        if self.engine.fp16_enabled():
            update.extra["loss_scale"] = float(self.engine.optimizer.loss_scale)
            update.extra["skipped_steps"] = float(self.engine.skipped_steps)

    def grad_norm(self) -> float | None:
        """Return the gradient norm before clipping of the last update; None when it was skipped."""
        norm = self.engine.get_global_grad_norm()
        return None if norm is None or not math.isfinite(norm) else float(norm)

    @property
    def accumulation(self) -> int:
        """Micro batches per update."""
        return int(self.engine.gradient_accumulation_steps())

    def close(self) -> None:
        """Give the memory of weights, gradients and optimizer back; the engine cannot be used any more."""
        from deepspeed.utils import groups

        self.engine.destroy()
        del self.engine
        # A pipeline leaves its idea of data-parallel ranks behind for every later engine of the process.
        groups.mpu = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class PlainEngine(_DeepSpeed):
    """Data parallel, ZeRO 0 to 3."""

    needs_data = True

    def __init__(
        self, module: TrainModule, config: DeepSpeedConfig, optimizer: OptimizerConfig, world: World
    ) -> None:
        """Take a module with its weights, on any device: DeepSpeed rounds the parameters first, then moves them."""
        super().__init__(module, config, optimizer)
        self.module = module
        self.metric_names = module.metric_names
        self.data_rank, self.data_size = world.rank, world.size
        self.device = world.device

    def train_step(self, step: int, micro_batches: list[Batch], learning_rate: float) -> StepOutput:
        """Run forward and backward over this rank's micro batches, then update once."""
        on_device = [
            {name: value.to(self.device) for name, value in batch.items()} for batch in micro_batches
        ]
        outputs: list[LossOutput] = []
        with self._update(step, learning_rate) as update:
            self.module.begin_step(step, on_device)
            for batch in on_device:
                output = self.engine(batch)
                spoil_gradient(output.loss)
                self.engine.backward(output.loss)
                # DeepSpeed gives them zeros for gradients, and an optimizer with momentum would move them.
                for parameter in self.module.unused_parameters():
                    parameter.grad = None
                self.engine.step()
                outputs.append(LossOutput(output.loss.detach(), output.sums.detach(), output.counts))
        # Read at the end: on a GPU each of these waits for all that was started before.
        loss = sum(float(output.loss) for output in outputs) / len(outputs)
        sums, counts = (
            torch.stack([part.float() for part in parts]).sum(0).cpu()
            for parts in ([output.sums for output in outputs], [output.counts for output in outputs])
        )
        # What a module learns without gradients, such as a codebook, learns nothing from a step that was left out either.
        further = self.module.end_step(step) if update.applied else {}
        return StepOutput(loss, sums, counts, update.extra | further, update.finite)

    def _named(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for name, parameter in self.module.named_parameters():
            yield name.removeprefix(_MODEL), parameter

    def _buffers(self) -> dict[str, torch.Tensor]:
        kept = set(self.module.state_dict())
        return {
            name.removeprefix(_MODEL): buffer for name, buffer in self.module.named_buffers() if name in kept
        }

    def full_state(self) -> dict[str, torch.Tensor] | None:
        """Return the model's whole state in float32 on rank 0, None elsewhere. Collective."""
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


class PipeEngine(_DeepSpeed):
    """Pipeline parallel CogLM with data parallel ZeRO 0 or 1."""

    def __init__(
        self, module: Any, config: DeepSpeedConfig, optimizer: OptimizerConfig, model: CogLMConfig
    ) -> None:
        from cogview2.pipeline.models.coglm.loss import PART_NAMES

        super().__init__(module, config, optimizer)
        self.module = module
        self.model_config = model
        self.metric_names: tuple[str, ...] = PART_NAMES
        grid = self.engine.grid
        self.data_rank, self.data_size = grid.get_data_parallel_rank(), grid.get_data_parallel_world_size()
        self.needs_data: bool = self.engine.is_first_stage() or self.engine.is_last_stage()

    def train_step(self, step: int, micro_batches: list[Batch], learning_rate: float) -> StepOutput:
        """Run all micro batches through the pipe stages, then update once; on middle pipe stages they are not read."""
        if self.engine.is_last_stage():
            masses = [weight_mass(batch["loss_mask"], batch["loss_weights"]) for batch in micro_batches]
            group = self.engine.grid.get_data_parallel_group()
            self.engine.module.loss_fn.mass = mean_mass([m.to(self.engine.device) for m in masses], group)
        with self._update(step, learning_rate) as update:
            iterator = self._iterator(micro_batches) if self.needs_data else None
            loss = self.engine.train_batch(data_iter=iterator)
        parts = self.engine.get_additional_losses() or {}
        names = self.metric_names
        sums = torch.tensor([float(parts.get(f"{name}_loss_sum", 0.0)) for name in names])
        counts = torch.tensor([float(parts.get(f"{name}_labels", 0.0)) for name in names])
        return StepOutput(float(loss), sums, counts, update.extra, update.finite)

    def _named(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        from cogview2.pipeline.models.coglm.pipe import plain_name

        for name, parameter in self.engine.module.named_parameters():
            yield plain_name(name, self.model_config), parameter

    @staticmethod
    def _iterator(micro_batches: list[Batch]) -> Iterator[tuple[Any, Any]]:
        for batch in micro_batches:
            yield (
                (batch["tokens"], batch["position_ids"], batch["roles"]),
                (batch["labels"], batch["loss_mask"], batch["loss_weights"]),
            )

    def full_state(self) -> dict[str, torch.Tensor] | None:
        """Return the model's whole state in float32 on rank 0, None elsewhere. Collective.

        Every pipe stage sends its own layers, one matrix after the other; no other rank holds more than its share.
        """
        rank = dist.get_rank()
        mine = dict(self._named())
        # Of equal copies (data parallel, tied words) the first one is sent.
        senders: dict[str, tuple[int, tuple[int, ...]]] = {}
        for other, shapes in enumerate(gather_objects({name: tuple(p.shape) for name, p in mine.items()})):
            for name, shape in shapes.items():
                senders.setdefault(name, (other, shape))
        state: dict[str, torch.Tensor] = {}
        for name, parameter in mine.items():
            full = self._master(parameter)
            if senders[name][0] == rank == 0:
                state[name] = full.cpu()
            elif senders[name][0] == rank:
                dist.send(full, 0)
        if rank != 0:
            return None
        for name, (sender, shape) in senders.items():
            if sender != 0:
                received = torch.empty(shape, device=self.engine.device)
                dist.recv(received, sender)
                state[name] = received.cpu()
        return state

    @staticmethod
    def _master(parameter: torch.nn.Parameter) -> torch.Tensor:
        """Return a parameter in float32; of a rounded one the master copy, to which all its data-parallel ranks add."""
        from deepspeed.utils import safe_get_full_fp32_param

        full = parameter if parameter.dtype == torch.float32 else safe_get_full_fp32_param(parameter)
        return full.detach().contiguous()


def export_weights(engine: TrainingEngine, path: Any, metadata: dict[str, str]) -> None:
    """Write the model's weights from rank 0; collective."""
    state = engine.full_state()
    if state is not None:
        save_weights(path, state, metadata)
