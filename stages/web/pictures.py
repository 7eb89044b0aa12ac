"""Drawn and uploaded pictures as PNG, in memory only, each under a name that nobody can guess."""

import io
import secrets
import threading
from collections import OrderedDict
from collections.abc import Mapping

from PIL import Image
from PIL.PngImagePlugin import PngInfo

MOST_BYTES = 256 * 1024 * 1024


def encode(picture: Image.Image, facts: Mapping[str, str]) -> bytes:
    """Return the PNG of `picture`, with `facts` as text inside."""
    info = PngInfo()
    for key, value in facts.items():
        info.add_itxt(key, value)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


class PictureStore:
    """Files by random name; beyond a number of bytes the ones that were not read for longest are dropped."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._files: OrderedDict[str, bytes] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def add(self, data: bytes) -> str:
        """Keep a file and return its name."""
        name = secrets.token_urlsafe(16)
        with self._lock:
            self._files[name] = data
            self._bytes += len(data)
            while self._bytes > self._most_bytes and len(self._files) > 1:
                self._bytes -= len(self._files.popitem(last=False)[1])
        return name

    def get(self, name: str) -> bytes | None:
        """Return a file, or None if there is none of that name any more."""
        with self._lock:
            if name in self._files:
                self._files.move_to_end(name)
            return self._files.get(name)
