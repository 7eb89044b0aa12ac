"""Byte ranges of many files, through a few open descriptors."""

import os
import threading
from collections import OrderedDict
from pathlib import Path


class OpenFiles:
    """Reads byte ranges; keeps the last `limit` files open. Threads may share one."""

    def __init__(self, limit: int = 32) -> None:
        self._limit = limit
        self._descriptors: OrderedDict[Path, int] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`, fewer only at the end of the file. Raises OSError."""
        parts: list[bytes] = []
        with self._lock:  # held while reading: another thread must not close the descriptor meanwhile
            descriptor = self._descriptor(path)
            while size > 0 and (part := os.pread(descriptor, size, offset)):
                parts.append(part)
                offset += len(part)
                size -= len(part)
        return b"".join(parts)

    def _descriptor(self, path: Path) -> int:
        descriptor = self._descriptors.pop(path, None)
        if descriptor is None:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        self._descriptors[path] = descriptor
        while len(self._descriptors) > self._limit:
            os.close(self._descriptors.popitem(last=False)[1])
        return descriptor

    def close(self) -> None:
        """Close all files; a later read opens them again."""
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> "OpenFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
