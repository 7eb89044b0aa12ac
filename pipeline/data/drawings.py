"""The generated data set: seeded drawings of a few objects, with captions in English and Chinese.

Every picture is a pure function of (seed, split, number). Its metadata holds, for each language, the facts
that the caption states, so that `oracle.py` can tell from pixels alone whether a picture obeys its caption.
"""

import dataclasses
import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from cogview2.pipeline.config.base import fingerprint
from cogview2.pipeline.config.data import DataConfig
from cogview2.pipeline.data.records import RawPair, Refusal

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "green": (44, 150, 60),
    "blue": (35, 85, 215),
    "orange": (240, 130, 20),
    "purple": (140, 60, 175),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "cross", "rectangle")
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (252, 252, 252),
    "grey": (200, 200, 200),
    "beige": (245, 225, 190),
}
SIZES: dict[str, float] = {"small": 0.165, "large": 0.21}
"""Half the side of an object / side of the picture."""
PLACES: dict[str, tuple[float, float]] = {
    "middle": (0.5, 0.5), "left": (0.25, 0.5), "right": (0.75, 0.5), "top": (0.5, 0.25), "bottom": (0.5, 0.75)
}  # fmt: skip
"""Quarters of the side, so that without jitter an object lies on a grid of codes the same way at every place."""
_CROWDED = 0.75
"""Three objects are drawn smaller by this factor: at full size they would touch."""
_SUPERSAMPLING = 3


@dataclass(frozen=True)
class Drawn:
    """One object: names, centre and half side as shares of the picture's side (x to the right, y down)."""

    colour: str
    shape: str
    size: str
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """What is in a picture. `arrangement`: a key of PLACES for one object, `row` (left to right) or `column` (top down)."""

    objects: tuple[Drawn, ...]
    background: str
    arrangement: str


def outline(shape: str, x: float, y: float, half: float) -> list[tuple[float, float]]:
    """Return the polygon of `shape` around (x, y) in the unit of the arguments; circles have 48 corners."""
    if shape == "circle":
        turns = [2 * math.pi * k / 48 for k in range(48)]
        return [(x + half * math.cos(t), y + half * math.sin(t)) for t in turns]
    table: dict[str, list[tuple[float, float]]] = {
        "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        "triangle": [(0, -1), (1, 0.85), (-1, 0.85)],
        "rectangle": [(-1, -0.5), (1, -0.5), (1, 0.5), (-1, 0.5)],
        "cross": [
            (-0.32, -1), (0.32, -1), (0.32, -0.32), (1, -0.32), (1, 0.32), (0.32, 0.32),
            (0.32, 1), (-0.32, 1), (-0.32, 0.32), (-1, 0.32), (-1, -0.32), (-0.32, -0.32),
        ],
    }  # fmt: skip
    return [(x + half * dx, y + half * dy) for dx, dy in table[shape]]


def render(scene: Scene, size: int) -> Image.Image:
    """Draw `scene` as an RGB picture of size x size pixels, antialiased."""
    side = size * _SUPERSAMPLING
    image = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    canvas = ImageDraw.Draw(image)
    scale = side * (_CROWDED if len(scene.objects) == 3 else 1)
    for drawn in scene.objects:
        corners = outline(drawn.shape, drawn.x * side, drawn.y * side, SIZES[drawn.size] * scale)
        canvas.polygon(corners, fill=COLOURS[drawn.colour])
    return image.reduce(_SUPERSAMPLING)


def unseen_pairs(share: float, seed: int) -> frozenset[tuple[str, str]]:
    """Return the (colour, shape) pairs kept out of training: at least `share` of all, spread over colours and shapes."""
    # Rounded first: 0.1 of 30 is 3.0000000000000004.
    wanted = math.ceil(round(share * len(COLOURS) * len(SHAPES), 9))
    rng = np.random.default_rng(_seed_of(seed, "pairs", 0))
    colours, shapes = list(rng.permutation(list(COLOURS))), list(rng.permutation(SHAPES))
    # Diagonals of the colour x shape table: each one takes a different shape for each colour.
    pairs = [
        (str(colour), str(shapes[(row + shift) % len(shapes)]))
        for shift in range(len(shapes))
        for row, colour in enumerate(colours)
    ]
    return frozenset(pairs[:wanted])


def draw_scene(
    rng: np.random.Generator,
    pairs: list[tuple[str, str]],
    max_objects: int,
    jitter: float,
    must: list[tuple[str, str]] | None = None,
) -> Scene:
    """Draw a scene whose objects are distinct (colour, shape) pairs from `pairs`, at least one of them from `must`.

    Each centre is moved by up to `jitter` of the picture's side, each way.
    """
    weights = np.array([0.5, 0.5, 0.4][:max_objects])
    count = 1 + int(rng.choice(max_objects, p=weights / weights.sum()))
    chosen = [pairs[k] for k in rng.choice(len(pairs), size=count, replace=False)]
    if must and not set(chosen) & set(must):
        chosen[int(rng.integers(count))] = must[int(rng.integers(len(must)))]
    sizes = [str(rng.choice(list(SIZES))) if count < 3 else "small" for _ in chosen]
    if count == 1:
        arrangement = str(rng.choice(list(PLACES)))
        centres = [PLACES[arrangement]]
    else:
        arrangement = str(rng.choice(["row", "column"]))
        along = [0.25, 0.75] if count == 2 else [0.17, 0.5, 0.83]
        centres = [(a, 0.5) if arrangement == "row" else (0.5, a) for a in along]
    objects = tuple(
        Drawn(
            colour,
            shape,
            size,
            x + float(rng.uniform(-jitter, jitter)),
            y + float(rng.uniform(-jitter, jitter)),
        )
        for (colour, shape), size, (x, y) in zip(chosen, sizes, centres, strict=True)
    )
    return Scene(objects, str(rng.choice(list(BACKGROUNDS))), arrangement)


def replace_object(
    scene: Scene, number: int, pairs: Sequence[tuple[str, str]], rng: np.random.Generator
) -> Scene:
    """Return `scene` with another (colour, shape) of `pairs` in place of object `number`, in a colour not yet there."""
    colours = {drawn.colour for drawn in scene.objects}
    fitting = [pair for pair in pairs if pair[0] not in colours]
    colour, shape = fitting[int(rng.integers(len(fitting)))]
    objects = list(scene.objects)
    objects[number] = dataclasses.replace(objects[number], colour=colour, shape=shape)
    return dataclasses.replace(scene, objects=tuple(objects))


def object_box(scene: Scene, number: int) -> tuple[float, float, float, float]:
    """Return x0, y0, x1, y1 of a square that holds object `number` whatever its shape, as shares of the side."""
    drawn = scene.objects[number]
    half = SIZES[drawn.size] * (_CROWDED if len(scene.objects) == 3 else 1)
    return drawn.x - half, drawn.y - half, drawn.x + half, drawn.y + half


def _seed_of(seed: int, split: str, number: int) -> int:
    digest = hashlib.sha256(f"{seed}:{split}:{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


class DrawingsSource:
    """The generated set as a source of records: splits train, held_out and unseen (see `unseen_pairs`)."""

    def __init__(self, config: DataConfig, seed: int) -> None:
        self._size = config.superres_size
        self._languages = config.languages
        self._seed = seed
        self._max_objects = config.drawings.max_objects
        self._jitter = config.drawings.jitter
        unseen = unseen_pairs(config.drawings.held_out_pairs, seed)
        every = [(colour, shape) for colour in COLOURS for shape in SHAPES]
        self._seen = [pair for pair in every if pair not in unseen]
        self._unseen = sorted(unseen)
        self.trained_pairs: tuple[tuple[str, str], ...] = tuple(self._seen)
        """The (colour, shape) pairs that occur in training."""
        counts = {
            "train": config.drawings.count,
            "held_out": config.held_out,
            "unseen": config.held_out if unseen else 0,
        }
        self._items = [(split, number) for split, count in counts.items() for number in range(count)]
        self.keys = [f"{split}-{number:06d}" for split, number in self._items]
        self.splits = {
            split: [i for i, item in enumerate(self._items) if item[0] == split] for split in counts
        }
        self.refused: list[Refusal] = []
        self.fingerprint = fingerprint(
            "drawings-2",
            config.drawings,
            {
                "size": self._size,
                "languages": list(self._languages),
                "seed": seed,
                "held_out": config.held_out,
            },
        )
        self.description = (
            f"{config.drawings.count} generated drawings, {len(self._seen)} (colour, shape) pairs in training, "
            f"{len(self._unseen)} never"
        )

    def __len__(self) -> int:
        return len(self._items)

    def scene(self, index: int) -> Scene:
        """Return what is in picture `index`."""
        split, number = self._items[index]
        rng = np.random.default_rng(_seed_of(self._seed, split, number))
        if split == "unseen":
            return draw_scene(
                rng, self._seen + self._unseen, self._max_objects, self._jitter, must=self._unseen
            )
        return draw_scene(rng, self._seen, self._max_objects, self._jitter)

    def read(self, index: int) -> RawPair:
        """Return picture `index` as PNG bytes with its captions; metadata["facts"] tells what each caption states."""
        from cogview2.pipeline.data.drawing_captions import describe

        split, number = self._items[index]
        scene = self.scene(index)
        rng = np.random.default_rng(_seed_of(self._seed, f"{split}-captions", number))
        captions: dict[str, str] = {}
        facts: dict[str, Any] = {}
        for language in self._languages:
            captions[language], facts[language] = describe(scene, language, rng)
        buffer = io.BytesIO()
        render(scene, self._size).save(buffer, "PNG", compress_level=1)
        objects = [{"colour": o.colour, "shape": o.shape, "size": o.size} for o in scene.objects]
        metadata = {
            "facts": facts,
            "objects": objects,
            "background": scene.background,
            "arrangement": scene.arrangement,
        }
        return RawPair(self.keys[index], buffer.getvalue(), captions, metadata)
