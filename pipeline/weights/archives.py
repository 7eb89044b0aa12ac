"""Files of tensors made by others, opened without reading the tensors: .safetensors and torch's two forms.

The numbers are read later in blocks with `pread`, so memory depends on the block and not on the file.
"""

import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import torch

from cogview2.pipeline.errors import CheckpointError
from cogview2.pipeline.weights.pickles import load_legacy, load_zip, map_zip

HEADER_BYTES = 100_000_000
"""The longest header of a .safetensors file (the format's own bound)."""
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_DEPTH = 4
_MAX_VALUES = 1_000_000
_FOREIGN = {
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"Rar!": "a rar archive; unpack it first",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
    b"\x93NUMPY": "a NumPy array; only --kind clusters reads one",
}


class Stored(Protocol):
    """A tensor in a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers."""

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Return the rows first..last-1 of the first dim on the CPU; a tensor without dims has one row."""


@dataclass(frozen=True)
class FileTensor:
    """A tensor whose numbers lie in one piece in a file."""

    path: Path
    file: FileIO
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Byte of the first number."""

    def rows(self, first: int, last: int) -> torch.Tensor:
        """See `Stored`."""
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        count = (last - first) * row
        shape = (last - first, *self.shape[1:]) if self.shape else ()
        if not count:
            return torch.empty(shape, dtype=self.dtype)
        buffer = bytearray(count)
        view, done = memoryview(buffer), 0
        while done < count:
            got = os.preadv(self.file.fileno(), [view[done:]], self.offset + first * row + done)
            if not got:
                raise CheckpointError(f"{self.path} became shorter while it was read; copy it again")
            done += got
        return torch.frombuffer(buffer, dtype=self.dtype).reshape(shape)


@dataclass(frozen=True)
class MemoryTensor:
    """A tensor in memory."""

    tensor: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes."""
        return tuple(self.tensor.shape)

    def rows(self, first: int, last: int) -> torch.Tensor:
        """See `Stored`."""
        return self.tensor[first:last] if self.tensor.ndim else self.tensor


@dataclass(frozen=True)
class Archive:
    """What a file holds."""

    path: Path
    form: str
    """`safetensors`, `torch`, or `torch (before 1.6)`."""
    tensors: dict[str, Stored]
    values: dict[str, Any]
    """Numbers and texts that stand outside of tensors, such as `iteration`."""


def open_plain(path: Path) -> FileIO:
    """Open a regular file for reading, also through a link: download caches are made of them.

    Raises:
        CheckpointError: missing, a folder, a device, or not readable.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; check the path") from error
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be opened ({error.strerror}); check its owner and mode"
        ) from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        what = "a folder" if stat.S_ISDIR(mode) else "not a plain file"
        raise CheckpointError(f"{path} is {what}; name a file of weights")
    return FileIO(descriptor, "rb")


def open_archive(path: Path) -> Archive:
    """Open a file of tensors; its content decides what it is, not its name.

    Raises:
        CheckpointError: no such form, damaged, or a torch file that asks for more than tensors.
    """
    path = Path(path)
    file = open_plain(path)
    head = file.read(512)
    if _is_safetensors(head, os.fstat(file.fileno()).st_size):  # first: its length may begin like a pickle
        return Archive(path, "safetensors", dict(_safetensors(path, file)), {})
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        tree, storages = load_zip(path, file)
        if not all(_place(tensor) in storages for tensor in _tensors(path, tree).values()):
            # Packed again by another program: torch guesses the places of the storages then, but a map is right.
            return _torch_archive(path, "torch", map_zip(path), None, storages)
        return _torch_archive(path, "torch", tree, file, storages)
    if head[:1] == b"\x80":
        return _torch_archive(path, "torch (before 1.6)", load_legacy(path, file), None, {})
    what = _foreign(head)
    if what is not None:
        raise CheckpointError(f"{path} is {what}")
    return Archive(path, "safetensors", dict(_safetensors(path, file)), {})


def _is_safetensors(head: bytes, size: int) -> bool:
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= min(HEADER_BYTES, size - 8)


def _foreign(head: bytes) -> str | None:
    """Return what a file that is no weights file is, and the remedy; None if it may be .safetensors."""
    text = head.lstrip().lower()
    if not head:
        return "empty; copy it again"
    if text.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the weights; fetch them: git lfs pull"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page, not weights; the download failed: fetch it again"
    for magic, name in _FOREIGN.items():
        if head.startswith(magic):
            return name
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it first"
    return None


class _RepeatedError(ValueError):
    """A key that stands twice in a JSON table."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedError(next(name for name in names if names.count(name) > 1))
    return found


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a whole safetensors file ({why}); copy it again")


def _header(path: Path, file: FileIO) -> tuple[dict[str, Any], int, int]:
    """Return a .safetensors header, the byte after it, and the size of the file."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(os.pread(file.fileno(), 8, 0), "little")
    if size < 8 or length > HEADER_BYTES or 8 + length > size:
        raise _damaged(path, f"its header claims {length:,} bytes, the file has {size:,}")
    try:
        header = json.loads(os.pread(file.fileno(), length, 8), object_pairs_hook=_unique)
    except _RepeatedError as error:
        raise _damaged(path, f"the name {str(error)[:80]!r} stands there twice") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is no table")
    header.pop("__metadata__", None)
    return header, 8 + length, size


def _safetensors(path: Path, file: FileIO) -> Mapping[str, Stored]:
    """Check a .safetensors header as strictly as the library does, and names for repetition besides."""
    header, start, size = _header(path, file)
    found: dict[str, FileTensor] = {}
    spans = []
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            if not all(type(value) is int and value >= 0 for value in (*shape, begin, end)):
                raise ValueError
        except (TypeError, KeyError, ValueError) as error:
            raise _damaged(path, f"the entry of {name[:80]!r} has no dtype, shape and offsets") from error
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise _damaged(
                path, f"{name[:80]!r} has the dtype {str(dtype)[:20]!r}, which is no dtype of weights"
            )
        if end - begin != math.prod(shape) * _DTYPES[dtype].itemsize:
            raise _damaged(path, f"{name[:80]!r} of shape {tuple(shape)} has {end - begin} bytes")
        if start + end > size:
            raise _damaged(path, f"{name[:80]!r} reaches past the end")
        spans.append((begin, end, name))
        found[name] = FileTensor(path, file, _DTYPES[dtype], tuple(shape), start + begin)
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            raise _damaged(path, f"{name[:80]!r} begins at byte {begin}, where {at} is expected")
        at = end
    if start + at != size:
        raise _damaged(path, f"{size - start - at} bytes belong to no tensor")
    if not found:
        raise _damaged(path, "it holds no tensors")
    return found


def _named(path: Path, tree: Any) -> Iterator[tuple[str, Any]]:
    """Yield the values of an object tree by their keys, joined by dots."""
    stack: list[tuple[str, Any, int]] = [("", tree, 0)]
    seen = 0
    while stack:
        prefix, value, depth = stack.pop()
        seen += 1
        if seen > _MAX_VALUES:
            raise CheckpointError(f"{path} holds more than {_MAX_VALUES:,} values; save the state dict alone")
        if isinstance(value, dict) and depth < _MAX_DEPTH:
            named = [(key, item) for key, item in value.items() if isinstance(key, str)]
            stack += [
                (f"{prefix}.{key}" if prefix else key, item, depth + 1) for key, item in reversed(named)
            ]
        else:
            yield prefix, value


def _tensors(path: Path, tree: Any) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name, value in _named(path, tree):
        if isinstance(value, torch.Tensor) and name:
            if name in found:
                raise CheckpointError(f"{path} has two tensors named {name!r}; save the state dict alone")
            found[name] = _checked(path, name, value)
    if not found:
        raise CheckpointError(f"{path} holds no named tensors; save a state dict, or name another file")
    return found


def _torch_archive(
    path: Path, form: str, tree: Any, file: FileIO | None, storages: Mapping[int, int]
) -> Archive:
    """Name the tensors of an object tree.

    Args:
        file: where their numbers are; None if the tensors have them.
        storages: place -> bytes of what a zip archive holds; empty for other forms.
    """
    tensors: dict[str, Stored] = {}
    for name, tensor in _tensors(path, tree).items():
        count = tensor.untyped_storage().nbytes()
        # A storage of another size than its member of the archive would be read from its neighbours.
        if storages and count != (storages[_place(tensor)] if file else count * (count in storages.values())):
            raise CheckpointError(
                f"{path} is damaged: {name} needs {count:,} bytes, which the archive does not hold so; copy it again"
            )
        tensors[name] = _placed(path, tensor, file) if file else MemoryTensor(tensor)
    values = {
        name: value for name, value in _named(path, tree) if isinstance(value, bool | int | float | str)
    }
    return Archive(path, form, tensors, values)


def _place(tensor: torch.Tensor) -> int:
    """Return where the storage of a tensor that was loaded without its numbers lies in the file, or -1."""
    place = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    return -1 if place is None else int(place)


def _checked(path: Path, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Refuse a tensor that is no plain table of numbers, or is larger than what is stored of it."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise CheckpointError(f"{path}: {name} is sparse or quantized; save it as a plain tensor")
    reach = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    stored = tensor.untyped_storage().nbytes() // tensor.dtype.itemsize
    if tensor.numel() and (tensor.numel() > reach or tensor.storage_offset() + reach > stored):
        raise CheckpointError(
            f"{path}: {name} has {tensor.numel():,} numbers of which fewer are stored; save it as a plain tensor"
        )
    return tensor.detach()


def _placed(path: Path, tensor: torch.Tensor, file: FileIO) -> Stored:
    place, start = _place(tensor), int(tensor.storage_offset())
    shape, width = tuple(tensor.shape), tensor.dtype.itemsize
    if tensor.is_contiguous():
        return FileTensor(path, file, tensor.dtype, shape, place + start * width)
    count = tensor.untyped_storage().nbytes() // width
    whole = FileTensor(path, file, tensor.dtype, (count,), place)
    return TransposedTensor(whole, shape, tensor.stride(), start)


@lru_cache(maxsize=1)
def _whole(stored: FileTensor) -> torch.Tensor:
    """Return all numbers of the tensor that is read now; its blocks come one after the other."""
    return stored.rows(0, stored.shape[0])


@dataclass(frozen=True)
class TransposedTensor:
    """A tensor that a torch file holds in another order of dims; read as a whole."""

    whole: FileTensor
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers."""
        return self.whole.dtype

    def rows(self, first: int, last: int) -> torch.Tensor:
        """See `Stored`."""
        flat = _whole(self.whole)
        return flat.as_strided(self.shape, self.stride, self.start)[first:last]
