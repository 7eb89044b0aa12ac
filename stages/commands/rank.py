"""`cogview2 rank RUN "text" image ...`: order pictures by how well they fit a text."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from cogview2.pipeline.command_line import Parser
from cogview2.pipeline.config.sampling import RankingConfig
from cogview2.pipeline.errors import DataError
from cogview2.pipeline.sampling.pictures import encode_pictures
from cogview2.pipeline.sampling.reranking import rank
from cogview2.pipeline.sampling.styles import Style
from cogview2.stages.commands._config_options import add_options, changed
from cogview2.stages.commands._model_options import add_model_options, load_models
from cogview2.stages.commands._picture_files import Refuse, run_on_pictures, usable_batches

_STARTS = {"en": "english", "zh": "chinese"}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="cogview2 rank",
        description="Order pictures by the likelihood of a text as their caption, the best first.",
    )
    add_model_options(parser)
    parser.add_argument("text", metavar="TEXT", help="a description, English or Chinese")
    parser.add_argument("pictures", metavar="PICTURE", type=Path, nargs="+", help="picture files")
    language = "language of the text; the same as --start english or chinese (default: told from its tokens)"
    parser.add_argument("--language", choices=tuple(_STARTS), help=language)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    add_options(parser, RankingConfig, skip=("candidates", "applies"))
    arguments = parser.parse_args(argv)
    if arguments.language:
        if arguments.start:
            parser.error("--language and --start both choose the token before the text; give one of them")
        arguments.start = _STARTS[arguments.language]
    return arguments


def _rank(arguments: argparse.Namespace, refuse: Refuse) -> None:
    """Print the usable pictures in order; the others are reported to `refuse`."""
    if not arguments.text.strip():
        raise DataError("the text is empty; describe a picture")
    cascade = load_models(arguments, superres=False)
    config = changed(cascade.sampling.ranking, arguments)
    text_ids, note = cascade.encode_styled(arguments.text, Style())
    if note is not None:
        print(f"cogview2 rank: {note}", file=sys.stderr)

    kept: list[Path] = []
    codes: list[torch.Tensor] = []
    for paths, pictures in usable_batches(arguments.pictures, cascade.sampling.batch, refuse):
        kept += paths
        codes.append(encode_pictures(cascade, pictures))
    if not kept:
        raise DataError("none of the pictures can be used; give at least one")
    ranking = rank(
        cascade.coglm,
        text_ids,
        torch.cat(codes),
        cascade.vocabulary,
        start=config.start,
        softmax=config.softmax,
        reduce=config.reduce,
        batch=cascade.sampling.batch,
    )
    ordered = [(kept[k], float(ranking.scores[k])) for k in ranking.order.tolist()]
    if arguments.json:
        rows = [{"picture": str(path), "score": score} for path, score in ordered]
        print(json.dumps({"text": arguments.text, "pictures": rows}, ensure_ascii=False, indent=2))
    else:
        for path, score in ordered:
            print(f"{score:.3f}\t{path}")


def main(argv: Sequence[str] | None = None) -> int:
    """Order pictures; return the exit code (errors.ExitCode): 78 if any picture was refused."""
    arguments = _parse(argv)
    return run_on_pictures("rank", lambda refuse: _rank(arguments, refuse))


if __name__ == "__main__":
    sys.exit(main())
