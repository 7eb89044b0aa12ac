"""Pictures that people name on the command line: opened with care, written with the facts of their making."""

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cogview2.pipeline import fsops
from cogview2.pipeline.command_line import run_command
from cogview2.pipeline.config.data import ImageRulesConfig
from cogview2.pipeline.data.images import open_image
from cogview2.pipeline.data.records import RefusedError
from cogview2.pipeline.errors import DataError, ExitCode

RULES = ImageRulesConfig()
"""The default limits of recipes."""
Refuse = Callable[[DataError], None]
"""Told why a picture cannot be used; the others go on."""


def open_picture(path: Path) -> Image.Image:
    """Return a picture file as upright RGB; transparency becomes white.

    Raises:
        DataError: not a readable file, or not a usable picture, with its path.
    """
    try:
        if not path.is_file():
            raise DataError(f"{path} is not a file; name a picture")
        with open(path, "rb") as file:
            data = file.read(RULES.max_file_bytes + 1)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    try:
        return open_image(data, RULES, min_side=1)
    except RefusedError as error:
        raise DataError(f"{path} cannot be used: {error}; copy it again or choose another picture") from error


def usable_batches(
    paths: Sequence[Path], batch: int, refuse: Refuse
) -> Iterator[tuple[list[Path], list[Image.Image]]]:
    """Open pictures, at most `batch` at a time, and yield those that can be used.

    Args:
        paths: of the pictures.
        batch: most pictures in memory.
        refuse: told why one cannot be used; the others go on.
    """
    for start in range(0, len(paths), batch):
        kept: list[Path] = []
        pictures: list[Image.Image] = []
        for path in paths[start : start + batch]:
            try:
                pictures.append(open_picture(path))
                kept.append(path)
            except DataError as error:
                refuse(error)
        if kept:
            yield kept, pictures


def run_on_pictures(name: str, work: Callable[[Refuse], None]) -> int:
    """Do the work of `cogview2 name`, and return its exit code (see run_command): 78 if any picture was refused."""
    refused: list[DataError] = []

    def refuse(error: DataError) -> None:
        refused.append(error)
        print(f"cogview2 {name}: {error}", file=sys.stderr)

    def whole() -> ExitCode:
        work(refuse)
        return ExitCode.REFUSED if refused else ExitCode.DONE

    return run_command(name, whole)


def write_png(path: Path, picture: Image.Image, facts: dict[str, str]) -> Path:
    """Write a PNG that carries `facts` as text, and return its path."""
    info = PngInfo()
    for key, value in facts.items():
        info.add_itxt(key, value)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=info)
    fsops.write_bytes(path, buffer.getvalue())
    return path
