"""Reads colour, shape and place of the objects back from pixels, so that obeying a caption becomes a number."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from cogview2.pipeline.data.drawings import BACKGROUNDS, COLOURS, SHAPES, SIZES, outline

_FOREGROUND_DISTANCE = 60.0
"""RGB distance from the background above which a pixel belongs to an object."""
_LEAST_AREA = 0.008
"""Share of the picture below which a blob is noise; the smallest of three covers 0.028."""
_TEMPLATE = 24
_READING_SIDE = 96
"""Pixels; smaller pictures are enlarged before they are read."""


@dataclass(frozen=True)
class Seen:
    """One object read from pixels; x, y: centre of its box as shares of the side."""

    colour: str
    shape: str
    size: str
    x: float
    y: float


@dataclass(frozen=True)
class Reading:
    """All that was read from one picture."""

    objects: tuple[Seen, ...]
    background: str


@lru_cache(maxsize=1)
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """Return shape masks [shapes, 24, 24] stretched to their box, and their box aspect (width / height)."""
    masks, aspects = [], []
    for shape in SHAPES:
        canvas = Image.new("L", (480, 480))
        ImageDraw.Draw(canvas).polygon(outline(shape, 240, 240, 200), fill=255)
        left, top, right, bottom = canvas.getbbox() or (0, 0, 480, 480)
        cut = canvas.crop((left, top, right, bottom)).resize((_TEMPLATE, _TEMPLATE), Image.Resampling.BOX)
        masks.append(np.asarray(cut, dtype=np.float32) / 255)
        aspects.append((right - left) / (bottom - top))
    return np.stack(masks), np.array(aspects)


@lru_cache(maxsize=len(SHAPES))
def _reach(shape: str) -> float:
    """Return half the longer side of the shape's box at half side 1: a square is drawn smaller than a circle."""
    corners = np.array(outline(shape, 0.0, 0.0, 1.0))
    return float((corners.max(axis=0) - corners.min(axis=0)).max() / 2)


def components(mask: np.ndarray) -> list[np.ndarray]:
    """Return the 4-connected components of a bool [H, W] mask as bool masks, largest first."""
    height, width = mask.shape
    labels = np.where(mask, np.arange(1, height * width + 1).reshape(height, width), 0)
    while True:
        grown = labels.copy()
        grown[1:] = np.maximum(grown[1:], labels[:-1])
        grown[:-1] = np.maximum(grown[:-1], grown[1:])
        grown[~mask] = 0  # else labels would go round the corner, over the background
        grown[:, 1:] = np.maximum(grown[:, 1:], grown[:, :-1])
        grown[:, :-1] = np.maximum(grown[:, :-1], grown[:, 1:])
        grown[~mask] = 0
        # Pointer jumping: a label names a cell of its own blob, whose label is at least as large.
        grown[mask] = np.concatenate([[0], grown.ravel()])[grown[mask]]
        if np.array_equal(grown, labels):
            break
        labels = grown
    names, counts = np.unique(labels[mask], return_counts=True)
    return [labels == name for name in names[np.argsort(-counts, kind="stable")]]


def _shape_of(mask: np.ndarray) -> str:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    cut = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    image = Image.fromarray(cut.astype(np.uint8) * 255)
    stretched = np.asarray(image.resize((_TEMPLATE, _TEMPLATE), Image.Resampling.BOX), dtype=np.float32) / 255
    masks, aspects = _templates()
    overlap = np.minimum(masks, stretched).sum((1, 2)) / np.maximum(masks, stretched).sum((1, 2))
    unlike = np.abs(np.log(aspects * cut.shape[0] / cut.shape[1]))
    return SHAPES[int(np.argmax(overlap - 0.3 * unlike))]


def _nearest(colour: np.ndarray, table: dict[str, tuple[int, int, int]]) -> str:
    names = list(table)
    return names[int(np.argmin(np.linalg.norm(np.array([table[n] for n in names]) - colour, axis=1)))]


def _enlarged(pixels: np.ndarray) -> np.ndarray:
    """Return small pictures with more pixels: an edge inside a pixel is read from its mixed colour."""
    factor = -(-_READING_SIDE // pixels.shape[0])
    if factor == 1:
        return pixels
    size = (pixels.shape[1] * factor, pixels.shape[0] * factor)
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def read_picture(pixels: np.ndarray) -> Reading:
    """Read one picture, uint8 [H, W, 3]."""
    image = _enlarged(pixels).astype(np.float32)
    side = image.shape[0]
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    background = np.median(border, axis=0)
    distance = np.linalg.norm(image - background, axis=2)
    foreground = distance > _FOREGROUND_DISTANCE
    objects = []
    for blob in components(foreground):
        if blob.sum() < _LEAST_AREA * side * side:
            break
        colour = _nearest(np.median(image[blob], axis=0), COLOURS)
        # An edge lies where the colours are mixed half and half; the foreground begins further out.
        inner = blob & (distance > np.median(distance[blob]) / 2)
        rows, columns = np.flatnonzero(inner.any(1)), np.flatnonzero(inner.any(0))
        shape = _shape_of(blob)
        half = max(len(rows), len(columns)) / 2 / side / _reach(shape)
        size = min(SIZES, key=lambda name: abs(SIZES[name] - half))
        centre_x, centre_y = (columns[0] + columns[-1] + 1) / 2 / side, (rows[0] + rows[-1] + 1) / 2 / side
        objects.append(Seen(colour, shape, size, float(centre_x), float(centre_y)))
    return Reading(tuple(objects), _nearest(background, BACKGROUNDS))


def _place_of(seen: Seen) -> str:
    from cogview2.pipeline.data.drawings import PLACES

    return min(PLACES, key=lambda name: (PLACES[name][0] - seen.x) ** 2 + (PLACES[name][1] - seen.y) ** 2)


def check(reading: Reading, facts: dict[str, Any]) -> dict[str, bool]:
    """Compare a reading with the facts that a caption states.

    Returns:
        `colour`: the right colours, whatever their order; `shape`: the right (colour, shape) pairs; `side`: each
        of them where the caption has it; `all`: the three, and no object too many or too few.
        `size` and `background` are reported beside, and count as right where the caption does not state them.
    """
    wanted = facts["objects"]
    arrangement = facts["arrangement"]
    seen = list(reading.objects)
    colour = sorted(o.colour for o in seen) == sorted(o["colour"] for o in wanted)
    shape = sorted((o.colour, o.shape) for o in seen) == sorted((o["colour"], o["shape"]) for o in wanted)
    if len(seen) == len(wanted) and len(seen) > 1:
        spread = {
            "row": max(o.x for o in seen) - min(o.x for o in seen),
            "column": max(o.y for o in seen) - min(o.y for o in seen),
        }
        seen.sort(key=lambda o: o.x if arrangement == "row" else o.y)
        other = "column" if arrangement == "row" else "row"
        side = spread[arrangement] > spread[other]
        side = side and [o.colour for o in seen] == [o["colour"] for o in wanted]
        side = side and (not shape or [o.shape for o in seen] == [o["shape"] for o in wanted])
    else:
        side = len(seen) == len(wanted) and (arrangement is None or _place_of(seen[0]) == arrangement)
    size = len(seen) == len(wanted) and all(
        o.size == w.get("size", o.size) for o, w in zip(seen, wanted, strict=True)
    )
    background = facts["background"] in (None, reading.background)
    return {
        "colour": colour,
        "shape": shape,
        "side": side,
        "all": colour and shape and side,
        "size": size,
        "background": background,
    }
