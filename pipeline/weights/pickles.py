"""Torch files of strangers: every global is looked at first, tensors alone are loaded, all else stays inert.

Published archives hold more than weights: random number states of Python, NumPy (under module names of old
versions) and torch, and DeepSpeed's own objects. The globals behind these are known by name and stand for
objects that do nothing; any other global refuses the file.
"""

import io
import os
import pickletools
import sys
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from cogview2.pipeline.errors import CheckpointError

_PICKLE_BYTES = 64 * 1024 * 1024
"""The object tree of a model of 48 layers takes 0.1 MB."""
_ENTRIES = 1_000_000
_DIRECTORY_BYTES = 256 * 1024 * 1024
_ZIP_TAIL = 22 + 65535
_STORAGES = ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool")
_LOADED = frozenset(
    [
        "collections.OrderedDict",
        "builtins.set",
        "_codecs.encode",  # how pickle protocol 2 writes bytes
        "torch.Size",
        "torch.device",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        *(f"torch.{name}Storage" for name in _STORAGES),
        *(
            f"torch.{name}"
            for name in ("float16", "bfloat16", "float32", "float64", "int64", "int32", "uint8")
        ),
    ]
)
"""Globals that torch's own weights_only loader builds: tensors and plain containers."""
_INERT = (
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.ndarray",
    "numpy.dtype",
    "argparse.Namespace",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""Globals of training states that are let in as objects that do nothing."""
_BYTES_CODECS = frozenset(
    "hex hex_codec base64 base64_codec base_64 bz2 bz2_codec zip zlib zlib_codec zip_codec quopri quopri_codec "
    "quotedprintable quoted_printable uu uu_codec".split()
)
"""Codecs from bytes to bytes: nested calls of `_codecs.encode` would blow a few bytes up to any size."""
_LEGACY_PICKLES = 5
"""Magic number, protocol, system, object tree, storage keys."""
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class Inert:
    """Stands for an object whose class is not wanted: swallows whatever would build it."""

    def __new__(cls, *_: Any, **__: Any) -> "Inert":
        """Ignore the arguments."""
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        """Ignore the arguments."""

    def __setstate__(self, _: Any) -> None:
        """Ignore the state."""


def globals_of(stream: BinaryIO, strings: list[str] | None = None) -> Iterator[str]:
    """Yield `module.name` of every global that one pickle of `stream` would look up; nothing is built.

    Args:
        stream: of pickles.
        strings: gets every string of the pickle.

    Raises:
        ValueError: not a whole pickle.
    """
    strings = [] if strings is None else strings
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in ("GLOBAL", "INST"):
            module, _, name = str(argument).partition(" ")
            # Protocol 2 writes the names of Python 2; the loader turns them back in the same way.
            renamed = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
            yield ".".join(renamed)
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(strings[-2:]) or "a global without a name"
        elif opcode.name.startswith("EXT"):
            yield f"copyreg extension {argument}"
        elif isinstance(argument, str):
            strings.append(argument)


def _check_globals(path: Path, stream: BinaryIO) -> None:
    strings: list[str] = []
    names = list(globals_of(stream, strings))
    if "_codecs.encode" in names and any(_codec(text) in _BYTES_CODECS for text in strings):
        raise CheckpointError(
            f"{path} encodes bytes in a way that weights never do, so it is refused; save the state dict alone"
        )
    for name in names:
        if name not in _LOADED and name not in _INERT:
            raise CheckpointError(
                f"{path} asks for {name}, which is no part of weights, so it is refused and nothing in it was "
                "executed; save the state dict alone, best as .safetensors"
            )


def _codec(text: str) -> str:
    return text.lower().replace("-", "_").replace(" ", "_")


def _damaged(path: Path, why: object) -> CheckpointError:
    text = str(why).strip().splitlines()
    reason = text[0] if text else ""
    if not reason or "weights_only" in reason or "safe_globals" in reason or len(reason) > 160:
        reason = type(why).__name__  # torch's own text may advise to load without protection
    return CheckpointError(
        f"{path} is damaged or no torch file of tensors ({reason}); nothing in it was executed; copy it again"
    )


def _directory_bytes(file: BinaryIO) -> int:
    """Return the size of the zip file's list of members, from its last record: it is read as a whole."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _ZIP_TAIL))
    tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < 22:
        raise ValueError("the end of the zip archive is missing")
    length = int.from_bytes(tail[at + 12 : at + 16], "little")
    at64 = tail.rfind(b"PK\x06\x06", 0, at)
    if length == 0xFFFFFFFF and at64 >= 0:
        length = int.from_bytes(tail[at64 + 40 : at64 + 48], "little")
    return length


def _zip_members(path: Path, file: BinaryIO) -> dict[int, int]:
    """Check the zip archive's list of members and the pickle; return offset -> size of each storage's bytes."""
    if _directory_bytes(file) > _DIRECTORY_BYTES:
        raise ValueError("its list of members is too long")
    size = file.seek(0, os.SEEK_END)
    storages = {}
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        if len(members) != len(archive.infolist()):
            raise ValueError("two members have one name")
        if len(members) > _ENTRIES:
            raise ValueError(f"it has {len(members)} members")
        pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"it holds {len(pickles)} object trees (data.pkl) instead of one")
        root = pickles[0].removesuffix("data.pkl")
        if any(name.endswith("/constants.pkl") or name.startswith(f"{root}code/") for name in members):
            raise ValueError("it is a TorchScript program, not weights")
        for name, info in members.items():
            parts = name.split("/")
            if name.startswith("/") or ".." in parts or "\\" in name or not name.startswith(root):
                raise ValueError(f"the member {name[:80]!r} lies outside")
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise ValueError(f"the member {name[:80]!r} is compressed, which torch never does")
            if info.header_offset + 30 + info.file_size > size:
                raise ValueError(f"the member {name[:80]!r} reaches past the end")
            if name.startswith(f"{root}data/"):
                storages[_data_offset(file, info.header_offset)] = info.file_size
        order = members.get(f"{root}byteorder")
        if order is not None and (
            order.file_size > 16 or archive.read(order).decode(errors="replace") != sys.byteorder
        ):
            raise ValueError("its numbers have the byte order of another machine")
        if members[pickles[0]].file_size > _PICKLE_BYTES:
            raise ValueError("its object tree is too large")
        tree = archive.read(pickles[0])
    _check_globals(path, io.BytesIO(tree))
    return storages


def _data_offset(file: BinaryIO, header: int) -> int:
    file.seek(header)
    local = file.read(30)
    if len(local) < 30 or local[:4] != b"PK\x03\x04":
        raise ValueError("a member has no header")
    return header + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")


def _load(file: BinaryIO | Path, device: str, mmap: bool = False) -> Any:
    with torch.serialization.safe_globals([(Inert, name) for name in _INERT]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(file, map_location=device, weights_only=True, mmap=mmap)


def load_zip(path: Path, file: BinaryIO) -> tuple[Any, dict[int, int]]:
    """Read the object tree of a torch zip archive, the tensors without their numbers.

    Args:
        path: for messages.
        file: opened for reading.

    Returns:
        The tree, its tensors on the meta device, each with the place of its storage in the file as
        `tensor.untyped_storage()._checkpoint_offset`; and place -> bytes of each storage that the file holds.

    Raises:
        CheckpointError: damaged, or it asks for anything but tensors and known training states.
    """
    try:
        storages = _zip_members(path, file)
        file.seek(0)
        return _load(file, "meta"), storages
    except CheckpointError:
        raise
    except Exception as error:  # a broken or hostile file fails in many ways
        raise _damaged(path, error) from error


def map_zip(path: Path) -> Any:
    """Return the object tree of a torch zip archive that `load_zip` has looked through, its tensors mapped.

    Raises:
        CheckpointError: damaged.
    """
    try:
        return _load(path, "cpu", mmap=True)
    except Exception as error:  # as above
        raise _damaged(path, error) from error


def load_legacy(path: Path, file: BinaryIO) -> Any:
    """Read a torch file of the form before 1.6, which is no zip archive; the whole file goes into memory.

    Raises:
        CheckpointError: as for `load_zip`.
    """
    try:
        file.seek(0)
        head = io.BytesIO(file.read(_PICKLE_BYTES))
        for index in range(_LEGACY_PICKLES):
            start = head.tell()
            _check_globals(path, head)
            if index == 0 and _first_number(head.getvalue()[start : head.tell()]) != _LEGACY_MAGIC:
                raise ValueError("a plain pickle")
        file.seek(0)
        return _load(file, "cpu")
    except CheckpointError:
        raise
    except Exception as error:  # as above
        raise _damaged(path, error) from error


def _first_number(pickle: bytes) -> object:
    return next(
        (argument for opcode, argument, _ in pickletools.genops(pickle) if "LONG" in opcode.name), None
    )
