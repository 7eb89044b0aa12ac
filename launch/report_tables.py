"""What a run says in numbers, as tables for report.html: stages, evaluation, data, tokenizer."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogview2.launch.cascade import built_stages
from cogview2.launch.charts import number
from cogview2.launch.progress import duration
from cogview2.launch.status import speed, stage_status
from cogview2.pipeline.config.stages import STAGES
from cogview2.pipeline.errors import RunDirectoryError
from cogview2.pipeline.run_dir import DoneRecord, RunDirectory, units

PASSES = ("base", "direct", "final")
"""The pictures that an evaluation looks at, in the order in which they are made."""
_DETAILS = ("colour", "shape", "side", "size", "background")
NOTHING = "–"


@dataclass(frozen=True)
class Cell:
    """One value; `share` in [0, 1] draws a bar below it."""

    text: str
    share: float | None = None


@dataclass(frozen=True)
class Table:
    """One table; the first cell of a row names it."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class StageRow:
    """One stage, or one part of it."""

    name: str
    part: bool
    state: str
    step: str = ""
    loss: str = ""
    throughput: str = ""
    wall: str = ""
    attempts: str = ""


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, or None when it is not there or not whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def at(content: Any, *keys: str) -> Any:
    """Return the value of nested dicts, or None where a key is missing."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def mapping(content: Any, *keys: str) -> dict[str, Any]:
    """Return the dict of nested dicts, or an empty one."""
    found = at(content, *keys)
    return found if isinstance(found, dict) else {}


def sequence(content: Any, *keys: str) -> list[Any]:
    """Return the list of nested dicts, or an empty one."""
    found = at(content, *keys)
    return found if isinstance(found, list) else []


def finite(value: Any) -> float | None:
    """Return a finite number, or None."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def cell(value: Any) -> Cell:
    """Return a cell with a number, or with a text as it is."""
    figure = finite(value)
    if figure is not None:
        return Cell(f"{figure:,.0f}" if figure == int(figure) and abs(figure) >= 1000 else number(figure, 4))
    return Cell(NOTHING if value is None or isinstance(value, float) else str(value))


def share_cell(value: Any) -> Cell:
    """Return a share as per cent, with a bar."""
    figure = finite(value)
    return Cell(NOTHING) if figure is None else Cell(f"{figure:.1%}", min(max(figure, 0.0), 1.0))


def done_record(run: RunDirectory, unit: str) -> DoneRecord | None:
    """Return the DONE record, or None also when it is damaged."""
    try:
        return run.stage(unit).done()
    except RunDirectoryError:
        return None


def stage_rows(run: RunDirectory) -> list[StageRow]:
    """Return a row for every stage, followed by those of its parts."""
    built, locked = built_stages(), run.is_locked()
    rows: list[StageRow] = []
    for stage in STAGES:
        attempts = len(run.stage(stage).attempts())
        try:
            status = stage_status(run, stage, run_locked=locked, built=stage in built)
        except RunDirectoryError:
            rows.append(StageRow(stage, False, "damaged record", attempts=str(attempts)))
            continue
        parts = units(stage) if units(stage) != [stage] else []
        row = _numbers(run, stage) if not parts else {}
        shown = str(attempts) if attempts else ""
        rows.append(StageRow(stage, False, status.state, wall=status.wall, attempts=shown, **row))
        for unit in parts:
            begun = run.stage(unit).metrics.exists()
            state = "done" if done_record(run, unit) else status.state if begun else "not started"
            rows.append(StageRow(unit.partition("/")[2], True, state, **_numbers(run, unit)))
    return rows


def _numbers(run: RunDirectory, unit: str) -> dict[str, str]:
    """Return step, loss and throughput of a unit, as it said last."""
    beat = run.stage(unit).heartbeat()
    record = done_record(run, unit)
    if beat is None:
        return {}
    # The heartbeat's loss is a mean over the last logged steps; that of the record is the last step's alone.
    loss = (
        beat.loss
        if beat.loss is not None
        else finite(record.extra.get("loss"))
        if record is not None
        else None
    )
    trains = run.stage(unit).metrics.exists()
    return {
        "step": f"{beat.step}/{beat.steps}" if trains or record is None else "",
        "loss": f"{loss:.4g}" if loss is not None else "",
        "throughput": speed(beat),
    }


def accuracy_tables(record: dict[str, Any]) -> list[Table]:
    """Return how often the oracle finds in the pictures what their captions state."""
    tables = []
    table = mapping(record, "caption_accuracy")
    columns = [
        key
        for key in (*PASSES, "unseen_pairs", "shuffled")
        if any(key in mapping(row) for row in table.values())
    ]
    if table:
        oracle = share_cell(record.get("oracle_on_originals")).text
        tables.append(
            Table(
                "Caption accuracy",
                ("language", *(name.replace("_", " ") for name in columns)),
                tuple(
                    (Cell(language), *(share_cell(at(row, key)) for key in columns))
                    for language, row in table.items()
                ),
                "Share of pictures in which the oracle finds everything that the caption states, after the "
                "base, direct and final pass. Unseen pairs: colours and shapes that training never showed "
                "together. Shuffled: final pictures against another caption, the level of guessing. "
                f"On the original drawings the oracle is right in {oracle}.",
            )
        )
    rows = [
        (Cell(f"{language} {name}"), *(share_cell(at(shares, key)) for key in _DETAILS))
        for language, passes in mapping(record, "caption_accuracy_details").items()
        for name, shares in mapping(passes).items()
    ]
    if rows:
        note = "The same verdicts, one stated detail at a time."
        tables.append(Table("Caption accuracy by detail", ("pictures", *_DETAILS), tuple(rows), note))
    return tables


def _radii(record: dict[str, Any]) -> list[str]:
    keys = [key for key in mapping(record, "fid") if key.startswith("fid_") and key[4:].isdigit()]
    return sorted(keys, key=lambda key: int(key[4:]))


def _network(content: dict[str, Any]) -> str:
    """Return the name of a feature network; that it is not comparable is said in a sentence of its own."""
    return str(content.get("network") or "an unnamed network").partition(", not comparable")[0]


def distance_tables(record: dict[str, Any]) -> list[Table]:
    """Return the Frechet distances and the inception score, with the network that they were taken with."""
    fid = mapping(record, "fid")
    tables = []
    papers = "" if fid.get("comparable_to_papers") else " Not comparable to figures in papers."
    radii = _radii(record)
    if radii or fid.get("refused"):
        few = " Taken from fewer pictures than feature dimensions." if fid.get("too_few_pictures") else ""
        why = f" Refused: {fid['refused']}." if fid.get("refused") else ""
        tables.append(
            Table(
                "Fréchet distance (FID-k)",
                ("blur radius k", *(key[4:] for key in radii)),
                ((Cell("FID-k"), *(cell(fid[key]) for key in radii)),) if radii else (),
                f"{cell(fid.get('drawn')).text} drawn pictures against {cell(fid.get('real')).text} "
                f"{fid.get('reference', 'originals')}, both blurred with radius k. "
                f"Features of: {_network(fid)}.{papers}{few}{why}",
            )
        )
    score = mapping(record, "inception_score")
    if score:
        deviation = cell(score.get("deviation")).text
        row = (Cell("IS"), Cell(f"{cell(score.get('mean')).text} ± {deviation}"))
        note = f"Classes of: {_network(score)}.{papers}"
        tables.append(Table("Inception score", ("", "mean ± deviation"), (row,), note))
    return tables


_METRIC_TITLES = {"l1": "L1", "psnr": "PSNR", "ssim": "SSIM", "caption_accuracy": "obeys its caption"}


def model_tables(record: dict[str, Any]) -> list[Table]:
    """Return the caption loss and the reconstruction quality."""
    tables = []
    losses = mapping(record, "caption_loss")
    if losses:
        rows = tuple(
            (Cell(language), cell(at(row, "caption_loss")), cell(at(row, "real_caption_loss")))
            for language, row in losses.items()
        )
        note = "Mean negative log likelihood of a caption, given its drawn picture and given the original."
        tables.append(Table("Caption loss", ("language", "drawn", "original"), rows, note))
    rebuilt = mapping(record, "reconstruction")
    if rebuilt:
        names = list(dict.fromkeys(name for row in rebuilt.values() for name in mapping(row)))
        by_size = tuple(
            (
                Cell(size),
                *((share_cell if name == "caption_accuracy" else cell)(at(row, name)) for name in names),
            )
            for size, row in rebuilt.items()
        )
        note = "Held-out originals through the VQVAE alone: the best that any drawing with it can be."
        tables.append(
            Table(
                "Reconstruction", ("size", *(_METRIC_TITLES.get(name, name) for name in names)), by_size, note
            )
        )
    return tables


def evaluation_history(run: RunDirectory) -> Table | None:
    """Return all evaluations of the run, one row each; None when there is at most one."""
    paths = sorted(run.path.glob("evaluation/*.json"), key=lambda path: path.stat().st_mtime)
    records = [record for record in map(read_json, paths) if isinstance(record, dict)]
    if len(records) < 2:
        return None
    languages = list(
        dict.fromkeys(name for record in records for name in mapping(record, "caption_accuracy"))
    )
    rows = tuple(
        (
            Cell(str(at(record, "weights", "of"))),
            Cell(str(record.get("digest", ""))[:12]),
            cell(at(record, "protocol", "captions")),
            cell(at(record, "fid", "fid_0")),
            *(share_cell(at(record, "caption_accuracy", language, "final")) for language in languages),
        )
        for record in records
    )
    header = ("weights", "digest", "captions", "FID-0", *(f"accuracy {language}" for language in languages))
    note = "Each weights and protocol that was evaluated, oldest first; details lie in evaluation/."
    return Table("All evaluations", header, rows, note)


def data_tables(run: RunDirectory) -> list[Table]:
    """Return how many samples each split has and what was left out, with examples."""
    output = run.stage("shard_dataset").output
    rows = []
    for path in sorted(output.glob("*/manifest.json")):
        shards = at(read_json(path), "shards")
        if isinstance(shards, list):
            count = sum(int(finite(at(shard, "samples")) or 0) for shard in shards)
            rows.append((Cell(path.parent.name), cell(count), cell(len(shards))))
    refused = read_json(output / "refused.json")
    source = at(refused, "source")
    tables = (
        [Table("Samples", ("split", "samples", "shards"), tuple(rows), str(source or ""))] if rows else []
    )
    if isinstance(refused, dict):
        counts = mapping(refused, "refused")
        examples = mapping(refused, "examples")
        left_out = tuple(
            (Cell(reason), cell(count), Cell("\n".join(_example(one) for one in examples.get(reason) or [])))
            for reason, count in sorted(counts.items(), key=lambda item: -(finite(item[1]) or 0.0))
        )
        note = "" if left_out else "Nothing was refused: every picture and caption of the source is used."
        tables.append(Table("Refused data", ("reason", "count", "examples"), left_out, note))
    return tables


def _example(value: Any) -> str:
    if isinstance(value, dict):
        return " · ".join(str(part) for part in value.values())
    return " · ".join(str(part) for part in value) if isinstance(value, list) else str(value)


_TOKENIZER_CELLS: dict[str, Callable[[Any], Cell]] = {
    "unk_rate": lambda value: Cell(f"{value:.3%}") if finite(value) is not None else cell(None),
    "sha256": lambda value: Cell(str(value)[:12]),
}


def tokenizer_table(run: RunDirectory) -> Table | None:
    """Return the report of the text tokenizer, nested values flattened."""
    report = read_json(run.stage("train_tokenizer").output / "report.json")
    if not isinstance(report, dict) or not report:
        return None
    rows: list[tuple[Cell, ...]] = []
    for key, value in report.items():
        name = key.replace("_", " ")
        if isinstance(value, dict):
            rows += [(Cell(f"{name}: {inner}"), cell(number_)) for inner, number_ in value.items()]
        else:
            rows.append((Cell(name), _TOKENIZER_CELLS.get(key, cell)(value)))
    return Table("Text tokenizer", ("", ""), tuple(rows))


def headlines(record: dict[str, Any] | None, rows: list[StageRow]) -> list[tuple[str, str]]:
    """Return the few figures that stand on top: label and value."""
    found: list[tuple[str, str]] = []
    for language, row in mapping(record, "caption_accuracy").items():
        figure = finite(at(row, "final"))
        if figure is not None:
            found.append((f"caption accuracy, {language}", f"{figure:.1%}"))
    for label, value in (
        ("FID-0", at(record, "fid", "fid_0")),
        ("PSNR base, dB", at(record, "reconstruction", "base", "psnr")),
    ):
        if finite(value) is not None:
            found.append((label, number(float(value), 4)))
    done = sum(row.state == "done" for row in rows if not row.part)
    found.append(("stages done", f"{done} of {len(STAGES)}"))
    return found


def total_wall(run: RunDirectory) -> str:
    """Return the time that all attempts of all stages took."""
    attempts = [attempt for stage in STAGES for attempt in run.stage(stage).attempts()]
    seconds = sum(attempt.seconds() or 0.0 for attempt in attempts)
    return duration(seconds) if seconds else ""
