"""weights.json of a weights folder, read without torch: what the launcher asks of a folder (docs/weights.md)."""

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cogview2.pipeline.errors import CheckpointError

MANIFEST = "weights.json"
FORMAT = 1
KINDS = ("icetk-text", "icetk-image", "coglm", "direct-sr", "iterative-sr")
"""Models that a folder can hold, in the order of the cascade."""
_MANIFEST_BYTES = 4 * 1024 * 1024


def is_weights_folder(path: Path) -> bool:
    """Return whether `path` is a folder with a weights.json."""
    return (Path(path) / MANIFEST).is_file()


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the content of the folder's weights.json; only its outer form is checked.

    Raises:
        CheckpointError: there is none, or it is not of this format.
    """
    file = Path(path) / MANIFEST
    try:
        with open(file, "rb") as opened:
            data = opened.read(_MANIFEST_BYTES + 1)
        if len(data) > _MANIFEST_BYTES:
            raise ValueError(f"larger than {_MANIFEST_BYTES} bytes")
        found = json.loads(data)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{path} is no weights folder: it has no {MANIFEST}; make one with cogview2 weights import"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); import the weights again") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        form = found.get("format") if isinstance(found, dict) else None
        raise CheckpointError(
            f"{file} has format {form!r}, but this version reads format {FORMAT}; import the weights again"
        )
    models = found.get("models")
    if not isinstance(models, dict) or not all(isinstance(entry, dict) for entry in models.values()):
        raise CheckpointError(f"{file} has no table of models; import the weights again")
    return found


def checked_file(path: Path, kind: str, entry: dict[str, Any]) -> Path:
    """Return the file of the model `kind` in the folder `path`: a regular file of the recorded size, inside it.

    Raises:
        CheckpointError: it is gone, not a plain file or of another size.
    """
    name, size = entry.get("file"), entry.get("bytes")
    if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
        raise CheckpointError(
            f"{Path(path) / MANIFEST} names {name!r} as the file of {kind}; import it again"
        )
    file = Path(path) / name
    try:
        found = os.stat(file)
    except OSError as error:
        raise CheckpointError(f"{file} is missing, the weights of {kind}; import them again") from error
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{file} is not a plain file; copy the weights of {kind} there")
    if found.st_size != size:
        raise CheckpointError(
            f"{file} has {found.st_size} bytes, but {MANIFEST} records {size}; copy it again, or import it again"
        )
    return file


def digests(path: Path, kinds: Sequence[str]) -> dict[str, str]:
    """Return the recorded sha256 of the folder's models, after a look at the size of each file.

    Args:
        path: a weights folder.
        kinds: which models are needed, see `KINDS`.

    Raises:
        CheckpointError: no weights folder, a kind that it lacks, or a file that is gone or of another size.
    """
    models = read_manifest(path)["models"]
    found = {}
    for kind in kinds:
        if kind not in models:
            have = ", ".join(sorted(models)) or "nothing"
            raise CheckpointError(
                f"{path} holds no {kind} (it holds {have}); add it: cogview2 weights import --kind {kind} SRC {path}"
            )
        digest = models[kind].get("sha256")
        if not isinstance(digest, str):
            raise CheckpointError(f"{Path(path) / MANIFEST} has no sha256 of {kind}; import it again")
        checked_file(path, kind, models[kind])
        found[kind] = digest
    return found
