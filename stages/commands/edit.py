"""`cogview2 edit RUN image.png --box x0,y0,x1,y1 "text"`: draw a part of a picture again."""

import argparse
import datetime
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from cogview2.pipeline import fsops
from cogview2.pipeline.command_line import Parser, print_paths
from cogview2.pipeline.config.sampling import EditingConfig
from cogview2.pipeline.errors import DataError
from cogview2.pipeline.sampling.editing import Edited, edit
from cogview2.pipeline.sampling.regions import Box, Fractions, Region
from cogview2.pipeline.sampling.styles import find_style
from cogview2.stages.commands._config_options import add_options, changed
from cogview2.stages.commands._model_options import add_model_options, add_style_options, load_models
from cogview2.stages.commands._picture_files import open_picture, write_png
from cogview2.stages.commands.generate import sheet, slug

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)")
_WHITE = 128
_SHADE = np.array([255, 0, 0])


def parse_box(text: str) -> Box | Fractions:
    """Return the box `x0,y0,x1,y1` on a picture.

    The numbers are pixels, or fractions of width and height when none is above 1 and one at least has a decimal point.

    Raises:
        DataError: not four numbers, pixels that are not whole, or fractions outside of 0 to 1.
    """
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 4 or not all(_NUMBER.fullmatch(part) for part in parts):
        raise DataError(f"box {text!r} is not four numbers; give x0,y0,x1,y1")
    values = [float(part) for part in parts]
    if max(values) <= 1 and any("." in part for part in parts):
        if min(values) < 0:
            raise DataError(f"box {text} is not inside the picture: fractions lie within 0 to 1; change it")
        if values[2] <= values[0] or values[3] <= values[1]:
            raise DataError(
                f"box {text} is empty: x1 {parts[2]} must be above x0 {parts[0]} and y1 {parts[3]} above y0 {parts[1]}; "
                "give x0,y0,x1,y1"
            )
        return Fractions(*values)
    if any(value != int(value) for value in values):
        raise DataError(f"box {text} has parts of pixels; give whole pixels, or fractions of 1 for all four")
    left, top, right, bottom = (int(value) for value in values)
    return Box(left, top, right, bottom)


def read_mask(path: Path) -> np.ndarray:
    """Return a mask picture as bool [H, W]: white and transparent pixels are True."""
    return np.asarray(open_picture(path).convert("L")) >= _WHITE


def _shaded(picture: np.ndarray, mask: np.ndarray) -> Image.Image:
    """Return uint8 [F, F, 3] with the marked part half red."""
    shaded = picture.copy()
    shaded[mask] = (picture[mask].astype(np.int64) + _SHADE) // 2
    return Image.fromarray(shaded)


def _paths(out: Path, text: str, count: int) -> tuple[list[Path], Path]:
    """Return the paths of the candidates, best first, and of the sheet."""
    if out.suffix.lower() == ".png" and not out.is_dir():
        others = [out.with_name(f"{out.stem}.{k:02d}.png") for k in range(1, count)]
        return [out, *others], out.with_name(f"{out.stem}.sheet.png")
    return [out / f"{k:02d}-{slug(text)}.png" for k in range(count)], out / "sheet.png"


def write_edited(
    out: Path, edited: Edited, text: str, facts: dict[str, str], inputs: Sequence[Path]
) -> list[Path]:
    """Write the candidates, best first, and a sheet: before | marked | after.

    Args:
        out: a folder, made if missing, or the path of a .png.
        edited: the candidates.
        text: what was asked for.
        facts: recorded in every file, with those of the candidate.
        inputs: files that must not be written over.

    Raises:
        DataError: a path that is one of the inputs.
    """
    paths, sheet_path = _paths(out, text, len(edited.pictures))
    taken = {path.resolve() for path in inputs}
    for path in (*paths, sheet_path):
        if path.resolve() in taken:
            raise DataError(f"{path} is the picture or the mask itself; choose another --out")
    fsops.make_dirs(paths[0].parent)
    pictures = [Image.fromarray(picture) for picture in edited.pictures]
    for k, (path, picture) in enumerate(zip(paths, pictures, strict=True)):
        own = {"Number": str(edited.numbers[k])}
        if edited.scores is not None:
            own["Score"] = f"{float(edited.scores[k]):.4f}"
        write_png(path, picture, facts | own)
    row = [Image.fromarray(edited.before), _shaded(edited.before, edited.mask), *pictures]
    write_png(sheet_path, sheet([text], [row]), facts)
    return [*paths, sheet_path]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="cogview2 edit", description="Draw a part of a picture again.")
    add_model_options(parser)
    parser.add_argument("picture", metavar="PICTURE", type=Path, help="picture file")
    parser.add_argument("text", metavar="TEXT", help="what is to be seen around the part, English or Chinese")
    part = parser.add_mutually_exclusive_group(required=True)
    part.add_argument(
        "--box",
        metavar="X0,Y0,X1,Y1",
        help="the part: pixels, or fractions when none is above 1 and one has a decimal point",
    )
    part.add_argument(
        "--mask", type=Path, metavar="FILE", help="a picture of the same size, white where to draw again"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR|FILE.png",
        help="a folder, or the best picture's path (default: RUN/edited/<time>)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument(
        "--no-rank", action="store_true", help="keep the candidates in the order of their numbers"
    )
    parser.add_argument(
        "--base-only", action="store_true", help="edit at the base size, without super-resolution"
    )
    add_style_options(parser)
    add_options(parser, EditingConfig)
    return parser.parse_args(argv)


def _edit(arguments: argparse.Namespace) -> list[Path]:
    if not arguments.text.strip():
        raise DataError("the text is empty; say what to draw")
    picture = open_picture(arguments.picture)
    region: Region
    if arguments.mask is not None:
        region, part = read_mask(arguments.mask), {"Mask": arguments.mask.name}
    else:
        region = parse_box(arguments.box)
        marked = region.pixels(*picture.size) if isinstance(region, Fractions) else region
        part = {"Box": str(marked)}
    style = find_style(arguments.style, arguments.styles)
    moment = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    out = arguments.out or arguments.run / "edited" / moment
    if arguments.out is not None:  # before the work: a path that cannot be is said at once
        fsops.make_dirs(_paths(out, arguments.text, 1)[0][0].parent)
    cascade = load_models(arguments, superres=not arguments.base_only)
    config = changed(cascade.sampling.editing, arguments)
    edited = edit(
        cascade,
        picture,
        region,
        arguments.text,
        seed=arguments.seed,
        candidates=config.candidates,
        ranked=not arguments.no_rank,
        config=config,
        style=style,
    )
    for note in edited.notes:
        print(f"cogview2 edit: {note}", file=sys.stderr)
    facts = {
        "Description": arguments.text,
        "Style": arguments.style,
        "Seed": str(arguments.seed),
        "Source": arguments.picture.name,
        **part,
        "Kept": str(edited.kept),
        "Crop": str(edited.crop),
        "Options": json.dumps(config.model_dump(mode="json")),
    }
    inputs = [arguments.picture, *([arguments.mask] if arguments.mask else [])]
    return write_edited(out, edited, arguments.text, facts, inputs)


def main(argv: Sequence[str] | None = None) -> int:
    """Edit, write and print the paths; return the exit code (errors.ExitCode)."""
    arguments = _parse(argv)
    return print_paths("edit", lambda: _edit(arguments))


if __name__ == "__main__":
    sys.exit(main())
