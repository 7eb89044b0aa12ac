"""One safetensors file for each rank: runs of numbers of named parameters, and what belongs to the rank alone.

Tensor names: `state/KEY/START/PARAMETER` for a run of a flattened parameter (KEY is `weight`, `exp_avg`, ...), `own/WHAT` for
the rank's own. Nothing in such a file can execute, and a reader of another topology takes the runs that it needs.
"""

import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from cogview2.pipeline.distributed import watchdog
from cogview2.pipeline.errors import CheckpointError
from cogview2.pipeline.training.state.manifest import unreadable
from cogview2.pipeline.weights.writer import DTYPE_NAMES, write_safetensors

WEIGHT, STEP, BUFFER = "weight", "step", "buffer"
"""The keys with a meaning here: the parameter in full precision, a counter of its updates, a buffer of the model."""
_STATE, _OWN = "state", "own"
_FILES = "rank_*.safetensors"
_CHUNK_NUMBERS = 1 << 20
_ALIGNMENT = 16
_DTYPES = tuple(DTYPE_NAMES)
_DTYPE_NUMBERS = {DTYPE_NAMES[dtype]: number for number, dtype in enumerate(_DTYPES)}
_PLACE = [("dtype", "<i4"), ("file", "<i4"), ("start", "<i8"), ("size", "<i8"), ("at", "<i8")]
"""Of one run: its type, the number of its file, its first number in the flattened parameter, how many they are, and where
they begin in the file, in bytes."""
_PLACES = np.dtype(_PLACE)
_RUNS = np.dtype([("name", "<i4"), ("key", "<i4"), *_PLACE])
"""The same with whose they are, as places in lists of words."""


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

    @property
    def nbytes(self) -> int:
        """Bytes of all its numbers."""
        tensors = [*self.entries.values(), *self.own.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def copy(self) -> "RankState":
        """Return the state as it is now, in memory of its own, so that training can go on while it is written.

        One block for all tensors: the system gets it back at once when the copy is gone, where thousands of small pieces
        would stay with the process.
        """
        tensors = [*self.entries.values(), *self.own.values()]
        block = torch.empty(sum(_aligned(tensor) for tensor in tensors), dtype=torch.uint8)
        at = 0

        def kept(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal at
            place = block[at : at + tensor.numel() * tensor.element_size()].view(tensor.dtype)
            at += _aligned(tensor)
            return place.view(tensor.shape).copy_(tensor.detach())

        entries = {entry: kept(tensor) for entry, tensor in self.entries.items()}
        own = {what: kept(tensor) for what, tensor in self.own.items()}
        return RankState(entries, self.shapes, own, self.plain)


def _aligned(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor, rounded up so that one of any type may follow."""
    return -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT


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


@dataclass(frozen=True)
class Header:
    """What one rank's file says of itself: packed, because every rank needs those of all files."""

    file: str
    size: int
    """Bytes of the file."""
    words: bytes
    """Names, keys, shapes and plain values: JSON, compressed."""
    runs: bytes
    """An array of _RUNS, compressed."""


def state_files(names: Iterable[str]) -> list[str]:
    """Return those of the names of a checkpoint's files that hold states of ranks, in the order of the ranks."""
    return sorted(name for name in names if fnmatchcase(name, _FILES))


def read_header(path: Path) -> Header:
    """Read what a rank's file holds, but no numbers; it must have been verified.

    Raises:
        CheckpointError: it is no such file.
        UnreadableError: the disk does not give it.
    """
    watchdog.progress()
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            begin = 8 + int.from_bytes(file.read(8), "little")
            if begin > size:
                raise ValueError("it is cut")
            tensors = json.loads(file.read(begin - 8))
        metadata = tensors.pop("__metadata__")
        words, runs = _runs(tensors, begin, size)
        words |= {what: json.loads(metadata[what]) for what in ("shapes", "plain")}
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise _no_state(path, error) from error
    return Header(
        path.name, size, zlib.compress(json.dumps(words).encode()), zlib.compress(runs.tobytes(), 1)
    )


def _no_state(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} is no state of a rank ({error}); use another checkpoint")


def _runs(tensors: dict[str, Any], begin: int, size: int) -> tuple[dict[str, Any], np.ndarray]:
    """Return the runs that a file's own list of tensors tells of; ValueError when one of them cannot be there."""
    names: dict[str, int] = {}
    keys: dict[str, int] = {}
    runs = []
    at = 0
    for tensor, about in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        dtype = _DTYPE_NUMBERS[about["dtype"]]
        width = _DTYPES[dtype].itemsize
        first, last = about["data_offsets"]
        # Without overlaps and gaps: a file whose list lies must not give the numbers of one tensor for those of another.
        if first != at or last - first != math.prod(about["shape"]) * width or (begin + first) % width:
            raise ValueError(f"{tensor} is not where it says")
        at = last
        space, _, rest = tensor.partition("/")
        if space == _STATE:
            (count,) = about["shape"]
            key, start, name = rest.split("/", 2)
            of = names.setdefault(name, len(names)), keys.setdefault(key, len(keys))
            runs.append((*of, dtype, 0, int(start), count, begin + first))
    if at != size - begin:
        raise ValueError("its numbers end elsewhere than the file")
    return {"names": list(names), "keys": list(keys)}, np.array(runs, _RUNS)


class StateReader:
    """Reads runs of numbers out of the files of all ranks, wherever their bounds are.

    Files are mapped, not loaded, and only those of which something is read. Where the runs are is kept in arrays: a job of
    hundreds of ranks has a million of them.
    """

    def __init__(self, folder: Path, headers: Iterable[Header] | None = None) -> None:
        """Look at the files of a checkpoint, which must have been verified.

        Args:
            folder: of the checkpoint.
            headers: of all its files, which ranks can read in shares; None reads all of them here.

        Raises:
            CheckpointError: there are none, or one is no such file.
            UnreadableError: the disk does not give one.
        """
        self.folder = folder
        if headers is None:
            headers = [read_header(folder / name) for name in state_files(os.listdir(folder))]
        self._headers = sorted(headers, key=lambda header: header.file)
        if not self._headers:
            raise CheckpointError(f"{folder} holds no {_FILES}; use another checkpoint")
        self._files: dict[int, torch.Tensor] = {}
        self._keys: dict[str, set[str]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.plain: dict[str, Any] = {}
        """The plain values of the first rank; those of others are the same."""
        self._places = np.empty(0, _PLACES)
        self._spans: dict[tuple[str, str], slice] = {}
        self._sort(*self._unpack())

    def _unpack(self) -> tuple[list[str], list[str], np.ndarray]:
        """Return all names, all keys, and the runs of all files, with places in these lists."""
        names: dict[str, int] = {}
        keys: dict[str, int] = {}
        places: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}
        parts = []
        for number, header in enumerate(self._headers):
            if header.words not in places:  # those of many ranks are the same
                words = json.loads(zlib.decompress(header.words))
                self._shapes |= {name: tuple(shape) for name, shape in words["shapes"].items()}
                self.plain = self.plain or words["plain"]
                places[header.words] = (
                    np.array([names.setdefault(name, len(names)) for name in words["names"]], np.int32),
                    np.array([keys.setdefault(key, len(keys)) for key in words["keys"]], np.int32),
                )
            runs = np.frombuffer(zlib.decompress(header.runs), _RUNS).copy()
            of_names, of_keys = places[header.words]
            runs["name"], runs["key"], runs["file"] = of_names[runs["name"]], of_keys[runs["key"]], number
            parts.append(runs)
        return list(names), list(keys), np.concatenate(parts)

    def _sort(self, names: list[str], keys: list[str], runs: np.ndarray) -> None:
        """Keep the runs by name, key and start."""
        order = np.lexsort((runs["size"], runs["start"], runs["key"], runs["name"]))
        self._places = np.empty(len(runs), _PLACES)
        for what in _PLACES.fields or ():
            self._places[what] = runs[what][order]
        owner = runs["name"].astype(np.int64)[order] * len(keys) + runs["key"][order]
        owners, firsts = np.unique(owner, return_index=True)
        for of, first, last in zip(owners.tolist(), firsts, [*firsts[1:], len(runs)], strict=True):
            name, key = names[of // len(keys)], keys[of % len(keys)]
            self._spans[name, key] = slice(int(first), int(last))
            self._keys.setdefault(name, set()).add(key)

    def _file(self, number: int) -> torch.Tensor:
        """Return all bytes of a file, mapped; its descriptor is closed again."""
        if number not in self._files:
            watchdog.progress()
            header = self._headers[number]
            path = self.folder / header.file
            try:
                self._files[number] = torch.from_file(
                    str(path), shared=False, size=header.size, dtype=torch.uint8
                )
            except (OSError, RuntimeError) as error:
                raise unreadable(path, error) from error
        return self._files[number]

    @property
    def ranks(self) -> int:
        """How many ranks wrote."""
        return len(self._headers)

    def names(self, key: str = WEIGHT) -> list[str]:
        """Return the names that have numbers under a key, sorted."""
        return sorted(name for name, keys in self._keys.items() if key in keys)

    def every_name(self) -> list[str]:
        """Return all names, sorted."""
        return sorted(self._keys)

    def every_number(self, name: str, key: str) -> torch.Tensor:
        """Return all numbers of a name under a key, flat."""
        last = self._places[self._spans[name, key]][-1]
        return self.read(name, key, 0, int(last["start"] + last["size"]))

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
        watchdog.progress()
        runs = self._places[self._spans.get((name, key), slice(0, 0))]
        first = int(np.searchsorted(np.maximum.accumulate(runs["start"] + runs["size"]), start, side="right"))
        last = int(np.searchsorted(runs["start"], start + count))
        parts, at = [], start
        for dtype, file, begin, size, offset in runs[first:last].tolist():
            end = min(begin + size, start + count)
            if begin <= at < end:
                width = _DTYPES[dtype].itemsize
                piece = self._file(file)[offset + (at - begin) * width : offset + (end - begin) * width]
                parts.append(piece.view(_DTYPES[dtype]))
                at = end
        if at != start + count:
            raise CheckpointError(
                f"{self.folder} holds no {key} of {name} from {at} on; use another checkpoint"
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0)

    def whole(self, name: str, key: str = WEIGHT) -> torch.Tensor:
        """Return all numbers of a parameter or buffer, in its shape."""
        shape = self.shape(name)
        return self.read(name, key, 0, torch.Size(shape).numel()).view(shape)

    def own(self, rank: int) -> Mapping[str, torch.Tensor]:
        """Return what belongs to a rank of the writing job alone.

        Raises:
            UnreadableError: the disk does not give it.
        """
        watchdog.progress()
        path = self.folder / self._headers[rank].file
        try:
            # Closed again: a file that the library has open costs a list of all its tensors.
            with safe_open(str(path), framework="pt") as file:
                found = [tensor for tensor in file.keys() if tensor.startswith(f"{_OWN}/")]  # noqa: SIM118
                return {tensor.removeprefix(f"{_OWN}/"): file.get_tensor(tensor).clone() for tensor in found}
        except SafetensorError as error:
            raise _no_state(path, error) from error
        except OSError as error:
            raise unreadable(path, error) from error
