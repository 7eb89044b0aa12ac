"""report.html: what a run did and what came of it, on one page that needs nothing else."""

import base64
import json
import re
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cogview2.launch import report_tables as tables
from cogview2.launch.charts import Chart, chart
from cogview2.launch.report_skills import skill_tables
from cogview2.launch.report_tables import StageRow, Table, at, finite, read_json
from cogview2.pipeline import fsops
from cogview2.pipeline.attempt import redacted
from cogview2.pipeline.config.stages import STAGES
from cogview2.pipeline.run_dir import RunDirectory, units

_TEMPLATES = Path(__file__).parent / "templates"
_PNG = b"\x89PNG\r\n\x1a\n"
_STRIP_GAP = 2
"""Pixels after each picture of a sample strip, as the stages draw it."""
_MOST_STEPS = 8
_RECONSTRUCTION_ROWS = ("original", "rate 4", "rate 8", "rate 16")
_STEP = re.compile(r"_step_(\d+)\.png$")
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
_FINGERPRINT = re.compile(r"[Ff]ingerprint ([0-9a-f]{8,})")


@dataclass(frozen=True)
class Picture:
    """One PNG as a data: URI."""

    name: str
    uri: str
    width: int
    height: int
    rows: tuple[str, ...] = ()
    """What the rows of the picture show, from the top."""


@dataclass(frozen=True)
class Samples:
    """The same prompts at several steps: strips of square pictures, one for each prompt."""

    prompts: tuple[str, ...]
    strips: tuple[Picture, ...]
    aligned: bool
    """Each strip holds one picture per prompt, so that they can be shown by prompt."""
    gap: int = _STRIP_GAP


@dataclass(frozen=True)
class Curves:
    """The charts of one model: those that matter, and further ones."""

    unit: str
    charts: tuple[Chart, ...]
    more: tuple[Chart, ...]


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the good lines of a metrics.jsonl; torn lines and values that are not finite are skipped."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict) and finite(content.get("step")) is not None:
            found.append({name: float(value) for name, value in content.items() if finite(value) is not None})
    return found


def _points(metrics: list[dict[str, float]], name: str) -> list[tuple[float, float]]:
    return [(line["step"], line[name]) for line in metrics if name in line]


def curves(run: RunDirectory, unit: str) -> Curves | None:
    """Return the charts of a unit that trained; None when it logged nothing to draw."""
    metrics = read_metrics(run.stage(unit).metrics)
    names = list(dict.fromkeys(name for line in metrics for name in line))
    used = {name for name in names if any(line.get(name) for line in metrics)}
    parts = [n for n in names if n.startswith("loss_") and n in used and not n.endswith("accuracy")]
    series = {"loss": _points(metrics, "loss")}
    if len(parts) > 1:  # a single part is the loss itself
        series |= {name.removeprefix("loss_").replace("_", " "): _points(metrics, name) for name in parts}

    def single(title: str, name: str, label: str, *, log: bool = False) -> Chart | None:
        return chart(title, {label: _points(metrics, name)}, y_label=label, log=log)

    shown = [
        chart("Loss and its parts" if len(series) > 1 else "Loss", series, y_label="loss"),
        single("Codes predicted right", "loss_accuracy", "share"),
        single("Codebook in use", "codebook_used", "share of codes"),
        single("Codebook perplexity", "codebook_perplexity", "perplexity"),
    ]
    more = [
        single("Learning rate", "learning_rate", "learning rate"),
        chart("Gradient norm", {"norm": _points(metrics, "grad_norm")}, y_label="norm"),
        single("Throughput", "samples_per_second", "samples/s"),
        single("Tokens", "tokens_per_second", "tokens/s"),
        single("Model TFLOP/s, all ranks", "model_tflops", "TFLOP/s"),
        single("MFU", "mfu", "share of the peak"),
        single("Waiting for data", "data_wait", "share of time"),
        single("Peak memory of a rank", "peak_memory_gib", "GiB"),
    ]
    found = Curves(unit, tuple(c for c in shown if c), tuple(c for c in more if c))
    return found if found.charts else None


def picture(path: Path, name: str = "", rows: tuple[str, ...] = ()) -> Picture | None:
    """Return a PNG file as a data: URI, or None when it is not there or no whole PNG.

    Args:
        path: the file.
        name: what to call it; its file name by default.
        rows: what its rows show; dropped when its height is no multiple of their number.
    """
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if not content.startswith(_PNG) or not content.rstrip(b"\0").endswith(b"IEND\xaeB`\x82"):
        return None
    width, height = struct.unpack(">II", content[16:24])
    if not width or not height:
        return None
    kept = rows if rows and height % len(rows) == 0 else ()
    uri = "data:image/png;base64," + base64.b64encode(content).decode("ascii")
    return Picture(name or path.name, uri, width, height, kept)


def _by_step(folder: Path, stem: str, rows: tuple[str, ...] = ()) -> tuple[Picture, ...]:
    """Return the pictures `stem_step_N.png` in the order of N: the first, the last, and some between."""
    found = [
        (int(match[1]), path)
        for path in folder.glob(f"{stem}_step_*.png")
        if (match := _STEP.search(path.name))
    ]
    found.sort()
    if len(found) > _MOST_STEPS:
        last = len(found) - 1
        found = [found[round(k * last / (_MOST_STEPS - 1))] for k in range(_MOST_STEPS)]
    pictures = [picture(path, f"step {step}", rows) for step, path in found]
    return tuple(one for one in pictures if one is not None)


def samples(run: RunDirectory) -> Samples | None:
    """Return what CogLM drew for the fixed prompts while training; None before the first picture."""
    folder = run.stage("pretrain_coglm").samples
    strips = _by_step(folder, "prompts")
    if not strips:
        return None
    try:
        text = (folder / "prompts.txt").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    prompts = tuple(line for line in text.split("\n") if line.strip())
    aligned = bool(prompts) and all(strip.width == len(prompts) * strip.height for strip in strips)
    return Samples(prompts, strips, aligned)


def _evaluation_picture(run: RunDirectory, record: dict[str, Any] | None) -> Picture | None:
    rows = tuple(map(str, tables.sequence(record, "picture", "rows")))
    return picture(run.stage("evaluate").output / "samples.png", "evaluation samples", rows)


def _evaluation_captions(record: dict[str, Any] | None) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return (language or `training`, captions in the order of the columns)."""
    groups = tables.mapping(record, "picture", "captions")
    return tuple((name, tuple(map(str, tables.sequence(groups, name)))) for name in groups)


def _recipe_text(run: RunDirectory) -> str:
    """Return recipe.yaml without the values of variables that look like secrets: the page is made to be passed on."""
    try:
        lines = run.recipe_path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    except OSError:
        return ""
    shown: list[str] = []
    hidden: int | None = None  # indentation of the variable whose further lines are left out
    for line in lines:
        depth = len(line) - len(line.lstrip(" "))
        if hidden is not None and (depth > hidden or not line.strip()):
            continue
        hidden = None
        name, colon, value = line.strip().partition(": ")
        kept = redacted({name: value}).get(name) if _VARIABLE.fullmatch(name) else value
        if colon and kept != value:
            hidden = depth
            line = f"{' ' * depth}{name}: {kept}\n"
        shown.append(line)
    return "".join(shown)


def _date(seconds: float | None) -> str:
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _state(rows: list[StageRow]) -> str:
    states = [row.state for row in rows if not row.part and row.state != "not built yet"]
    for state in ("running", "damaged record", "failed", "interrupted"):
        if state in states:
            return state
    return "done" if all(state == "done" for state in states) else "not finished"


def _header(run: RunDirectory, recipe: str, rows: list[StageRow]) -> dict[str, Any]:
    records = [
        record for stage in STAGES for unit in units(stage) if (record := tables.done_record(run, unit))
    ]
    newest = max(records, key=lambda record: record.time, default=None)
    mark = _FINGERPRINT.search(recipe.partition("\n")[0])
    name = re.search(r"^name: (.+)$", recipe, re.MULTILINE)
    return {
        "run": run.path.name,
        "state": _state(rows),
        "facts": [
            (label, value)
            for label, value in (
                ("recipe", name[1].strip("'\"") if name else ""),
                ("fingerprint", mark[1][:12] if mark else ""),
                ("started", _date(finite(at(read_json(run.started_path), "time")))),
                ("last stage done", _date(newest.time if newest else None)),
                ("time in stages", tables.total_wall(run)),
            )
            if value
        ],
        "versions": newest.versions if newest else {},
        "written": _date(time.time()),
    }


def _missing(content: dict[str, Any]) -> list[str]:
    """Return what the page lacks, in words."""
    wanted = {
        "evaluation_tables": "evaluation (stage evaluate has no evaluation.json yet)",
        "evaluation_picture": "evaluation samples (stage evaluate)",
        "samples": "pictures for the fixed prompts (stage pretrain_coglm has drawn none yet)",
        "reconstructions": "reconstructions (stage train_vqvae has drawn none yet)",
        "data_tables": "samples and refused data (stage shard_dataset is not done)",
        "tokenizer": "tokenizer report (stage train_tokenizer is not done)",
        "recipe": "recipe (recipe.yaml cannot be read)",
    }
    lost = [text for key, text in wanted.items() if not content[key]]
    drawn = {one.unit for one in content["curves"]}
    trained = [
        unit for stage in ("train_vqvae", "pretrain_coglm", "finetune_superres") for unit in units(stage)
    ]
    return lost + [
        f"loss curve of {unit} (fewer than two logged steps)" for unit in trained if unit not in drawn
    ]


def gather(run: RunDirectory) -> dict[str, Any]:
    """Return all that the template shows; what a run does not have yet is empty and named in `missing`."""
    recipe = _recipe_text(run)
    rows = tables.stage_rows(run)
    found = read_json(run.stage("evaluate").output / "evaluation.json")
    record = found if isinstance(found, dict) else None
    evaluation: list[Table] = []
    if record is not None:
        evaluation = [
            *tables.accuracy_tables(record),
            *tables.distance_tables(record),
            *tables.model_tables(record),
            *skill_tables(record),
        ]
    content: dict[str, Any] = {
        "header": _header(run, recipe, rows),
        "headlines": tables.headlines(record, rows),
        "stages": rows,
        "evaluated": at(record, "weights", "of"),
        "evaluation_tables": evaluation,
        "evaluation_history": tables.evaluation_history(run),
        "evaluation_picture": _evaluation_picture(run, record),
        "evaluation_captions": _evaluation_captions(record),
        "edits": picture(
            run.stage("evaluate").output / "edits.png",
            "edited drawings",
            tuple(map(str, tables.sequence(record, "edited_picture", "rows"))),
        ),
        "edit_texts": tuple(map(str, tables.sequence(record, "edited_picture", "texts"))),
        "curves": [
            one for stage in STAGES for unit in units(stage) if (one := curves(run, unit)) is not None
        ],
        "samples": samples(run),
        "reconstructions": _by_step(
            run.stage("train_vqvae").samples, "reconstructions", _RECONSTRUCTION_ROWS
        ),
        "data_tables": tables.data_tables(run),
        "tokenizer": tables.tokenizer_table(run),
        "recipe": recipe,
    }
    return content | {"missing": _missing(content)}


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html, finished or not, and return its path.

    The page loads nothing from anywhere: styles, SVG charts and pictures (data: URIs) are part of it.
    It has no script, and all text is escaped, because captions are other people's data.
    """
    run = RunDirectory(run_dir)
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html").render(gather(run))
    fsops.write_text(run.report_path, page)
    return run.report_path
