"""`cogview2 weights import|export|bundle|show`: published weights in, and out again (docs/weights.md)."""

import argparse
import re
import sys
from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np
import torch

from cogview2.pipeline import fsops
from cogview2.pipeline.command_line import Parser, printable, run_command
from cogview2.pipeline.errors import CheckpointError, ExitCode
from cogview2.pipeline.weights.archives import open_archive
from cogview2.pipeline.weights.bundle import write_bundle
from cogview2.pipeline.weights.card import sizes_in_words
from cogview2.pipeline.weights.collection import Collection, open_collection
from cogview2.pipeline.weights.exporting import export_weights
from cogview2.pipeline.weights.importing import CLUSTER_KIND, Wanted, count_parameters, import_weights
from cogview2.pipeline.weights.sizes import ANCHORS, kind_of
from cogview2.pipeline.weights.sources import INDEX, open_source
from cogview2.pipeline.weights_manifest import KINDS, is_weights_folder
from cogview2.stages._loading import cluster_labels, open_models

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="cogview2 weights", description="Published weights in, and out again.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    add = commands.add_parser("import", help="add a published model to a weights folder")
    add.add_argument("source", metavar="SRC", type=Path, help="file, training directory, or folder of shards")
    add.add_argument("target", metavar="DST", type=Path, help="weights folder, made if need be")
    add.add_argument("--kind", required=True, choices=(*KINDS, CLUSTER_KIND), help="what SRC is")
    add.add_argument("--config", type=Path, metavar="FILE", help="JSON with the sizes, if not beside SRC")
    add.add_argument("--heads", type=int, metavar="N", help="attention heads, which no tensor tells")
    add.add_argument(
        "--rows", type=int, metavar="N", help="rows of the vocabulary; those after it are cut off"
    )
    add.add_argument("--dtype", choices=_DTYPES, help="cast to it (default: keep)")
    add.add_argument("--strict", action="store_true", help="refuse tensors that the model does not have")
    add.add_argument(
        "--allow-nonfinite", action="store_true", help="accept infinite numbers and not-a-numbers"
    )
    add.add_argument("--replace", action="store_true", help="DST may hold such a model already")
    add.add_argument(
        "--image-codes",
        type=int,
        metavar="N",
        help="icetk-text: ids before the text (default: of icetk-image, or 20000)",
    )
    add.add_argument(
        "--rate", type=int, choices=(4, 8, 16), help="pixels per code of the drawn pictures (default: 8)"
    )
    out = commands.add_parser("export", help="write a model in the published layout")
    out.add_argument("source", metavar="SRC", help="run or weights folder")
    out.add_argument("target", metavar="DST", type=Path, help="new folder, or new file")
    out.add_argument("--kind", choices=KINDS, help="which model")
    out.add_argument("--bundle", action="store_true", help="all models instead, as `weights bundle`")
    out.add_argument("--tensor-parallel", type=int, default=1, metavar="P", help="cut into P parts")
    out.add_argument("--dtype", choices=_DTYPES, help="cast to it (default: keep)")
    out.add_argument(
        "--layout", choices=("sat", "plain"), default="sat", help="published, or a bare state dict"
    )
    bundle = commands.add_parser("bundle", help="write all models into one self-contained folder")
    bundle.add_argument("source", metavar="SRC", help="run or weights folder")
    bundle.add_argument("target", metavar="DST", type=Path, help="new folder")
    show = commands.add_parser("show", help="list what a file or folder holds")
    show.add_argument("source", metavar="PATH", help="run, weights folder, checkpoint, or file")
    show.add_argument(
        "--verify", action="store_true", help="compare the files of a weights folder with their sha256"
    )
    return parser


def _place(name: str) -> Path:
    """Return the path of a run given by its name in ./runs, or the path itself."""
    path, run = Path(name), Path("runs") / name
    try:
        return run if not path.exists() and run.is_dir() else path
    except OSError as error:
        raise CheckpointError(f"{name[:60]}... is no path ({error.strerror}); check it") from error


def _import(arguments: argparse.Namespace) -> None:
    for name in ("heads", "rows", "image_codes"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise CheckpointError(f"--{name.replace('_', '-')} {value} is no size; give a number from 1 on")
    wanted = Wanted(
        config=arguments.config,
        heads=arguments.heads,
        rows=arguments.rows,
        dtype=None if arguments.dtype is None else _DTYPES[arguments.dtype],
        strict=arguments.strict,
        allow_nonfinite=arguments.allow_nonfinite,
        replace=arguments.replace,
        image_codes=arguments.image_codes,
        rate=arguments.rate,
    )
    report = import_weights(arguments.kind, arguments.source, arguments.target, wanted)
    for line in report.warnings:
        print(f"cogview2: warning: {printable(line)}", file=sys.stderr)
    print("\n".join(map(printable, report.lines)))


def _labels(collection: Collection, place: Path) -> np.ndarray | None:
    """Return the clusters that the bundle shall draw with: those of SRC, fitted if it has none."""
    if "icetk-image" not in collection.members:
        return None
    models = open_models(place)
    codebook = models.vqvae().quantizer.embed.weight
    return np.asarray(cluster_labels(models, codebook, collection.sampling, collection.seed).cpu().numpy())


def _bundle(arguments: argparse.Namespace) -> None:
    place = _place(arguments.source)
    collection = open_collection(place)
    print("\n".join(write_bundle(collection, arguments.target, _labels(collection, place))))


def _export(arguments: argparse.Namespace) -> None:
    if arguments.bundle:
        _bundle(arguments)
        return
    lines = export_weights(
        arguments.kind,
        open_collection(_place(arguments.source)),
        arguments.target,
        parts=arguments.tensor_parallel,
        dtype=None if arguments.dtype is None else _DTYPES[arguments.dtype],
        layout=arguments.layout,
    )
    print("\n".join(lines))


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _table(tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> str:
    """Return names, shapes and dtypes; tensors that differ in numbers within their names share a line."""
    groups: dict[tuple[str, tuple[int, ...], torch.dtype], int] = {}
    for name, (shape, dtype) in tensors.items():
        key = (_pattern(name), shape, dtype)
        groups[key] = groups.get(key, 0) + 1
    rows = [
        (
            f"{count} x" if count > 1 else "",
            printable(name),
            str(list(shape)),
            str(dtype).removeprefix("torch."),
        )
        for (name, shape, dtype), count in groups.items()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        f"{row[0]:>{widths[0]}} {row[1]:<{widths[1]}}  {row[2]:<{widths[2]}}  {row[3]}" for row in rows
    )


def _show(arguments: argparse.Namespace) -> None:
    place = _place(arguments.source)
    if place.is_dir() and (is_weights_folder(place) or (place / "recipe.yaml").is_file()):
        _show_collection(open_collection(place), arguments.verify)
        return
    if arguments.verify:
        raise CheckpointError(
            f"--verify: {place} is no weights folder, so nothing records what it should hold"
        )
    if place.is_file() and not place.name.endswith(INDEX):
        archive = open_archive(place)
        tensors = {name: (tensor.shape, tensor.dtype) for name, tensor in archive.tensors.items()}
        kind, form = kind_of(set(tensors)), archive.form
    else:
        try:
            source = open_source(place, ANCHORS["coglm"])
        except CheckpointError:  # also what is no model at all: then the second look says why
            source = open_source(place, ANCHORS["icetk-image"])
        tensors = {name: (source.blocks(name).shape, source.blocks(name).dtype) for name in source.names}
        kind, form = kind_of(set(tensors)), f"{source.form}, iteration {source.iteration}"
    print(_table(tensors))
    parameters = count_parameters({name: shape for name, (shape, _) in tensors.items()})
    size = sum(prod(shape) * dtype.itemsize for shape, dtype in tensors.values())
    print(
        f"{form}: {len(tensors):,} tensors, {parameters:,} numbers, {size:,} bytes; looks like: {kind or 'none of ours'}"
    )


def _show_collection(collection: Collection, verify: bool) -> None:
    for kind, member in collection.members.items():
        facts = member.facts
        numbers = f"{facts.parameters:,} parameters, {facts.dtype}, " if facts.parameters else ""
        print(f"{kind}: {numbers}{sizes_in_words(facts)}; from {printable(facts.source)}; {member.path}")
        if verify:
            if not facts.sha256:
                raise CheckpointError(f"--verify: {collection.path} is a run, which records its own digests")
            if fsops.sha256_file(member.path) != facts.sha256:
                raise CheckpointError(f"{member.path} is not what was written there (sha256); copy it again")
    if verify:
        print("all files are as they were written")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = _parser()
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if arguments.command == "export" and not arguments.bundle and arguments.kind is None:
        parser.error("weights export needs --kind, or --bundle")

    def work() -> ExitCode:
        commands = {"import": _import, "export": _export, "bundle": _bundle, "show": _show}
        commands[arguments.command](arguments)
        return ExitCode.DONE

    return run_command(f"weights {arguments.command}", work)


if __name__ == "__main__":
    sys.exit(main())
