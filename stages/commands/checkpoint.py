"""`cogview2 checkpoint ls|verify|diff`: what is saved of a run, whether it is whole, and what differs (docs/reliability.md)."""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cogview2.pipeline import fsops
from cogview2.pipeline.command_line import Parser, printable, run_command
from cogview2.pipeline.errors import CheckpointError, ExitCode
from cogview2.pipeline.run_dir import RunDirectory, named_run
from cogview2.pipeline.training.state.manifest import (
    DATA_STATE,
    Manifest,
    committed_steps,
    folder_name,
    read_manifest,
    step_of,
    verify,
)

_SHOWN = 20
"""Tensors that differ, named one by one."""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="cogview2 checkpoint", description="What is saved of a run.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    add = commands.add_parser("ls", help="list the checkpoints of a run; reads their manifests only")
    add.add_argument("run", metavar="RUN", help="run directory, or a name in --runs-dir")
    add = commands.add_parser(
        "verify", help="read every byte of checkpoints and compare it with what was committed"
    )
    add.add_argument("what", metavar="RUN|CHECKPOINT", help="a run, or the folder of one checkpoint")
    add.add_argument(
        "--expect",
        metavar="SHA256",
        help="of the manifest, as `ls` shows it: of one checkpoint that came from elsewhere",
    )
    add = commands.add_parser("diff", help="say what differs between two checkpoints")
    add.add_argument("first", metavar="CHECKPOINT", type=Path)
    add.add_argument("second", metavar="CHECKPOINT", type=Path)
    for command in commands.choices.values():
        command.add_argument(
            "--runs-dir", type=Path, default=Path("runs"), help="where runs live (default: ./runs)"
        )
    return parser


def _checkpoints(run: RunDirectory) -> Iterator[tuple[str, Path]]:
    """Yield (unit, folder) of every checkpoint, good or not, and of those in quarantine."""
    for folder in sorted((run.path / "stages").glob("**/checkpoints")):
        unit = folder.parent.relative_to(run.path / "stages").as_posix()
        for step in committed_steps(folder):
            yield unit, folder / folder_name(step)
        for bad in sorted((folder / "quarantine").glob("step_*")):
            yield unit, bad


def _row(unit: str, folder: Path) -> tuple[str, ...]:
    if folder.parent.name == "quarantine":
        return unit, folder.name, "-", "-", "-", "in quarantine: damaged when it was to be loaded"
    try:
        found = read_manifest(folder)
    except CheckpointError as error:
        return unit, folder.name, "-", "-", "-", f"bad: {printable(str(error))}"
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(found.time))
    return unit, folder.name, fsops.byte_words(found.size), when, str(found.topology), found.sha256


def _list(arguments: argparse.Namespace) -> ExitCode:
    rows = [_row(unit, folder) for unit, folder in _checkpoints(named_run(arguments.run, arguments.runs_dir))]
    if not rows:
        print("no checkpoints")
        return ExitCode.DONE
    table = [("stage", "checkpoint", "size", "saved", "by", "sha256 of the manifest"), *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return ExitCode.DONE


def _verify(arguments: argparse.Namespace) -> ExitCode:
    path = Path(arguments.what)
    if step_of(path) is not None:
        folders = [path]
    else:
        found = _checkpoints(named_run(arguments.what, arguments.runs_dir))
        folders = [folder for _, folder in found if folder.parent.name != "quarantine"]
    if arguments.expect is not None and len(folders) != 1:
        raise CheckpointError(
            f"--expect is of one checkpoint, {arguments.what} has {len(folders)}; name its folder"
        )
    bad = 0
    for folder in folders:
        try:
            manifest = verify(folder)
            if arguments.expect not in (None, manifest.sha256):
                raise CheckpointError(
                    f"{folder} is whole, but its manifest has sha256 {manifest.sha256}, not the expected one"
                )
        except CheckpointError as error:
            bad += 1
            print(f"bad   {printable(str(error))}")
        else:
            print(f"good  {folder}  {len(manifest.files)} files, {manifest.size} bytes")
    print(f"{len(folders) - bad} good, {bad} bad")
    return ExitCode.REFUSED if bad else ExitCode.DONE


def _values(manifest: Manifest) -> dict[str, Any]:
    """Return what two manifests can differ in, by name."""
    plain = {"step": manifest.step, "topology": str(manifest.topology), "fingerprint": manifest.fingerprint}
    return (
        plain | manifest.settings | {f"version of {name}": text for name, text in manifest.versions.items()}
    )


def _diff(arguments: argparse.Namespace) -> ExitCode:
    """Compare settings, data position and numbers; of different topologies too."""
    import torch

    from cogview2.pipeline.training.state.files import StateReader

    folders = (arguments.first, arguments.second)
    old, new = (_values(verify(folder)) for folder in folders)
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) != new.get(name):
            print(f"{name}: {old.get(name, 'nothing')} -> {new.get(name, 'nothing')}")
    states = [(folder / DATA_STATE).read_text(encoding="utf-8") for folder in folders]
    if states[0] != states[1]:
        print(f"data: {' '.join(states[0].split())} -> {' '.join(states[1].split())}")
    readers = [StateReader(folder) for folder in folders]
    keys = [{(name, key) for name in reader.every_name() for key in reader.keys(name)} for reader in readers]
    for name, key in sorted(keys[0] ^ keys[1]):
        print(f"{key} of {name}: only in the {'first' if (name, key) in keys[0] else 'second'}")
    equal, differing = 0, []
    for name, key in sorted(keys[0] & keys[1]):
        one, two = (reader.every_number(name, key) for reader in readers)
        if one.shape == two.shape and torch.equal(one, two):
            equal += 1
        elif one.shape != two.shape:
            differing.append((float("inf"), f"{key} of {name}: {one.numel()} -> {two.numel()} numbers"))
        else:
            worst = float((one.double() - two.double()).abs().max())
            share = float((one != two).double().mean())
            differing.append((worst, f"{key} of {name}: up to {worst:.3g} apart, {share:.1%} of the numbers"))
    for _, line in sorted(differing, reverse=True)[:_SHOWN]:
        print(line)
    print(f"{equal} tensors equal, {len(differing)} differ")
    return ExitCode.DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    work = {"ls": _list, "verify": _verify, "diff": _diff}[arguments.command]
    return run_command(f"checkpoint {arguments.command}", lambda: work(arguments))


if __name__ == "__main__":
    sys.exit(main())
