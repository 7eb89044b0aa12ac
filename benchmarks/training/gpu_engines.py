"""What trains in bench_gpu_training.py: plain torch with float32 masters, or the project's engine over DeepSpeed."""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import synthetic
import torch
import torch.utils.checkpoint
from torch import nn

from cogview2.pipeline.config.model import CogLMConfig
from cogview2.pipeline.models.coglm.loss import LabelRanges, coglm_loss
from cogview2.pipeline.models.coglm.model import CogLM
from cogview2.pipeline.models.coglm.visibility import Visibility
from cogview2.pipeline.models.transformer.block import Block

LEARNING_RATE, CLIPPING = 1e-4, 0.1


class Engine(Protocol):
    """One update at a time."""

    name: str
    model: CogLM

    def step(self, micro_batches: list[synthetic.Batch]) -> Any:
        """Make an update; may leave work queued on the device."""


class MasterAdamW:
    """AdamW on float32 copies of low-precision weights, some layers at a time, so that few float32 gradients exist at once."""

    def __init__(self, parts: Sequence[Sequence[nn.Parameter]]) -> None:
        """Copy the weights; the parameters of one of `parts` are updated together."""
        self._parts = []
        for parameters in parts:
            masters = [nn.Parameter(parameter.detach().float()) for parameter in parameters]
            optimizer = torch.optim.AdamW(
                masters, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=True
            )
            self._parts.append((list(parameters), masters, optimizer))

    @torch.no_grad()
    def step(self) -> None:
        """Update masters and weights; the gradients are gone afterwards."""
        for parameters, masters, optimizer in self._parts:
            for parameter, master in zip(parameters, masters, strict=True):
                assert parameter.grad is not None
                master.grad, parameter.grad = parameter.grad.float(), None
            optimizer.step()
            optimizer.zero_grad()
            torch._foreach_copy_(parameters, masters)


class Bare:
    """bf16 weights and gradients, float32 masters and moments: 16 bytes a parameter, as ZeRO-1 on one rank."""

    name = "bare torch loop"

    def __init__(self, config: CogLMConfig, rows: int, device: torch.device) -> None:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with device:
                self.model = CogLM(config, rows)
        finally:
            torch.set_default_dtype(before)
        vocabulary = synthetic.vocabulary(rows)
        self._ranges = LabelRanges((0, vocabulary.image_codes), vocabulary.english, vocabulary.chinese)
        blocks = list(self.model.transformer.layers)
        inside = {id(parameter) for block in blocks for parameter in block.parameters()}
        self._parameters = list(self.model.parameters())
        ends = [[parameter] for parameter in self._parameters if id(parameter) not in inside]
        self._optimizer = MasterAdamW([*ends, *(list(block.parameters()) for block in blocks)])

    def step(self, micro_batches: list[synthetic.Batch]) -> torch.Tensor:
        total = torch.zeros((), device=self._parameters[0].device)
        for batch in micro_batches:
            hidden_BSD = self.model(batch["tokens"], batch["position_ids"], Visibility(batch["roles"]))
            words_VD = self.model.transformer.word_embeddings.weight
            targets = batch["labels"], batch["loss_mask"]
            parts = coglm_loss(hidden_BSD, words_VD, *targets, self._ranges, batch["loss_weights"])
            loss = parts.loss / len(micro_batches)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self._parameters, CLIPPING)
        self._optimizer.step()
        return total


class OverDeepSpeed:
    """The engine that the stages use, with ZeRO-1 on this one rank. The process group must be open."""

    name = "the project's engine, ZeRO-1"

    def __init__(self, config: CogLMConfig, rows: int, device: torch.device, accumulation: int) -> None:
        from cogview2.pipeline.config.deepspeed import resolve
        from cogview2.pipeline.config.training import OptimizerConfig, TrainConfig
        from cogview2.pipeline.distributed.process import World
        from cogview2.pipeline.training.train_modules.coglm import coglm_engine

        how = {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 1},
        }
        optimizer = OptimizerConfig(learning_rate=LEARNING_RATE, gradient_clipping=CLIPPING)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "zero1.json"
            path.write_text(json.dumps(how))
            train = TrainConfig(
                steps=1000, global_batch=accumulation, deepspeed=str(path), optimizer=optimizer
            )
            resolved = resolve(str(path), train, 1, cpu=device.type == "cpu")
        world = World(0, 1, device.index or 0, device)
        self._engine = coglm_engine(config, synthetic.vocabulary(rows), train, resolved, (), world, 0)
        self.model = self._engine.module.model
        self._steps = 0

    def step(self, micro_batches: list[synthetic.Batch]) -> float:
        self._steps += 1
        return self._engine.train_step(self._steps, micro_batches, LEARNING_RATE).loss


def build(options: argparse.Namespace, config: CogLMConfig, device: torch.device) -> Engine:
    """Return the engine that is asked for."""
    if options.engine == "deepspeed":
        return OverDeepSpeed(config, options.rows, device, options.accumulation)
    return Bare(config, options.rows, device)


def recompute(model: CogLM, layers: int) -> None:
    """Let the first `layers` layers keep only their inputs, and the others everything."""
    for index, block in enumerate(model.transformer.layers):
        assert isinstance(block, Block)
        block.__dict__.pop("forward", None)
        if index < layers:
            whole = block.forward

            def forward(*inputs: Any, _whole: Any = whole) -> Any:
                return torch.utils.checkpoint.checkpoint(_whole, *inputs, use_reentrant=False)

            block.forward = forward  # type: ignore[method-assign]


def set_dropout(model: CogLM, probability: float) -> None:
    """Change the dropout of a built model; without any, a GPU attends by FlexAttention."""
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = probability  # type: ignore[assignment]
