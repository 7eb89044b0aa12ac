"""Published weights into a weights folder: every name, shape and number is checked on the way."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # no stubs in the wheel
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from cogview2.pipeline import fsops
from cogview2.pipeline.errors import CheckpointError
from cogview2.pipeline.tokenizers.piece_ranges import range_of
from cogview2.pipeline.tokenizers.text import TextTokenizer
from cogview2.pipeline.tokenizers.vocabulary import CONTROL_PIECES, RANGE_NAMES, Vocabulary
from cogview2.pipeline.weights.archives import MemoryTensor, open_plain
from cogview2.pipeline.weights.blocks import Blocks
from cogview2.pipeline.weights.facts import (
    NETWORKS,
    Facts,
    Models,
    NetworkFacts,
    TextFacts,
    contradictions,
    data_sizes,
)
from cogview2.pipeline.weights.folder import CLUSTERS, WeightsFolder, alone, read_labels, update_facts
from cogview2.pipeline.weights.sizes import ANCHORS, Wishes, kind_of, sizes_of
from cogview2.pipeline.weights.sources import Source, open_source
from cogview2.pipeline.weights.writer import FLOATS, write_safetensors
from cogview2.pipeline.weights_manifest import MANIFEST, is_weights_folder

CLUSTER_KIND = "clusters"
AVERAGES = ("quantize.cluster_size", "quantize.embed_avg")
"""Training state of the VQVAE's codebook: no parameters, and not needed to encode or decode."""
_WORDS = "transformer.word_embeddings.weight"
_SHOWN = 5
_TEXT_MODEL_BYTES = 256 * 1024 * 1024
_ICETK_PIECES = 130_000
_ICETK_CODES = 20_000


@dataclass(frozen=True)
class Wanted:
    """The operator's options of an import."""

    config: Path | None = None
    heads: int | None = None
    rows: int | None = None
    dtype: torch.dtype | None = None
    strict: bool = False
    allow_nonfinite: bool = False
    replace: bool = False
    image_codes: int | None = None
    rate: Literal[4, 8, 16] | None = None


@dataclass
class Report:
    """What an import did, in words."""

    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def listed(names: list[str] | tuple[str, ...]) -> str:
    """Return the first names of a list, and how many more there are."""
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def count_parameters(shapes: dict[str, tuple[int, ...]]) -> int:
    """Return the number of parameters; the codebook's moving averages are none."""
    return sum(prod(shape) for name, shape in shapes.items() if name not in AVERAGES)


_FIRST_FILES = {f"{kind}.safetensors" for kind in NETWORKS} | {"icetk-text.model", CLUSTERS}
"""What an import may leave that was killed before its very first weights.json."""


_LEFT = re.compile(
    rf"\.tmp\.({'|'.join([*NETWORKS, 'icetk-text'])})(-2)?\.(safetensors|model)\.[0-9a-f]+"
    rf"|\.tmp\.({re.escape(CLUSTERS)}|{re.escape(MANIFEST)})\.[0-9a-f]+"
)
"""What a killed import leaves of a file that it was writing."""


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Make and hold a folder; if the body fails, what was made is gone again."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; name a folder for the imported weights")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with alone(folder):
        try:
            left = [path for path in folder.iterdir() if _LEFT.fullmatch(path.name)]
            others = {path.name for path in folder.iterdir()} - {path.name for path in left} - _FIRST_FILES
            if others and not is_weights_folder(folder):
                raise CheckpointError(f"{folder} is not empty and no weights folder; name another one")
            for path in left:  # nobody else writes while we hold the folder
                path.unlink(missing_ok=True)
            yield
        except BaseException:
            for path in made:
                if not any(path.iterdir()):
                    path.rmdir()
            raise


def import_weights(kind: str, source: Path, folder: Path, wanted: Wanted) -> Report:
    """Add one model, or the clusters of the image codes, to a weights folder, made if need be.

    A failure of any kind leaves the folder as it was.

    Args:
        kind: weights_manifest.KINDS, or CLUSTER_KIND.
        source: see `open_source`; for icetk-text the .model file, for clusters an .npy file.
        folder: where to.
        wanted: options.

    Raises:
        CheckpointError: a source or a folder that cannot be used.
        RunDirectoryError: full disk and the like.
    """
    with _held(folder):
        _refuse_second(kind, folder, wanted)
        if kind == CLUSTER_KIND:
            return _clusters(source, folder, wanted)
        if kind == "icetk-text":
            return _text(source, folder, wanted)
        return _network(kind, source, folder, wanted)


def _refuse_second(kind: str, folder: Path, wanted: Wanted) -> None:
    if not is_weights_folder(folder) or wanted.replace:
        return
    facts = WeightsFolder(folder).facts
    held = facts.clusters if kind == CLUSTER_KIND else facts.models.get(kind)
    if held is not None:
        raise CheckpointError(f"{folder} holds {kind} already; pass --replace to import another")


def _spelled(name: str) -> str:
    """Return a file name as text that every file can hold: names need not be valid Unicode."""
    return name.encode("utf-8", "backslashreplace").decode()


def _free_name(kind: str, suffix: str, folder: Path) -> str:
    """Return a file name that the folder's weights.json does not use, so that a kill harms nothing."""
    old = WeightsFolder(folder).facts.models.get(kind) if is_weights_folder(folder) else None
    names = (f"{kind}{suffix}", f"{kind}-2{suffix}")
    return names[1] if old is not None and old.file == names[0] else names[0]


def _commit(
    kind: str, folder: Path, name: str, wanted: Wanted, make: Callable[[Facts], TextFacts | NetworkFacts]
) -> Facts:
    """Enter a written file into weights.json; on failure the file goes, on success the one that it replaces."""
    replaced: list[str] = []

    def change(old: Facts) -> Facts:
        _refuse_second(kind, folder, wanted)
        earlier = old.models.get(kind)
        if earlier is not None and earlier.file != name:
            replaced.append(earlier.file)
        models = Models.model_validate(old.models.model_copy(update={kind.replace("-", "_"): make(old)}))
        rate = wanted.rate or old.data.compression_rate
        data = old.data.model_copy(update={"compression_rate": rate, "base_size": old.data.base_grid * rate})
        if kind in ("direct-sr", "iterative-sr") or (kind == "coglm" and earlier is None):
            data = data_sizes(models, rate)
        return old.model_copy(update={"models": models, "data": data})

    try:
        facts = update_facts(folder, change)
    except BaseException:
        (folder / name).unlink(missing_ok=True)
        raise
    for file in replaced:
        (folder / file).unlink(missing_ok=True)
    return facts


def _network(kind: str, path: Path, folder: Path, wanted: Wanted) -> Report:
    source = open_source(path, ANCHORS[kind], wanted.config)
    shapes = {name: source.blocks(name).shape for name in source.names}
    sizes = sizes_of(kind, shapes, source.known, Wishes(wanted.heads, wanted.rows), str(path))
    tensors, report = _fitting(kind, source, sizes.facts, wanted)
    report.lines += sizes.notes
    name = _free_name(kind, ".safetensors", folder)
    digest, size = write_safetensors(
        folder / name, tensors, wanted.dtype, allow_nonfinite=wanted.allow_nonfinite, where=str(path)
    )
    parameters = count_parameters({name: blocks.shape for name, blocks in tensors.items()})
    dtypes = [wanted.dtype or blocks.dtype for blocks in tensors.values()]
    entry = sizes.facts.model_copy(
        update={
            "file": name,
            "sha256": digest,
            "bytes": size,
            "dtype": str(max(set(dtypes), key=dtypes.count)).removeprefix("torch."),
            "parameters": parameters,
            "source": f"{_spelled(path.name)} ({source.form})",
            "iteration": source.iteration,
        }
    )
    facts = _commit(kind, folder, name, wanted, lambda _: entry)
    report.lines.append(
        f"{kind}: {parameters:,} parameters, {entry.dtype}, {size:,} bytes -> {folder / name}"
    )
    report.warnings += [f"{problem}: this folder cannot draw yet" for problem in contradictions(facts.models)]
    return report


def _fitting(
    kind: str, source: Source, facts: NetworkFacts, wanted: Wanted
) -> tuple[dict[str, Blocks], Report]:
    """Return exactly the tensors that the model has, after a look at every name, shape and dtype."""
    report, where = Report(), str(source.path)
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in facts.build().state_dict().items()}
    missing = [name for name in expected if name not in source.names]
    if kind == "icetk-image" and missing and set(missing) <= set(AVERAGES):
        report.lines.append(
            f"{listed(missing)}: not in the source (training state of the codebook, not needed to encode or "
            "decode); started afresh from the codes"
        )
        missing = []
    if missing:
        guess = kind_of(set(source.names))
        hint = f"; it looks like a {guess}" if guess not in (None, kind) else ""
        raise CheckpointError(
            f"{where} lacks {len(missing):,} of the {len(expected):,} tensors of a {kind}: {listed(missing)}{hint}"
        )
    unexpected = [name for name in source.names if name not in expected]
    if unexpected:
        text = f"{where} has {len(unexpected):,} tensors that no {kind} has: {listed(unexpected)}"
        if wanted.strict:
            raise CheckpointError(f"{text}; import without --strict to leave them out")
        report.warnings.append(f"{text}; left out")
    if source.ignored:
        report.lines.append(f"ignored, not of the model: {listed(source.ignored)}")
    tensors, problems = {}, []
    for name, shape in expected.items():
        if name not in source.names:
            tensors[name] = _afresh(name, source)
            continue
        blocks = source.blocks(name)
        rows = shape[0] if name == _WORDS else None
        if rows is not None and len(blocks.shape) == 2 and blocks.shape[0] > rows:
            blocks = blocks.first_rows(rows)
        if blocks.dtype not in FLOATS:
            problems.append(
                f"{name} is {str(blocks.dtype).removeprefix('torch.')}, not a floating-point number"
            )
        elif blocks.shape != shape:
            problems.append(f"{name} has the shape {blocks.shape} instead of {shape}")
        tensors[name] = blocks
    if problems:
        raise CheckpointError(
            f"{where} is no {kind}: {'; '.join(problems[:_SHOWN])} ({len(problems)} in all)"
        )
    return tensors, report


def _afresh(name: str, source: Source) -> Blocks:
    """Return a moving average of the codebook as after one use of every code: the average is the code itself."""
    codes = source.blocks(ANCHORS["icetk-image"])
    if name == AVERAGES[0]:
        return Blocks.of(MemoryTensor(torch.ones(codes.shape[0], dtype=codes.dtype)))
    return codes


def _clusters(source: Path, folder: Path, wanted: Wanted) -> Report:
    image = WeightsFolder(folder).facts.models.icetk_image if is_weights_folder(folder) else None
    labels = read_labels(source, None if image is None else image.config.codebook_size)
    with fsops.staged(folder / CLUSTERS) as temporary, open(temporary, "xb") as file:
        np.save(file, labels, allow_pickle=False)
    update_facts(folder, lambda old: old.model_copy(update={"clusters": CLUSTERS}))
    count = len(np.unique(labels))
    return Report([f"clusters: {labels.size:,} codes in {count:,} clusters -> {folder / CLUSTERS}"])


def _text(source: Path, folder: Path, wanted: Wanted) -> Report:
    with open_plain(source) as file:
        data = file.read(_TEXT_MODEL_BYTES + 1)
    if len(data) > _TEXT_MODEL_BYTES or not data:
        raise CheckpointError(f"{source} has {len(data):,} bytes or more, which is no SentencePiece model")
    models = WeightsFolder(folder).facts.models if is_weights_folder(folder) else Models()
    codes = wanted.image_codes or _ICETK_CODES
    if wanted.image_codes is None and models.icetk_image is not None:
        codes = models.icetk_image.config.codebook_size
    vocabulary = id_layout(data, codes, str(source))
    try:
        TextTokenizer.from_bytes(data, vocabulary)
    except (RuntimeError, ValueError) as error:  # the library's own checks
        raise CheckpointError(f"{source} is no SentencePiece model that works ({str(error)[:80]})") from error
    name = _free_name("icetk-text", ".model", folder)
    fsops.write_bytes(folder / name, data)
    entry = TextFacts(
        file=name,
        sha256=fsops.sha256_file(folder / name),
        bytes=len(data),
        source=_spelled(source.name),
        vocabulary=vocabulary,
    )
    facts = _commit("icetk-text", folder, name, wanted, lambda _: entry)
    ranges = ", ".join(
        f"{part} [{getattr(vocabulary, part)[0]:,}, {getattr(vocabulary, part)[1]:,})" for part in RANGE_NAMES
    )
    report = Report([f"icetk-text: {vocabulary.text_pieces:,} pieces, ids {ranges} -> {folder / name}"])
    report.warnings += [f"{problem}: this folder cannot draw yet" for problem in contradictions(facts.models)]
    return report


def id_layout(model: bytes, image_codes: int, where: str) -> Vocabulary:
    """Return the id layout of a SentencePiece model: the published one, or ranges read off its pieces.

    Args:
        model: content of the .model file.
        image_codes: codes before the first text id.
        where: the source, for messages.

    Raises:
        CheckpointError: not such a model.
    """
    try:
        pieces = [piece.piece for piece in model_pb2.ModelProto.FromString(model).pieces]
        if not all(isinstance(piece, str) for piece in pieces):
            raise DecodeError("a piece is no text")
    except DecodeError as error:
        raise CheckpointError(f"{where} is not a SentencePiece model; name the .model file") from error
    if len(pieces) <= len(CONTROL_PIECES):
        raise CheckpointError(
            f"{where} has {len(pieces)} pieces, which is no text tokenizer; name the .model file"
        )
    if len(pieces) == _ICETK_PIECES and image_codes == _ICETK_CODES:
        return Vocabulary.icetk()
    return Vocabulary.from_counts(image_codes, _best_cut(pieces))


def _best_cut(pieces: list[str]) -> tuple[int, int, int, int]:
    """Cut the pieces into four ranges in order, so that as few as possible are of another range by themselves."""
    wishes = [RANGE_NAMES.index(range_of(piece)) for piece in pieces]
    wishes[: len(CONTROL_PIECES)] = [0] * len(CONTROL_PIECES)
    # best[k]: fewest misfits with the pieces so far in ranges 0..k, the last one in k; starts[k]: the cuts.
    best, starts = [0, 0, 0, 0], [(0, 0, 0), (0, 0, 0), (0, 0, 0), (0, 0, 0)]
    for index, wish in enumerate(wishes):
        for k in (3, 2, 1):
            low = min(range(k + 1), key=lambda j: (best[j], -j))
            if low != k:
                cuts = list(starts[low])
                cuts[low:k] = [index] * (k - low)
                best[k], starts[k] = best[low], (cuts[0], cuts[1], cuts[2])
        best = [count + (wish != k) for k, count in enumerate(best)]
        if index < len(CONTROL_PIECES):
            best = [0, *[len(pieces)] * 3]
    end = min(range(4), key=lambda k: best[k])
    cuts = list(starts[end])
    cuts[end:] = [len(pieces)] * (3 - end)
    edges = [0, *cuts, len(pieces)]
    counts = [last - first for first, last in zip(edges, edges[1:], strict=False)]
    return counts[0], counts[1], counts[2], counts[3]
