"""Writes .safetensors files tensor by tensor, in blocks, so that no second copy of a model is ever in memory.

The library's own writer wants all tensors at once; the format is 8 bytes of length, a JSON header, and the
numbers. Equal tensors give the bytes that the library gives.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch

from cogview2.pipeline import fsops
from cogview2.pipeline.errors import CheckpointError

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Dtypes that weights may have."""
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What files call the dtypes that can be written."""
_ORDER = (
    *(torch.int64, torch.float64, torch.float32, torch.int32),
    *(torch.bfloat16, torch.float16, torch.uint8, torch.bool),
)
"""The library's order among dtypes of one width."""


class Written(Protocol):
    """A tensor that comes in pieces."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> torch.dtype:
        """Its type."""

    def chunks(self) -> Iterator[torch.Tensor]:
        """Yield its numbers, contiguous, on the CPU."""


class _Hash(Protocol):
    def update(self, data: memoryview | bytes, /) -> None: ...


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Written],
    dtype: torch.dtype | None,
    *,
    allow_nonfinite: bool,
    where: str,
    metadata: Mapping[str, str] | None = None,
) -> tuple[str, int]:
    """Write tensors under the final name `path`, whole or not at all.

    Args:
        path: the file; its folder exists.
        tensors: by name.
        dtype: of the written numbers; by default each tensor keeps its own.
        allow_nonfinite: let infinite numbers and not-a-numbers pass.
        where: the source, for messages.
        metadata: further words for the header.

    Returns:
        sha256 and size of the file.

    Raises:
        CheckpointError: a number is not finite in the written dtype.
        RunDirectoryError: full disk and the like.
    """
    kinds = {name: dtype or blocks.dtype for name, blocks in tensors.items()}
    # The library's order: wide numbers first, so that all are aligned, then by name.
    order = sorted(tensors, key=lambda name: (-kinds[name].itemsize, _rank(kinds[name]), name))
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    at = 0
    for name in order:
        count = math.prod(tensors[name].shape) * kinds[name].itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[kinds[name]],
            "shape": list(tensors[name].shape),
            "data_offsets": [at, at + count],
        }
        at += count
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with fsops.staged(path) as temporary, open(temporary, "xb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            _write(file, digest, part)
        for name in order:
            for chunk in tensors[name].chunks():
                chunk = chunk.to(kinds[name])
                if not allow_nonfinite and not _is_finite(chunk):
                    raise CheckpointError(
                        f"{where}: {name} holds numbers that are not finite as {DTYPE_NAMES[kinds[name]]}; check how the "
                        "weights were made, or pass --allow-nonfinite"
                    )
                _write(file, digest, chunk.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest(), 8 + len(text) + at


def _write(file: BinaryIO, digest: _Hash, data: memoryview | bytes) -> None:
    file.write(data)
    digest.update(data)


def _is_finite(chunk: torch.Tensor) -> bool:
    """Return whether all numbers are finite; by their extremes, which takes a tenth of the time of looking at each."""
    if not chunk.is_floating_point() or chunk.numel() == 0:
        return True
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(chunk))


def _rank(dtype: torch.dtype) -> int:
    return _ORDER.index(dtype)
