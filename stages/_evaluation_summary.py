"""The last word on an evaluation: its figures in a few lines for people."""

from typing import Any


def summary(record: dict[str, Any]) -> list[str]:
    """Return the lines that `cogview2 run` prints last."""
    fid = record["fid"].get("fid_0")
    papers = "" if record["fid"]["comparable_to_papers"] else ", not comparable to papers"
    lines = [] if fid is None else [f"FID-0 {fid:.4g} ({record['fid']['network'].partition(',')[0]}{papers})"]
    for language, shares in record.get("caption_accuracy", {}).items():
        if language == next(iter(record["caption_accuracy"])):
            rebuilt = record["reconstruction"]
            lines.append(
                f"oracle on original drawings {record['oracle_on_originals']:.1%}, on their reconstructions "
                f"base {rebuilt['base']['caption_accuracy']:.1%}, final {rebuilt['full']['caption_accuracy']:.1%}"
            )
        words = ", ".join(
            f"{name} {value:.1%}" for name, value in shares.items() if name != "final" and value is not None
        )
        lines.append(f"caption accuracy {language}: {words}")
    for language, found in record.get("captioning", {}).items():
        if "objects_named" in found:
            lines.append(
                f"captions of held-out pictures {language}: {found['objects_named']:.1%} name every object"
            )
    for language, found in record.get("ranking", {}).items():
        if "obeyed_best_ranked" in found:
            lines.append(
                f"ranking {language}: of {found['candidates']} base pictures a caption {found['obeyed_on_average']:.1%} "
                f"obey, of the best ranked {found['obeyed_best_ranked']:.1%}"
            )
    for language, found in record.get("editing", {}).items():
        lines.append(f"replacing one object {language}: {found['obeyed']:.1%} obey the new caption")
    table = record.get("caption_accuracy", {})
    if table:
        lines.append(
            "caption accuracy on final pictures: "
            + ", ".join(f"{lang} {shares['final']:.1%}" for lang, shares in table.items())
        )
    return lines
