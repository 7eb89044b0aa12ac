"""What a rank of a running engine holds in full precision: views by name, in every form that DeepSpeed keeps it.

Without ZeRO each rank has whole parameters and torch's optimizer. ZeRO 1 and 2 keep a share of each group of parameters as
one flat tensor, ZeRO 3 a share of every parameter. Here all of them are runs of numbers of named parameters, so that one
topology writes what another reads.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from cogview2.pipeline.errors import CheckpointError
from cogview2.pipeline.training.state.files import STEP, WEIGHT, Entry, StateReader

Named = Iterable[tuple[str, torch.nn.Parameter]]


@dataclass
class Holding:
    """A run of numbers of one parameter: its weights and its optimizer state, as this rank holds them."""

    name: str
    start: int
    """First number, in the flattened parameter."""
    count: int
    shape: tuple[int, ...]
    """Of the whole parameter."""
    base: torch.Tensor
    """What the optimizer updates: the parameter itself, or a flat tensor with shares of many."""
    at: int | None
    """Where the run begins in `base`; None: it is all of it."""
    state: dict[str, Any] = field(default_factory=dict)
    """The optimizer's state of `base`."""
    owned: bool = True
    """Whether this rank is the one that writes it; others may hold the same numbers."""

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this run of a tensor of the shape of `base`."""
        return tensor if self.at is None else tensor.narrow(0, self.at, self.count)

    def entries(self) -> Iterator[tuple[Entry, torch.Tensor]]:
        """Yield everything that is worth keeping of it, as flat views where that is possible."""
        yield Entry(WEIGHT, self.start, self.name), self.view(self.base.data).reshape(-1)
        for key, value in self.state.items():
            if key == STEP:
                if self.start == 0:  # one number for the whole parameter
                    yield Entry(STEP, 0, self.name), torch.tensor([float(value)], dtype=torch.float64)
            elif isinstance(value, torch.Tensor):
                yield Entry(key, self.start, self.name), self.view(value).reshape(-1)
            else:
                raise CheckpointError(
                    f"the optimizer keeps {key} = {value!r} for {self.name}, which no checkpoint of ours holds; use adamw or muon"
                )


class LiveState:
    """The full-precision state of one DeepSpeed engine on this rank."""

    def __init__(self, engine: Any, named: Named, data_rank: int, data_size: int) -> None:
        """Look at an engine.

        Args:
            engine: DeepSpeed's.
            named: its parameters by the names that they have whatever the parallelism.
            data_rank: among the ranks that hold the same layers.
            data_size: how many there are.
        """
        self.engine, self.optimizer = engine, engine.optimizer
        trained = [(name, p) for name, p in named if p.requires_grad]
        if hasattr(self.optimizer, "fp32_partitioned_groups_flat"):
            self.kind, self._inner = "partitioned", self.optimizer.optimizer
            self.holdings = [self._partitioned(name, p) for name, p in trained]
        elif hasattr(self.optimizer, "update_lp_params"):
            self.kind, self._inner = "flat", self.optimizer.optimizer
            self.holdings = [held for name, p in trained for held in self._flat(name, p)]
        else:
            self.kind, self._inner = "whole", self.optimizer
            self.holdings = [
                Holding(name, 0, p.numel(), tuple(p.shape), p, None, self._inner.state[p])
                if p in self._inner.state
                else Holding(name, 0, p.numel(), tuple(p.shape), p, None)
                for name, p in trained
            ]
            for index, held in enumerate(self.holdings):  # all have everything: each writes a part of it
                held.owned = index % data_size == data_rank
        replicated = {name for name, p in trained if getattr(p, "ds_pipe_replicated", False)}
        for held in self.holdings:
            held.owned &= held.name not in replicated

    def _flat(self, name: str, parameter: torch.nn.Parameter) -> list[Holding]:
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]  # linked by DeepSpeed
        if mapping is None:  # no number of it is this rank's
            return []
        opt = self.optimizer
        flats = getattr(opt, "single_partition_of_fp32_groups", None) or opt.fp32_groups_flat_partition
        base = flats[mapping.param_group_index]
        run, place = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
        shape = tuple(parameter.shape)
        return [
            Holding(name, run.start, run.numel, shape, base, place.start, self._inner.state.get(base, {}))
        ]

    def _partitioned(self, name: str, parameter: Any) -> Holding:
        group, at, share = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        base = self.optimizer.fp32_partitioned_groups_flat[group]
        start = share * dist.get_rank(parameter.ds_process_group)
        count = max(0, min(share, parameter.ds_numel - start))  # the last shares are filled up with zeros
        state = self._inner.state.get(base, {})
        return Holding(name, start, count, tuple(parameter.ds_shape), base, at, state)

    def entries(self) -> dict[Entry, torch.Tensor]:
        """Return what this rank writes."""
        return dict(pair for held in self.holdings if held.owned and held.count for pair in held.entries())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every whole parameter of which this rank writes numbers."""
        return {held.name: held.shape for held in self.holdings if held.owned and held.count}

    def read(self, reader: StateReader) -> None:
        """Take this rank's part over from files of any topology; `spread` must follow on all ranks.

        Raises:
            CheckpointError: numbers that the files do not hold, or counters that one flat tensor cannot have.
        """
        if self.kind == "partitioned":
            self.optimizer.checkpoint_event_prologue()
        self._forget()
        counted: dict[int, float] = {}
        with torch.no_grad():
            for held in self.holdings:
                self._load(held, reader, counted)

    def spread(self) -> None:
        """Round the masters into the weights, and give them to the ranks that need them; collective."""
        if self.kind == "flat":
            self.optimizer.update_lp_params()
        elif self.kind == "partitioned":
            self._refresh_partitioned()
            self.optimizer.checkpoint_event_epilogue()

    def _forget(self) -> None:
        """Forget what the optimizer knows: what a file does not hold begins at nothing."""
        for held in self.holdings:
            if self.kind == "whole":
                held.state = {}
                self._inner.state.pop(held.base, None)
            else:
                for key, value in held.state.items():
                    if key != STEP:
                        held.view(value).zero_()

    def _load(self, held: Holding, reader: StateReader, counted: dict[int, float]) -> None:
        """Fill one run."""
        if reader.shape(held.name) != held.shape:
            raise CheckpointError(
                f"{reader.folder} holds {held.name} as {list(reader.shape(held.name))}, the model has {list(held.shape)}; "
                "restore the model's section of the recipe"
            )
        if held.count == 0:
            return
        target = held.view(held.base.data)
        target.copy_(reader.read(held.name, WEIGHT, held.start, held.count).view(target.shape))
        keys = reader.keys(held.name) - {WEIGHT}
        if not keys:
            return
        held.state = state = self._inner.state.setdefault(held.base, held.state)
        for key in sorted(keys):
            if key == STEP:
                value = float(reader.read(held.name, STEP, 0, 1))
                if counted.setdefault(id(held.base), value) != value:
                    raise CheckpointError(
                        f"{reader.folder}: {held.name} was updated another number of times than its neighbours, which one "
                        "flat tensor of ZeRO cannot hold; resume with zero_optimization.stage 0"
                    )
                self._set_step(held, state, value)
            else:
                if key not in state:
                    state[key] = torch.zeros_like(held.base)
                view = held.view(state[key])
                view.copy_(reader.read(held.name, key, held.start, held.count).view(view.shape))

    def _set_step(self, held: Holding, state: dict[str, Any], value: float) -> None:
        """Set the counter of updates in the form that the optimizer itself uses."""
        if isinstance(state.get(STEP), torch.Tensor):
            state[STEP].fill_(value)
        elif type(self._inner).__module__.startswith("deepspeed"):
            state[STEP] = int(value)
        else:
            # As torch's optimizers make it: on the device where their fused kernels read it.
            fused = any(group.get("fused") or group.get("capturable") for group in self._inner.param_groups)
            device = held.base.device if fused else torch.device("cpu")
            state[STEP] = torch.tensor(value, dtype=torch.float32, device=device)

    def _refresh_partitioned(self) -> None:
        """Round the masters of ZeRO 3 into the shares of the parameters."""
        opt = self.optimizer
        for group, master in enumerate(opt.fp32_partitioned_groups_flat):
            rounded = opt.fp16_partitioned_groups_flat[group]
            if master.numel():
                rounded.data.copy_(master.data)
            shares = opt.unflatten(rounded, opt.fp16_partitioned_groups[group])
            for share, value in zip(opt.fp16_partitioned_groups[group], shares, strict=True):
                share.data = value.data
