"""Tables in Markdown, verdicts against the targets, and the sections of RESULTS.md."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LONGEST_CELL = 24


@dataclass(frozen=True)
class Target:
    """One promise of the issue and what became of it.

    Attributes:
        title: what is compared.
        measured: the figure, or the sentence why there is none.
        least, aim: the issue's bounds, in the same unit.
        unit: "x" for ratios, "%" for shares.
        at_most: smaller is better.
    """

    title: str
    measured: float | str
    least: float
    aim: float
    unit: str = "x"
    at_most: bool = False

    def verdict(self) -> str:
        if isinstance(self.measured, str):
            return "open"
        sign = -1 if self.at_most else 1
        if sign * self.measured >= sign * self.aim:
            return "aim reached"
        return "least reached" if sign * self.measured >= sign * self.least else "**missed**"


def ratio(numerator: Any, denominator: Any) -> float | str:
    """Divide two figures; a sentence in place of either is the answer."""
    for value in (numerator, denominator):
        if not isinstance(value, (int, float)):
            return str(value) if value is not None else "not measured"
    return float(numerator) / float(denominator) if denominator else float("inf")


def number(value: Any) -> str:
    """Three significant digits; sentences pass."""
    if value is None:
        return ""
    if not isinstance(value, (int, float)):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Lines of a Markdown table; numbers are rounded, and sentences too long for a cell become notes below it."""
    notes: list[str] = []

    def cell(value: Any) -> str:
        text = number(value)
        if len(text) <= LONGEST_CELL or text.startswith("`"):
            return text
        if text not in notes:
            notes.append(text)
        return f"({notes.index(text) + 1})"

    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join([number(row[0]), *map(cell, row[1:])]) + " |" for row in rows]
    lines += [""] * bool(notes) + [f"({index}) {note}  " for index, note in enumerate(notes, 1)]
    return "\n".join(lines)


def targets_table(targets: Sequence[Target]) -> str:
    rows = []
    for target in targets:
        measured = number(target.measured) + (target.unit if not isinstance(target.measured, str) else "")
        bounds = [f"{number(bound)}{target.unit}" for bound in (target.least, target.aim)]
        rows.append([target.title, measured, *bounds, target.verdict()])
    return table(["same work, one run", "measured", "at least (memory: at most)", "aim", "verdict"], rows)


def facts_table(facts: dict[str, str]) -> str:
    return table(["what", "value"], [[name, f"`{value}`"] for name, value in facts.items()])


def write_section(path: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- NAME -->` and `<!-- end of NAME -->`.

    Raises:
        ValueError: the file has no such section.
    """
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    old = path.read_text()
    if old.count(begin) != 1 or old.count(end) != 1:
        raise ValueError(f"{path} needs the lines {begin} and {end} once each, around the section to replace")
    before, rest = old.split(begin)
    path.write_text(before + begin + "\n" + text.strip() + "\n" + end + rest.split(end)[1])


def publish(
    markdown: str, record: dict[str, Any], section: str, results: Path | None, to: Path | None
) -> None:
    """Print a report, and write it where asked: into a section of RESULTS.md, and as JSON."""
    print(markdown)
    if results is not None:
        write_section(results, section, markdown)
        print(f"wrote the section '{section}' of {results}", file=sys.stderr)
    if to is not None:
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(json.dumps(record, indent=1) + "\n")
        print(f"wrote {to}", file=sys.stderr)
