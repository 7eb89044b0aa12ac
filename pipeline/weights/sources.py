"""Where published weights come from: a file, tensor-parallel parts of a training directory, or shards (spec 10)."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cogview2.pipeline.errors import CheckpointError
from cogview2.pipeline.weights.archives import Archive, Stored, open_archive, open_plain
from cogview2.pipeline.weights.blocks import Blocks, merge

LATEST = "latest"
MODEL_CONFIG = "model_config.json"
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_PART = re.compile(r"mp_rank_(\d{2,5})_model_states\.pt")
_ITERATION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
INDEX = ".index.json"
"""Ending of a file that spreads tensors over several files."""
_JSON_BYTES = 64 * 1024 * 1024
_PREFERRED = ("module.", "model.", "state_dict.", "state/", "")
"""What may stand before the published names, the likeliest first."""


@dataclass
class Source:
    """Tensors by published name, put together from all parts when they are read."""

    path: Path
    form: str
    known: dict[str, Any]
    """The JSON beside the weights."""
    iteration: int | None
    names: tuple[str, ...]
    ignored: tuple[str, ...]
    """Tensors outside of the model's prefix."""
    parts: tuple[dict[str, Stored], ...]
    _blocks: dict[str, Blocks] = field(default_factory=dict)

    def blocks(self, name: str) -> Blocks:
        """Return the tensor `name`.

        Raises:
            CheckpointError: the parts do not fit together.
        """
        if name not in self._blocks:
            self._blocks[name] = merge(name, [part[name] for part in self.parts], str(self.path))
        return self._blocks[name]


def read_json(path: Path) -> dict[str, Any]:
    """Return the table in a JSON file of a stranger.

    Raises:
        CheckpointError: missing, too long, or no table.
    """
    with open_plain(path) as file:
        data = file.read(_JSON_BYTES + 1)
    try:
        if len(data) > _JSON_BYTES:
            raise ValueError("too long")
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not JSON ({str(error)[:80]}); repair it, or pass --config"
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{path} holds a {type(found).__name__}, not a table; repair it, or pass --config"
        )
    return found


def _latest(folder: Path) -> Path:
    """Return the folder of the iteration that `latest` names."""
    with open_plain(folder / LATEST) as file:
        text = file.read(4096).decode("utf-8", errors="replace").strip()
    if not _ITERATION.fullmatch(text):
        raise CheckpointError(
            f"{folder / LATEST} names {text[:80]!r}, which is no iteration; write its number there"
        )
    found = folder / text
    if not found.is_dir():
        raise CheckpointError(
            f"{folder / LATEST} names iteration {text}, but {found} is no folder; copy it again"
        )
    return found


def _ranks(folder: Path) -> list[Path]:
    """Return the tensor-parallel parts in a folder, rank 0 first; none if there are none."""
    found = {int(match[1]): path for path in folder.iterdir() if (match := _PART.fullmatch(path.name))}
    missing = [rank for rank in range(max(found, default=-1) + 1) if rank not in found]
    if missing:
        raise CheckpointError(
            f"{folder} has parts up to rank {max(found)}, but none of rank {missing[0]}; copy the missing parts"
        )
    return [found[rank] for rank in sorted(found)]


def _shards(index: Path) -> Archive:
    """Return the tensors that an index file spreads over several files of its folder, as one archive."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{index} has no weight_map; copy it again")
    archives: dict[str, Archive] = {}
    tensors = {}
    for name, file in table.items():
        if not isinstance(file, str) or "/" in file or "\\" in file or file in ("", ".", ".."):
            raise CheckpointError(f"{index} sends {name[:80]} to {str(file)[:80]!r}, outside of its folder")
        if file not in archives:
            archives[file] = open_archive(index.parent / file)
        if name not in archives[file].tensors:
            raise CheckpointError(f"{index.parent / file} lacks {name}, which {index.name} says it holds")
        tensors[name] = archives[file].tensors[name]
    return Archive(index, f"{len(archives)} shards", tensors, {})


def _in_folder(folder: Path) -> tuple[list[Archive], int | None, list[Path]]:
    """Return the parts in a folder, the iteration, and where a model_config.json may lie."""
    if (folder / LATEST).exists() or (folder / LATEST).is_symlink():
        inner = _latest(folder)
        ranks = _ranks(inner)
        if not ranks:
            raise CheckpointError(f"{inner} has no mp_rank_00_model_states.pt; copy the checkpoint again")
        return [open_archive(path) for path in ranks], _digits(inner.name), [folder, inner]
    ranks = _ranks(folder)
    if ranks:
        return [open_archive(path) for path in ranks], _digits(folder.name), [folder, folder.parent]
    indices = sorted(folder.glob(f"*{INDEX}"))
    if len(indices) == 1:
        return [_shards(indices[0])], None, [folder]
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    if len(files) == 1:
        return [open_archive(files[0])], None, [folder]
    raise CheckpointError(
        f"{folder} is no checkpoint: it has neither {LATEST} nor mp_rank_00_model_states.pt nor one file of "
        f"weights ({len(files)} files, {len(indices)} indices); name the file"
    )


def _digits(name: str) -> int | None:
    match = re.search(r"(\d{1,12})$", name)
    return int(match[1]) if match else None


def _known(path: Path, folders: Sequence[Path], config: Path | None) -> dict[str, Any]:
    """Return the JSON that tells the sizes: the one given, or <stem>.json, or model_config.json beside."""
    if config is not None:
        return read_json(config)
    candidates = [path.with_suffix(".json")] if path.is_file() else []
    candidates += [folder / MODEL_CONFIG for folder in folders]
    for candidate in candidates:
        if candidate.is_file() and not candidate.name.endswith(INDEX):
            return read_json(candidate)
    return {}


def open_source(path: Path, anchor: str, config: Path | None = None) -> Source:
    """Open published weights; nothing but headers and object trees is read.

    Args:
        path: a file, the directory of a training, that of one iteration, or one with shards.
        anchor: a published name that the model has; what stands before it is taken off all names.
        config: the JSON with the sizes, where it does not lie beside.

    Raises:
        CheckpointError: not such a thing, damaged or hostile.
    """
    path = Path(path)
    if path.is_dir():
        path = path.resolve()
        archives, iteration, folders = _in_folder(path)
    elif path.name.endswith(INDEX):
        archives, iteration, folders = [_shards(path)], None, [path.parent]
    else:
        archives, iteration, folders = [open_archive(path)], None, [path.parent]
    known = _known(archives[0].path if len(archives) == 1 else path, folders, config)
    claimed = known.get("model_parallel_size")
    if len(archives) > 1 and type(claimed) is int and claimed > len(archives):
        raise CheckpointError(
            f"{path} has {len(archives)} of the {claimed} tensor-parallel parts that its JSON names; copy the missing parts"
        )
    prefix = _prefix(set(archives[0].tensors), anchor, path)
    parts: list[dict[str, Stored]] = []
    for archive in archives:
        part = {
            name.removeprefix(prefix): value
            for name, value in archive.tensors.items()
            if name.startswith(prefix)
        }
        if parts and part.keys() != parts[0].keys():
            other = sorted(part.keys() ^ parts[0].keys())[0]
            raise CheckpointError(
                f"{archive.path} and {archives[0].path} differ in {other}; the parts are not of one model"
            )
        parts.append(part)
    first = archives[0]
    if iteration is None and type(first.values.get("iteration")) is int:
        iteration = first.values["iteration"]
    form = first.form if len(parts) == 1 else f"{first.form}, {len(parts)} tensor-parallel parts"
    ignored = tuple(name for name in first.tensors if not name.startswith(prefix))
    return Source(path, form, known, iteration, tuple(parts[0]), ignored, tuple(parts))


def _prefix(names: set[str], anchor: str, path: Path) -> str:
    """Return what stands before the published names."""
    found = {name.removesuffix(anchor) for name in names if name.endswith(anchor)}
    found = {prefix for prefix in found if not prefix or prefix[-1] in "./"}
    for prefix in (*_PREFERRED, *sorted(found) * (len(found) == 1)):
        if prefix in found:
            return prefix
    if found:
        raise CheckpointError(
            f"{path} holds several models, under {', '.join(sorted(found)[:5])}; save the one that is meant alone"
        )
    shown = ", ".join(sorted(names)[:3])
    raise CheckpointError(
        f"{path} lacks {anchor} (it has {shown}, ... {len(names)} in all); is it another --kind?"
    )
