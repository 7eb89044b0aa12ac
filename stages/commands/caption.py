"""`cogview2 caption RUN image ...`: describe pictures with the language model of a run."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cogview2.pipeline.command_line import Parser
from cogview2.pipeline.config.data import Language
from cogview2.pipeline.config.sampling import CaptioningConfig
from cogview2.pipeline.sampling.captioning import caption_candidates
from cogview2.pipeline.sampling.pictures import encode_pictures
from cogview2.stages.commands._config_options import add_options, changed
from cogview2.stages.commands._model_options import add_model_options, load_models
from cogview2.stages.commands._picture_files import Refuse, run_on_pictures, usable_batches

_LANGUAGES: dict[str, tuple[Language, ...]] = {"en": ("en",), "zh": ("zh",), "both": ("en", "zh")}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="cogview2 caption",
        description="Describe pictures: a line for each picture and language with the score of its caption.",
    )
    add_model_options(parser)
    parser.add_argument("pictures", metavar="PICTURE", type=Path, nargs="+", help="picture files")
    parser.add_argument("--language", choices=tuple(_LANGUAGES), default="both", help="default: both")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument("--json", action="store_true", help="print one JSON document, with all candidates")
    add_options(parser, CaptioningConfig)
    return parser.parse_args(argv)


def _print_line(found: dict[str, Any]) -> None:
    best = found["captions"][0]
    print(f"{found['picture']}\t{found['language']}\t{best['score']:.3f}\t{best['text']}")


def _caption(arguments: argparse.Namespace, refuse: Refuse) -> None:
    """Describe all usable pictures and print what was found; the others are reported to `refuse`."""
    cascade = load_models(arguments, superres=False)
    config = changed(cascade.sampling.captioning, arguments)
    batch = cascade.sampling.batch
    results: list[dict[str, Any]] = []

    places = {path: place for place, path in reversed(list(enumerate(arguments.pictures)))}
    for paths, pictures in usable_batches(arguments.pictures, batch, refuse):
        codes_BM = encode_pictures(cascade, pictures)
        numbers = [places[path] for path in paths]
        by_language = {
            language: caption_candidates(
                cascade, codes_BM, language, config, arguments.seed, numbers=numbers, batch=batch
            )
            for language in _LANGUAGES[arguments.language]
        }
        for index, path in enumerate(paths):
            for language, captions in by_language.items():
                found = {
                    "picture": str(path),
                    "language": language,
                    "captions": [asdict(one) for one in captions[index]],
                }
                results.append(found)
                if not arguments.json:
                    _print_line(found)
    if arguments.json:
        print(json.dumps(results, ensure_ascii=False, indent=2))


def main(argv: Sequence[str] | None = None) -> int:
    """Describe pictures; return the exit code (errors.ExitCode): 78 if any picture was refused."""
    arguments = _parse(argv)
    return run_on_pictures("caption", lambda refuse: _caption(arguments, refuse))


if __name__ == "__main__":
    sys.exit(main())
