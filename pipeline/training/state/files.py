"""One safetensors file for each rank: runs of numbers of named parameters, and what belongs to the rank alone.

Tensor names: `state/KEY/START/PARAMETER` for a run of a flattened parameter (KEY is `weight`, `exp_avg`, ...), `own/WHAT` for
the rank's own. Nothing in such a file can execute, and a reader of another topology takes the runs that it needs.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from cogview2.pipeline.errors import CheckpointError
from cogview2.pipeline.weights.writer import write_safetensors

WEIGHT, STEP, BUFFER = "weight", "step", "buffer"
"""The keys with a meaning here: the parameter in full precision, a counter of its updates, a buffer of the model."""
_STATE, _OWN = "state", "own"
_FILES = "rank_*.safetensors"
_CHUNK_NUMBERS = 1 << 20


class Entry(NamedTuple):
    """Names a run of numbers."""

    key: str
    start: int
    name: str

    def __str__(self) -> str:
        return f"{_STATE}/{self.key}/{self.start}/{self.name}"


@dataclass
class RankState:
    """What one rank writes."""

    entries: dict[Entry, torch.Tensor]
    shapes: dict[str, tuple[int, ...]]
    """Of the whole parameters and buffers."""
    own: dict[str, torch.Tensor] = field(default_factory=dict)
    plain: dict[str, Any] = field(default_factory=dict)
    """Plain values: counters."""

    def copy(self) -> "RankState":
        """Return the state as it is now, in memory of its own, so that training can go on while it is written."""
        entries = {entry: _kept(tensor) for entry, tensor in self.entries.items()}
        return RankState(entries, self.shapes, {k: _kept(v) for k, v in self.own.items()}, self.plain)


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)


@dataclass(frozen=True)
class _Stream:
    """A tensor that is written in pieces."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def chunks(self) -> Iterator[torch.Tensor]:
        flat = self.tensor.detach().reshape(-1)
        for start in range(0, flat.numel(), _CHUNK_NUMBERS):
            yield flat[start : start + _CHUNK_NUMBERS].cpu().contiguous()


def file_name(rank: int) -> str:
    """Return the name of a rank's file."""
    return f"rank_{rank:05d}.safetensors"


def write_rank_state(path: Path, state: RankState) -> tuple[str, int]:
    """Write and sync what a rank has; returns sha256 and size of the file, computed while it was written.

    Raises:
        CheckpointError: a number is not finite: such a state is worth nothing, and must replace none.
        RunDirectoryError: full disk and the like.
    """
    tensors = {str(entry): _Stream(tensor) for entry, tensor in state.entries.items()}
    tensors |= {f"{_OWN}/{what}": _Stream(tensor) for what, tensor in state.own.items()}
    metadata = {"shapes": json.dumps(state.shapes), "plain": json.dumps(state.plain)}
    return write_safetensors(
        path, tensors, None, allow_nonfinite=False, where=f"cannot save {path.name}", metadata=metadata
    )


class _Run(NamedTuple):
    start: int
    size: int
    file: int
    tensor: str


class StateReader:
    """Reads runs of numbers out of the files of all ranks, wherever their bounds are; the files are mapped, not loaded."""

    def __init__(self, folder: Path) -> None:
        """Open the files of a checkpoint, which must have been verified.

        Raises:
            CheckpointError: there are none, or one is no such file.
        """
        self.folder = folder
        self._files: list[Any] = []
        self._runs: dict[tuple[str, str], list[_Run]] = {}
        self._keys: dict[str, set[str]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.plain: list[dict[str, Any]] = []
        for path in sorted(folder.glob(_FILES)):
            try:
                self._open(path)
            except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
                raise CheckpointError(
                    f"{path} is no state of a rank ({error}); use another checkpoint"
                ) from error
        if not self._files:
            raise CheckpointError(f"{folder} holds no {_FILES}; use another checkpoint")
        for runs in self._runs.values():
            runs.sort()

    def _open(self, path: Path) -> None:
        file = safe_open(str(path), framework="pt")
        metadata = file.metadata()
        for name, shape in json.loads(metadata["shapes"]).items():
            self._shapes[name] = tuple(shape)
        self.plain.append(json.loads(metadata["plain"]))
        for tensor in file.keys():  # noqa: SIM118 - not a dict
            space, _, rest = tensor.partition("/")
            if space == _STATE:
                key, start, name = rest.split("/", 2)
                count = file.get_slice(tensor).get_shape()[0]
                self._runs.setdefault((name, key), []).append(
                    _Run(int(start), count, len(self._files), tensor)
                )
                self._keys.setdefault(name, set()).add(key)
        self._files.append(file)

    @property
    def ranks(self) -> int:
        """How many ranks wrote."""
        return len(self._files)

    def names(self, key: str = WEIGHT) -> list[str]:
        """Return the names that have numbers under a key, sorted."""
        return sorted(name for name, keys in self._keys.items() if key in keys)

    def every_name(self) -> list[str]:
        """Return all names, sorted."""
        return sorted(self._keys)

    def every_number(self, name: str, key: str) -> torch.Tensor:
        """Return all numbers of a name under a key, flat."""
        last = self._runs[name, key][-1]
        return self.read(name, key, 0, last.start + last.size)

    def keys(self, name: str) -> set[str]:
        """Return the keys under which numbers of a name are there."""
        return self._keys.get(name, set())

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole parameter or buffer.

        Raises:
            CheckpointError: the files do not know it.
        """
        if name not in self._shapes:
            raise CheckpointError(
                f"{self.folder} does not hold {name}; restore the model's section of the recipe that saved it"
            )
        return self._shapes[name]

    def read(self, name: str, key: str, start: int, count: int) -> torch.Tensor:
        """Return numbers [count] from `start` on of a flattened parameter, in the type in which they were written.

        Raises:
            CheckpointError: some of them are in no file.
        """
        parts, at = [], start
        for run in self._runs.get((name, key), ()):
            last = min(run.start + run.size, start + count)
            if run.start <= at < last:
                piece = self._files[run.file].get_slice(run.tensor)
                parts.append(piece[at - run.start : last - run.start])
                at = last
        if at != start + count:
            raise CheckpointError(
                f"{self.folder} holds no {key} of {name} from {at} on; use another checkpoint"
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def whole(self, name: str, key: str = WEIGHT) -> torch.Tensor:
        """Return all numbers of a parameter or buffer, in its shape."""
        shape = self.shape(name)
        return self.read(name, key, 0, torch.Size(shape).numel()).view(shape)

    def own(self, rank: int) -> Mapping[str, torch.Tensor]:
        """Return what belongs to a rank of the writing job alone."""
        file = self._files[rank]
        found = [tensor for tensor in file.keys() if tensor.startswith(f"{_OWN}/")]  # noqa: SIM118 - not a dict
        return {tensor.removeprefix(f"{_OWN}/"): file.get_tensor(tensor) for tensor in found}
