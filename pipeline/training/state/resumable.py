"""Engines whose full state can be written, and taken over from files of any topology."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from cogview2.pipeline.distributed.together import together
from cogview2.pipeline.errors import CheckpointError
from cogview2.pipeline.training.state.files import BUFFER, Entry, RankState, StateReader
from cogview2.pipeline.training.state.live import LiveState


class Resumable(ABC):
    """A rank's part of a training run, held by a DeepSpeed engine."""

    engine: Any
    data_rank: int
    """Among the ranks that hold the same layers."""
    data_size: int

    @abstractmethod
    def _named(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Yield this rank's parameters by the names that they have in the plain model."""

    def _buffers(self) -> dict[str, torch.Tensor]:
        """Return the persistent buffers, equal on all ranks, by name."""
        return {}

    def _live(self) -> LiveState:
        return LiveState(self.engine, self._named(), self.data_rank, self.data_size)

    def state(self) -> RankState:
        """Return what this rank writes into a checkpoint: views of what it holds now.

        Frozen parameters are left out: they come from the weights that the stage began with, whose hashes are in its
        fingerprint.
        """
        live = self._live()
        entries, shapes = live.entries(), live.shapes()
        if dist.get_rank() == 0:
            for name, buffer in self._buffers().items():
                entries[Entry(BUFFER, 0, name)] = buffer.reshape(-1)
                shapes[name] = tuple(buffer.shape)
        counters = {name: int(getattr(self.engine, name)) for name in ("global_steps", "skipped_steps")}
        return RankState(entries, shapes, plain=counters | {"loss_scaler": self._loss_scaler()})

    def _read_buffers(self, reader: StateReader) -> None:
        buffers = self._buffers()
        missing = sorted(set(reader.names(BUFFER)) ^ set(buffers))
        if missing:
            raise CheckpointError(
                f"{reader.folder} and the model differ in {missing[0]}; restore the recipe that saved it"
            )
        for name, buffer in buffers.items():
            buffer.copy_(reader.whole(name, BUFFER))

    def _loss_scaler(self) -> dict[str, Any] | None:
        """Return the numbers of fp16's loss scaler."""
        if not self.engine.fp16_enabled():
            return None
        values = vars(self.engine.optimizer.loss_scaler)
        return {name: value for name, value in values.items() if isinstance(value, bool | int | float)}

    def load(self, reader: StateReader) -> None:
        """Take the state over that engines of any topology wrote. Collective.

        Raises:
            CheckpointError: the files do not hold all of this model.
        """
        live = self._live()

        def read() -> None:
            live.read(reader)
            self._read_buffers(reader)

        together(read, f"load {reader.folder}")
        live.spread()
        engine, plain = self.engine, reader.plain
        engine.global_steps, engine.skipped_steps = plain["global_steps"], plain["skipped_steps"]
        engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
        engine.global_samples = engine.global_steps * engine.train_batch_size()
        if self.engine.fp16_enabled() and plain["loss_scaler"] is not None:
            vars(engine.optimizer.loss_scaler).update(plain["loss_scaler"])
