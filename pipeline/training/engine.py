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
from cogview2.pipeline.training.modules import Batch, LossOutput, TrainModule
from cogview2.pipeline.training.normalisation import mean_mass, weight_mass
from cogview2.pipeline.training.optimizers import build_optimizer, parameter_groups
from cogview2.pipeline.weights.files import save_weights

DeepSpeedConfig = dict[str, Any]
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

    def save(self, folder: str, step: int) -> None:
        """Write the full state below `folder`/ds."""

    def load(self, folder: str) -> None:
        """Read what `save` wrote, with the same topology."""

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


def _clip(engine: Any) -> None:
    """Clip the gradients of a float32 engine without ZeRO, and keep the norm, which DeepSpeed throws away there.

    Pipe stages add up their squares, and a matrix of which several of them hold a copy counts once; DeepSpeed's own
    clipping gives each pipe stage another norm.
    """
    parameters = [p for p in engine.module.parameters() if p.grad is not None]
    if not hasattr(engine, "grid"):
        engine._global_grad_norm = torch.nn.utils.clip_grad_norm_(parameters, engine.gradient_clipping())
        return
    owned = [p.grad for p in parameters if p.grad is not None and not getattr(p, "ds_pipe_replicated", False)]
    square = torch.zeros((), device=engine.device)
    if owned:
        square += torch.nn.utils.get_total_norm(owned).square()
    dist.all_reduce(square, group=engine.grid.get_pipe_parallel_group())
    norm = square.sqrt()
    torch.nn.utils.clip_grads_with_norm_(parameters, engine.gradient_clipping(), norm)
    engine._global_grad_norm = norm


def _whole(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return a frozen parameter, which has no master copy; under ZeRO-3 a rank holds only a share of it."""
    import deepspeed

    if not hasattr(parameter, "ds_id"):
        return parameter.data
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.data.clone()


class _DeepSpeed:
    """What both engines do with DeepSpeed's."""

    replicated: tuple[str, ...] | list[str] = ()

    def __init__(self, module: Any, config: DeepSpeedConfig, optimizer: OptimizerConfig) -> None:
        self.engine = _initialize(module, config, optimizer)
        self.engine.clip_fp32_gradients = partial(_clip, self.engine)

    @contextmanager
    def _update(self, step: int, learning_rate: float) -> Iterator[dict[str, float]]:
        """Make one update inside; yields a dict that holds further numbers afterwards.

        Raises:
            NumericError: gradients that are not finite, or that overflow at the least loss scale of fp16.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        extra: dict[str, float] = {}
        try:
            yield extra
        except Exception as error:
            if _AT_LEAST_SCALE not in str(error):
                raise
            raise NumericError(
                f"the gradients of step {step + 1} overflow even at the least loss scale of fp16; use bf16, or lower "
                "train.optimizer.learning_rate"
            ) from error
        if self.engine.fp16_enabled():
            extra["loss_scale"] = float(self.engine.optimizer.loss_scale)
            extra["skipped_steps"] = float(self.engine.skipped_steps)
        elif not self.engine.was_step_applied() or self.grad_norm() is None:
            # ZeRO leaves such a step out and goes on, and without ZeRO it is applied: neither gets any better.
            raise NumericError(
                f"the gradients of step {step + 1} are not finite; lower train.optimizer.learning_rate"
            )

    def grad_norm(self) -> float | None:
        """Return the gradient norm before clipping of the last update; None when it was skipped."""
        norm = self.engine.get_global_grad_norm()
        return None if norm is None or not math.isfinite(norm) else float(norm)

    def save(self, folder: str, step: int) -> None:
        """Write the full state below `folder`/ds. Collective."""
        # The universal info cannot be added later, and without it another topology cannot resume.
        info = {
            "universal_checkpoint_version": 0.2,
            "pipeline_replicated_parameter_patterns": self.replicated,
        }
        client_state = {"universal_checkpoint_info": info, "step": step}
        if not self.engine.save_checkpoint(folder, tag="ds", client_state=client_state, save_latest=False):
            raise OSError(f"DeepSpeed could not save to {folder}")

    def load(self, folder: str) -> None:
        """Read what `save` wrote, with the same topology. Collective."""
        path, _ = self.engine.load_checkpoint(folder, tag="ds")
        if path is None:
            raise OSError(f"DeepSpeed found no state in {folder}")

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
        with self._update(step, learning_rate) as extra:
            self.module.begin_step(step, on_device)
            for batch in on_device:
                output = self.engine(batch)
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
        return StepOutput(loss, sums, counts, extra | self.module.end_step(step))

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
        from cogview2.pipeline.models.coglm.pipe import TIED_PATTERN

        super().__init__(module, config, optimizer)
        self.module = module
        self.model_config = model
        self.metric_names: tuple[str, ...] = PART_NAMES
        self.replicated = [TIED_PATTERN]
        grid = self.engine.grid
        self.data_rank, self.data_size = grid.get_data_parallel_rank(), grid.get_data_parallel_world_size()
        self.needs_data: bool = self.engine.is_first_stage() or self.engine.is_last_stage()

    def train_step(self, step: int, micro_batches: list[Batch], learning_rate: float) -> StepOutput:
        """Run all micro batches through the pipe stages, then update once; on middle pipe stages they are not read."""
        if self.engine.is_last_stage():
            masses = [weight_mass(batch["loss_mask"], batch["loss_weights"]) for batch in micro_batches]
            group = self.engine.grid.get_data_parallel_group()
            self.engine.module.loss_fn.mass = mean_mass([m.to(self.engine.device) for m in masses], group)
        with self._update(step, learning_rate) as extra:
            iterator = self._iterator(micro_batches) if self.needs_data else None
            loss = self.engine.train_batch(data_iter=iterator)
        parts = self.engine.get_additional_losses() or {}
        names = self.metric_names
        sums = torch.tensor([float(parts.get(f"{name}_loss_sum", 0.0)) for name in names])
        counts = torch.tensor([float(parts.get(f"{name}_labels", 0.0)) for name in names])
        return StepOutput(float(loss), sums, counts, extra)

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
        from cogview2.pipeline.models.coglm.pipe import plain_name

        rank = dist.get_rank()
        mine = {plain_name(name, self.model_config): p for name, p in self.engine.module.named_parameters()}
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
