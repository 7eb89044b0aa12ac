"""Tables of report.html about describing, ranking and editing (evaluation.json: captioning, ranking, editing)."""

from typing import Any

from cogview2.launch.report_tables import Cell, Table, at, cell, mapping, sequence, share_cell


def _by_language(
    record: dict[str, Any], key: str, title: str, columns: dict[str, str], shares: frozenset[str], note: str
) -> list[Table]:
    """Return a table with one row a language; columns that no language has are left out."""
    found = mapping(record, key)
    names = [name for name in columns if any(name in mapping(row) for row in found.values())]
    if not names:
        return []
    rows = tuple(
        (Cell(language), *((share_cell if name in shares else cell)(at(row, name)) for name in names))
        for language, row in found.items()
    )
    return [Table(title, ("language", *(columns[name] for name in names)), rows, note)]


def _examples(record: dict[str, Any]) -> list[Table]:
    rows = tuple(
        (Cell(str(at(example, "original") or "")), Cell(str(at(example, "said") or "")))
        for row in mapping(record, "captioning").values()
        for example in sequence(row, "examples")
    )
    note = "Held-out pictures: the caption they came with, and what CogLM says of their base codes."
    return [Table("Captions by CogLM", ("original", "CogLM"), rows, note)] if rows else []


def skill_tables(record: dict[str, Any]) -> list[Table]:
    """Return what was measured of describing, ranking and editing."""
    return [
        *_by_language(
            record,
            "captioning",
            "Describing",
            {"pictures": "pictures", "objects_named": "every object named", "ended": "ended by itself"},
            frozenset({"objects_named", "ended"}),
            "Held-out pictures that CogLM describes. Named: exactly the colours and shapes that are there.",
        ),
        *_by_language(
            record,
            "ranking",
            "Ranking by caption score",
            {
                "captions": "captions",
                "candidates": "candidates",
                "obeyed_on_average": "obey, on average",
                "obeyed_best_ranked": "best ranked obeys",
                "obeyed_by_any": "any obeys",
                "score_first": "score of the first",
                "score_best": "best score",
            },
            frozenset({"obeyed_on_average", "obeyed_best_ranked", "obeyed_by_any"}),
            "Several base pictures for each caption; the best ranked gives the caption the highest likelihood.",
        ),
        *_by_language(
            record,
            "editing",
            "Replacing one object",
            {
                "edits": "edits",
                "obeyed": "obey the new caption",
                "colour": "colours right",
                "shape": "shapes right",
                "outside_l1": "L1 outside",
                "vqvae_outside_l1": "of the VQVAE alone",
            },
            frozenset({"obeyed", "colour", "shape"}),
            "Held-out drawings of which one object is drawn again as another. Outside what was put back an edit should change "
            "no more than encoding and decoding does.",
        ),
        *_examples(record),
    ]
