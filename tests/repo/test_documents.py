"""What the documents quote is what the program says."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = ("pipeline", "stages", "launch", "ops")
TABLE = "## What refusals mean"
PLACEHOLDER = re.compile(r"\.\.\.|\b[A-Z][A-Z_]*\b|/path/to/\w+|127\b|\.json")
MIN_LETTERS = 6


def _said() -> str:
    """Return every text that the program can print: literals, with a newline wherever a value is filled in."""
    texts = []
    for folder in SOURCES:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [p.value if isinstance(p, ast.Constant) else "\n" for p in node.values]
                    texts.append("".join(str(part) for part in parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    return "\n\n".join(texts)


def _quoted(document: str) -> list[str]:
    """Return the messages in the first column of the table of refusals."""
    rows = document.split(TABLE)[1].split("\n## ")[0].splitlines()
    cells = [row.split("|")[1] for row in rows if row.startswith("| ") and "`" in row.split("|")[1]]
    return [quote for cell in cells for quote in re.findall(r"`([^`]+)`", cell)]


def _not_said(quotes: list[str], said: str) -> list[str]:
    pieces = [(quote, piece.strip(" :;,.'")) for quote in quotes for piece in PLACEHOLDER.split(quote)]
    return [f"{quote}: {piece}" for quote, piece in pieces if len(piece) >= MIN_LETTERS and piece not in said]


def test_every_message_in_the_table_of_refusals_exists() -> None:
    quotes = _quoted((ROOT / "docs/operations.md").read_text(encoding="utf-8"))
    assert len(quotes) > 30
    assert _not_said(quotes, _said()) == []


def test_a_message_that_nobody_says_is_found() -> None:
    assert _not_said(["was saved by N ranks ago"], _said())
