"""`cogview2 generate RUN "text" ...`: draw pictures for prompts with the models of a run or a weights folder."""

import argparse
import datetime
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from cogview2.pipeline import fsops
from cogview2.pipeline.command_line import Parser, print_paths
from cogview2.pipeline.errors import DataError
from cogview2.pipeline.sampling.meter import Meter
from cogview2.pipeline.sampling.styles import find_style
from cogview2.pipeline.sampling.text_to_image import Drawn, Pick, Picture
from cogview2.stages.commands._model_options import add_model_options, add_style_options, load_models
from cogview2.stages.commands._picture_files import write_png

_SLUG_CHARACTERS = 40
_CELL = 240
_CAPTION_HEIGHT = 30
_MARGIN = 8
_LONGEST_SHOWN = 300
_CJK_FONTS = ("NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "wqy-zenhei.ttc", "PingFang.ttc", "msyh.ttc")
"""Looked up in the system's font folders for captions that Pillow's own font cannot draw."""

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def slug(text: str) -> str:
    """Return `text` as part of a file name: letters and digits of any script, joined by hyphens."""
    words = re.sub(r"[\W_]+", "-", text.lower()).strip("-")
    return words[:_SLUG_CHARACTERS].rstrip("-") or "picture"


def _font(text: str) -> Font | None:
    """Return a font that can draw `text`, or None."""
    try:
        text.encode("latin-1")
    except UnicodeEncodeError:
        for name in _CJK_FONTS:
            try:
                return ImageFont.truetype(name, 16)
            except OSError:
                continue
        return None
    return ImageFont.load_default(16)


def to_images(pixels_BCHW: torch.Tensor) -> list[Image.Image]:
    """Return 8-bit pictures of float pixels in [0, 1]."""
    bytes_BHWC = (pixels_BCHW * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    return [Image.fromarray(picture) for picture in bytes_BHWC]


def sheet(
    prompts: Sequence[str], rows: Sequence[Sequence[Image.Image]], numbers: Sequence[int] | None = None
) -> Image.Image:
    """Return one picture with a row for each prompt: its number and caption, then its pictures side by side.

    A caption in a script that no installed font can draw is left out; its number remains. Numbers count from 0 unless
    given.
    """
    numbers = range(len(prompts)) if numbers is None else numbers
    columns = max(map(len, rows))
    height = _CAPTION_HEIGHT + _CELL + _MARGIN
    canvas = Image.new("RGB", (columns * (_CELL + _MARGIN) + _MARGIN, len(rows) * height), "white")
    draw = ImageDraw.Draw(canvas)
    for row, (number, prompt, pictures) in enumerate(zip(numbers, prompts, rows, strict=True)):
        font = _font(prompt)
        shown = " ".join(prompt.split())[:_LONGEST_SHOWN]
        caption = f"{number:02d}" if font is None else f"{number:02d}  {shown}"
        font = font or ImageFont.load_default(16)
        while draw.textlength(caption, font=font) > canvas.width - 2 * _MARGIN:
            caption = caption[:-2].rstrip("\N{HORIZONTAL ELLIPSIS}") + "\N{HORIZONTAL ELLIPSIS}"
        draw.text((_MARGIN, row * height + _MARGIN), caption, fill="black", font=font)
        for column, picture in enumerate(pictures):
            corner = (_MARGIN + column * (_CELL + _MARGIN), row * height + _CAPTION_HEIGHT)
            canvas.paste(picture.resize((_CELL, _CELL), Image.Resampling.LANCZOS), corner)
    return canvas


def _stems(prompts: Sequence[str], picks: Sequence[Pick]) -> list[str]:
    """Return file names without ending: number and text of the prompt, and from a prompt's second picture on its place."""
    places: Counter[int] = Counter()
    stems = []
    for pick in picks:
        places[pick.prompt] += 1
        place = f"-{places[pick.prompt]}" if places[pick.prompt] > 1 else ""
        stems.append(f"{pick.prompt:02d}-{slug(prompts[pick.prompt])}{place}")
    return stems


def write_pictures(folder: Path, prompts: Sequence[str], drawn: Drawn, seed: int) -> list[Path]:
    """Write `NN-<slug>.png` (final), `NN-<slug>.<name>.png` of the passes before, and `sheet.png`.

    Args:
        folder: made if missing; files of the same names are replaced.
        prompts: texts; of several pictures of one, the second is `NN-<slug>-2.png`.
        drawn: the pictures.
        seed: recorded in the files, with the number of the candidate and its score.

    Returns:
        The paths: the final pictures, the others, the sheet.
    """
    fsops.make_dirs(folder)
    # Without super-resolution the base pictures are the final ones.
    names: tuple[Picture, ...] = drawn.pictures if drawn.direct_codes is not None else ("final",)
    pictures = {name: to_images(drawn.pixels(name)) for name in names}
    picks = drawn.picks or tuple(Pick(number) for number in range(len(prompts)))
    stems = _stems(prompts, picks)
    paths: list[Path] = []
    for name in reversed(names):
        for pick, stem, picture in zip(picks, stems, pictures[name], strict=True):
            ending = "png" if name == "final" else f"{name}.png"
            facts = {"Description": prompts[pick.prompt], "Seed": str(seed), "Number": str(pick.prompt)}
            facts |= {"Pass": name, "Candidate": str(pick.candidate)}
            if pick.score is not None:
                facts["Score"] = f"{pick.score:.4f}"
            paths.append(write_png(folder / f"{stem}.{ending}", picture, facts))
    rows = list(zip(*(pictures[name] for name in names), strict=True))
    canvas = sheet([prompts[pick.prompt] for pick in picks], rows, [pick.prompt for pick in picks])
    paths.append(write_png(folder / "sheet.png", canvas, {"Seed": str(seed)}))
    return paths


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


_count.__name__ = "number of at least 1"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="cogview2 generate",
        description="Draw pictures for prompts. What each stage took is reported on stderr.",
    )
    add_model_options(parser)
    parser.add_argument("prompts", metavar="TEXT", nargs="+", help="what to draw, English or Chinese")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: RUN/generated/<time>")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    add_style_options(parser)
    parser.add_argument(
        "--candidates",
        type=_count,
        metavar="N",
        help="base pictures for each prompt, ordered by the prompt's likelihood as their caption; "
        "default: sampling.ranking.candidates",
    )
    parser.add_argument(
        "--keep", type=_count, default=1, metavar="K", help="how many of them to finish; default: 1"
    )
    parser.add_argument("--base-only", action="store_true", help="no super-resolution")
    parser.add_argument(
        "--batch", type=_count, metavar="N", help="pictures drawn together; default: sampling.batch"
    )
    return parser.parse_args(argv)


def _generate(arguments: argparse.Namespace) -> list[Path]:
    empty = [number for number, prompt in enumerate(arguments.prompts) if not prompt.strip()]
    if empty:
        raise DataError(f"prompt {empty[0]} is empty; say what to draw")
    style = find_style(arguments.style, arguments.styles)
    moment = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = arguments.out or arguments.run / "generated" / moment
    if arguments.out is not None:  # before the work: a path that cannot be is said at once
        fsops.make_dirs(folder)
    text_to_image = load_models(arguments, superres=not arguments.base_only)
    if arguments.batch is not None:
        sampling = text_to_image.sampling.model_copy(update={"batch": arguments.batch})
        text_to_image = text_to_image.with_sampling(sampling)
    meter = Meter()
    drawn = text_to_image.draw(
        arguments.prompts,
        arguments.seed,
        style=style,
        candidates=arguments.candidates,
        keep=arguments.keep,
        meter=meter,
    )
    for note in drawn.notes:
        print(f"cogview2 generate: {note}", file=sys.stderr)
    paths = write_pictures(folder, arguments.prompts, drawn, arguments.seed)
    print(meter.table(), file=sys.stderr)
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    """Draw, write and print the paths; return the exit code (errors.ExitCode)."""
    arguments = _parse(argv)
    return print_paths("generate", lambda: _generate(arguments))


if __name__ == "__main__":
    sys.exit(main())
