import io
from functools import cache

import numpy as np
import pytest
from PIL import Image, ImageFilter

from cogview2.pipeline.config.data import DataConfig, DrawingsConfig
from cogview2.pipeline.data.drawings import COLOURS, PLACES, SHAPES, DrawingsSource, Drawn, Scene, render
from cogview2.pipeline.data.oracle import Reading, Seen, check, components, read_picture

COUNT = 400


@cache
def originals(max_objects: int) -> tuple[list[Image.Image], list[dict]]:
    drawings = DrawingsConfig(count=COUNT, max_objects=max_objects)
    data = DataConfig(base_size=32, compression_rate=4, superres_ratio=2, held_out=1, drawings=drawings)
    pairs = [DrawingsSource(data, 11).read(index) for index in range(COUNT)]
    return [Image.open(io.BytesIO(pair.image)).convert("RGB") for pair in pairs], [
        pair.metadata["facts"] for pair in pairs
    ]


@cache
def readings(max_objects: int, side: int) -> list[Reading]:
    small = [picture.resize((side, side), Image.Resampling.BILINEAR) for picture in originals(max_objects)[0]]
    return [read_picture(np.asarray(picture)) for picture in small]


@pytest.mark.parametrize(
    ("max_objects", "side", "least"), [(2, 64, 0.995), (2, 32, 0.995), (3, 64, 0.99), (3, 32, 0.9)]
)
@pytest.mark.parametrize("language", ["en", "zh"])
def test_originals_obey_their_captions(max_objects: int, side: int, least: float, language: str) -> None:
    _, facts = originals(max_objects)
    verdicts = [
        check(reading, stated[language])
        for reading, stated in zip(readings(max_objects, side), facts, strict=True)
    ]
    for key in ("all", "colour", "shape", "side", "size", "background"):
        assert np.mean([verdict[key] for verdict in verdicts]) >= least, key


@pytest.mark.parametrize("side", [64, 32])
def test_the_caption_of_another_picture_is_almost_never_obeyed(side: int) -> None:
    _, facts = originals(2)
    shifted = facts[1:] + facts[:1]
    right = [
        check(reading, stated["en"])["all"]
        for reading, stated in zip(readings(2, side), shifted, strict=True)
    ]
    assert np.mean(right) < 0.02


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_colour_and_shape_is_read(colour: str, shape: str) -> None:
    scene = Scene((Drawn(colour, shape, "large", *PLACES["left"]),), "beige", "left")
    reading = read_picture(np.asarray(render(scene, 64)))
    assert [(seen.colour, seen.shape, seen.size) for seen in reading.objects] == [(colour, shape, "large")]
    assert reading.background == "beige"


def fact(*objects: tuple[str, str], arrangement: str | None = "row") -> dict:
    return {
        "objects": [{"colour": colour, "shape": shape} for colour, shape in objects],
        "arrangement": arrangement,
        "background": None,
    }


LEFT, RIGHT = Seen("red", "circle", "small", 0.26, 0.5), Seen("blue", "square", "small", 0.74, 0.5)
BOTH = Reading((RIGHT, LEFT), "white")


@pytest.mark.parametrize(
    ("facts", "colour", "shape", "side"),
    [
        (fact(("red", "circle"), ("blue", "square")), True, True, True),
        (fact(("blue", "square"), ("red", "circle")), True, True, False),
        (fact(("red", "circle"), ("blue", "square"), arrangement="column"), True, True, False),
        (fact(("red", "square"), ("blue", "circle")), True, False, True),
        (fact(("red", "circle"), ("green", "square")), False, False, False),
        (fact(("red", "circle"), arrangement="left"), False, False, False),
        (fact(("red", "circle"), ("blue", "square"), ("red", "circle")), False, False, False),
    ],
)
def test_each_part_of_a_verdict(facts: dict, colour: bool, shape: bool, side: bool) -> None:
    verdict = check(BOTH, facts)
    assert (verdict["colour"], verdict["shape"], verdict["side"]) == (colour, shape, side)
    assert verdict["all"] == (colour and shape and side)


def test_size_and_background_count_where_stated() -> None:
    stated = fact(("red", "circle"), arrangement=None)
    stated["objects"][0]["size"] = "large"
    verdict = check(Reading((LEFT,), "white"), stated | {"background": "grey"})
    assert verdict["all"] and not verdict["size"] and not verdict["background"]


@pytest.mark.parametrize("kind", ["empty", "noise", "black"])
def test_pictures_that_are_no_drawings_are_read_without_an_error(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    picture = {
        "empty": np.full((32, 32, 3), 252, np.uint8),
        "noise": noise,
        "black": np.zeros((32, 32, 3), np.uint8),
    }[kind]
    reading = read_picture(picture)
    assert kind == "noise" or reading.objects == ()
    assert not check(reading, fact(("red", "circle"), arrangement=None))["all"]


def test_components_are_found_largest_first() -> None:
    mask = np.zeros((9, 9), dtype=bool)
    mask[0, 0] = mask[1, 1] = True  # diagonal: two blobs
    mask[3:8, 3] = mask[7, 3:8] = mask[3:8, 7] = True  # a U
    assert [int(blob.sum()) for blob in components(mask)] == [13, 1, 1]
    assert components(np.zeros((3, 3), dtype=bool)) == []


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("side", [32, 64])
def test_sizes_survive_a_blur(shape: str, size: str, side: int) -> None:
    scene = Scene((Drawn("blue", shape, size, 0.5, 0.5),), "white", "middle")
    picture = render(scene, 64).resize((side, side), Image.Resampling.BOX)
    blurred = picture.filter(ImageFilter.GaussianBlur(side / 96))
    (seen,) = read_picture(np.asarray(blurred)).objects
    assert seen.size == size
