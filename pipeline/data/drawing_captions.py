"""Sentences about a drawing, in English and Chinese, with the facts that each one states."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from cogview2.pipeline.data.drawings import COLOURS, SHAPES, Drawn, Scene

_ZH_COLOURS = {"red": "红", "green": "绿", "blue": "蓝", "orange": "橙", "purple": "紫", "black": "黑"}
_ZH_SHAPES = {
    "circle": ("圆形", "圆"),
    "square": ("正方形", "方块"),
    "triangle": ("三角形",),
    "cross": ("十字",),
    "rectangle": ("长方形",),
}
_ZH_SIZES = {"small": "小", "large": "大"}
_ZH_BACKGROUNDS = {"white": "白色", "grey": "灰色", "beige": "米色"}

# Objects are named from left to right and from the top down. The tables below differ in words alone: sentences
# that also turned the order around would cost a small model several times the training.
_EN_ROW = (
    "{a} to the left of {b}",
    "{a} on the left and {b} on the right",
    "on the left {a}, on the right {b}",
    "{a} left of {b}",
    "{a} with {b} to its right",
    "from left to right {a}, {b}",
)
_EN_COLUMN = (
    "{a} above {b}",
    "{a} on top of {b}",
    "{a} at the top and {b} at the bottom",
    "at the top {a}, at the bottom {b}",
    "{a} with {b} below it",
    "there is {a} over {b}",
)
_ZH_ROW = (
    "{a}在{b}的左边",
    "左边是{a}，右边是{b}",
    "{a}在左边，{b}在右边",
    "{a}右边有{b}",
    "{a}的右边是{b}",
)
_ZH_COLUMN = (
    "{a}在{b}的上面",
    "上面是{a}，下面是{b}",
    "{a}在上面，{b}在下面",
    "{a}下方有{b}",
    "{a}的下面是{b}",
)
_EN_PLACE = {
    "middle": ("{a} in the middle", "{a} in the centre"),
    "left": ("{a} on the left", "on the left there is {a}"),
    "right": ("{a} on the right", "on the right there is {a}"),
    "top": ("{a} at the top", "at the top there is {a}"),
    "bottom": ("{a} at the bottom", "at the bottom there is {a}"),
}
_ZH_PLACE = {
    "middle": ("中间有{a}", "{a}在中间"),
    "left": ("左边有{a}", "{a}在左边"),
    "right": ("右边有{a}", "{a}在右边"),
    "top": ("上面有{a}", "{a}在上面"),
    "bottom": ("下面有{a}", "{a}在下面"),
}
_EN_BARE = ("{a}", "there is {a}", "a picture of {a}", "a drawing of {a}")
_ZH_BARE = ("{a}", "有{a}", "{a}的图片", "画着{a}")


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _english_noun(drawn: Drawn, sized: bool, rng: np.random.Generator) -> str:
    words = f"{drawn.size} {drawn.colour} {drawn.shape}" if sized else f"{drawn.colour} {drawn.shape}"
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _chinese_noun(drawn: Drawn, sized: bool, rng: np.random.Generator) -> str:
    colour = _ZH_COLOURS[drawn.colour] + _pick(rng, ("色的", "色"))
    size = _ZH_SIZES[drawn.size] if sized else ""
    count = _pick(rng, ("一个", ""))
    return f"{count}{size}{colour}{_pick(rng, _ZH_SHAPES[drawn.shape])}"


def _sentence(scene: Scene, nouns: list[str], placed: bool, language: str, rng: np.random.Generator) -> str:
    english = language == "en"
    if len(nouns) == 1:
        if placed:
            return _pick(rng, (_EN_PLACE if english else _ZH_PLACE)[scene.arrangement]).format(a=nouns[0])
        return _pick(rng, _EN_BARE if english else _ZH_BARE).format(a=nouns[0])
    if len(nouns) == 2:
        row, column = (_EN_ROW, _EN_COLUMN) if english else (_ZH_ROW, _ZH_COLUMN)
        return _pick(rng, row if scene.arrangement == "row" else column).format(a=nouns[0], b=nouns[1])
    if english:
        return f"from {'left to right' if scene.arrangement == 'row' else 'top to bottom'} {', '.join(nouns)}"
    return f"{'从左到右' if scene.arrangement == 'row' else '从上到下'}是{'、'.join(nouns)}"


def describe(scene: Scene, language: str, rng: np.random.Generator) -> tuple[str, dict[str, Any]]:
    """Return a caption of `scene` and the facts that it states.

    Facts: `objects` in drawing order, each with colour and shape (and size where stated); `arrangement`, or None
    where the sentence leaves the place open; `background`, or None.
    """
    sized = [bool(rng.random() < 0.3) for _ in scene.objects]
    placed = len(scene.objects) > 1 or bool(rng.random() < 0.7)
    noun = _english_noun if language == "en" else _chinese_noun
    nouns = [noun(drawn, with_size, rng) for drawn, with_size in zip(scene.objects, sized, strict=True)]
    text = _sentence(scene, nouns, placed, language, rng)
    with_background = bool(rng.random() < 0.3)
    if with_background:
        if language == "en":
            text += f" on a {scene.background} background"
        else:
            text = f"{_ZH_BACKGROUNDS[scene.background]}背景，{text}"
    objects = [
        {"colour": drawn.colour, "shape": drawn.shape} | ({"size": drawn.size} if with_size else {})
        for drawn, with_size in zip(scene.objects, sized, strict=True)
    ]
    return text, {
        "objects": objects,
        "arrangement": scene.arrangement if placed else None,
        "background": scene.background if with_background else None,
    }


_EN_OBJECT = re.compile(rf"\b({'|'.join(COLOURS)}) +({'|'.join(SHAPES)})\b")
_ZH_COLOUR_NAMES = {word: name for name, word in _ZH_COLOURS.items()}
_ZH_SHAPE_NAMES = {word: name for name, words in _ZH_SHAPES.items() for word in words}
# Longer words first: one shape's name ends with another's.
_ZH_OBJECT = re.compile(
    rf"({'|'.join(_ZH_COLOUR_NAMES)})色?的?({'|'.join(sorted(_ZH_SHAPE_NAMES, key=len, reverse=True))})"
)


def read_objects(text: str, language: str) -> list[tuple[str, str]]:
    """Return the (colour, shape) pairs that a caption names, in its order: what `describe` wrote, or a model.

    Words that it does not know are passed over.
    """
    if language == "en":
        return [(str(colour), str(shape)) for colour, shape in _EN_OBJECT.findall(text.lower())]
    return [(_ZH_COLOUR_NAMES[colour], _ZH_SHAPE_NAMES[shape]) for colour, shape in _ZH_OBJECT.findall(text)]


def names_objects(text: str, language: str, objects: Sequence[dict[str, Any]]) -> bool:
    """Return whether a caption names exactly the colours and shapes of `objects`, whatever their order."""
    return sorted(read_objects(text, language)) == sorted((o["colour"], o["shape"]) for o in objects)
