import io
import re
from functools import cache

import numpy as np
import pytest
from PIL import Image

from cogview2.pipeline.config.data import DataConfig, DrawingsConfig
from cogview2.pipeline.data.drawing_captions import describe, names_objects, read_objects
from cogview2.pipeline.data.drawings import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    DrawingsSource,
    Drawn,
    Scene,
    object_box,
    render,
    replace_object,
    unseen_pairs,
)

ZH_COLOURS = {"red": "红", "green": "绿", "blue": "蓝", "orange": "橙", "purple": "紫", "black": "黑"}
ZH_SHAPES = {"circle": "圆", "square": "方", "triangle": "三角", "cross": "十字", "rectangle": "长方"}


@cache
def source(
    count: int = 400, max_objects: int = 2, share: float = 0.3, seed: int = 7, languages: tuple = ("en", "zh")
) -> DrawingsSource:
    drawings = DrawingsConfig(count=count, max_objects=max_objects, held_out_pairs=share)
    data = DataConfig(
        base_size=32,
        compression_rate=4,
        superres_ratio=2,
        held_out=60,
        drawings=drawings,
        languages=languages,
    )
    return DrawingsSource(data, seed)


def pairs_of(drawings: DrawingsSource, split: str) -> list[set[tuple[str, str]]]:
    return [{(o.colour, o.shape) for o in drawings.scene(i).objects} for i in drawings.splits[split]]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.69])
@pytest.mark.parametrize("seed", [0, 1, 1234])
def test_unseen_pairs_leave_every_colour_and_shape_in_training(share: float, seed: int) -> None:
    unseen = unseen_pairs(share, seed)
    assert share * 30 - 1e-6 <= len(unseen) < share * 30 + 1 - 1e-6
    seen = {(colour, shape) for colour in COLOURS for shape in SHAPES} - unseen
    assert {colour for colour, _ in seen} == set(COLOURS)
    assert {shape for _, shape in seen} == set(SHAPES)


def test_unseen_pairs_depend_on_the_seed() -> None:
    assert len({unseen_pairs(0.3, seed) for seed in range(5)}) > 1


@pytest.mark.parametrize("max_objects", [1, 2, 3])
def test_unseen_pairs_never_occur_in_train_or_held_out(max_objects: int) -> None:
    drawings = source(max_objects=max_objects)
    unseen = unseen_pairs(0.3, 7)
    for split in ("train", "held_out"):
        assert not any(found & unseen for found in pairs_of(drawings, split))
    assert all(found & unseen for found in pairs_of(drawings, "unseen"))


def test_training_shows_every_colour_shape_background_and_place() -> None:
    scenes = [source().scene(i) for i in source().splits["train"]]
    objects = [drawn for scene in scenes for drawn in scene.objects]
    assert {o.colour for o in objects} == set(COLOURS)
    assert {o.shape for o in objects} == set(SHAPES)
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    assert {scene.arrangement for scene in scenes} == {*PLACES, "row", "column"}


def test_splits_partition_the_set() -> None:
    drawings = source()
    everything = [i for split in drawings.splits.values() for i in split]
    assert sorted(everything) == list(range(len(drawings)))
    assert {split: len(found) for split, found in drawings.splits.items()} == {
        "train": 400,
        "held_out": 60,
        "unseen": 60,
    }
    assert len(set(drawings.keys)) == len(drawings)


def test_no_unseen_split_without_unseen_pairs() -> None:
    assert source(share=0.0).splits["unseen"] == []


def test_a_record_is_a_pure_function_of_seed_and_number() -> None:
    source.cache_clear()
    first = source().read(17)
    source.cache_clear()
    more = source(count=500)
    assert more.read(17) == first  # neither a new object nor a larger set changes it
    assert source(seed=8).read(17) != first


def test_held_out_pictures_are_not_training_pictures() -> None:
    train = {source().scene(i) for i in source().splits["train"]}
    assert not any(source().scene(i) in train for i in source().splits["held_out"])


@pytest.mark.parametrize(
    "change", [{"count": 401}, {"max_objects": 1}, {"share": 0.2}, {"seed": 8}, {"languages": ("en",)}]
)
def test_fingerprint_follows_what_decides_the_records(change: dict) -> None:
    assert source(**change).fingerprint != source().fingerprint
    source.cache_clear()
    assert source().fingerprint == source().fingerprint


def test_pictures_have_the_final_size() -> None:
    picture = Image.open(io.BytesIO(source().read(0).image))
    assert (picture.size, picture.mode, picture.format) == ((64, 64), "RGB", "PNG")


@pytest.mark.parametrize("max_objects", [1, 2, 3])
def test_objects_stay_inside_the_picture(max_objects: int) -> None:
    drawings = source(max_objects=max_objects)
    for index in drawings.splits["train"][:100]:
        scene = drawings.scene(index)
        pixels = np.asarray(render(scene, 64)).astype(int)
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert np.array_equal(border, np.broadcast_to(BACKGROUNDS[scene.background], border.shape))


def test_captions_and_facts_agree_with_the_scene() -> None:
    drawings = source(max_objects=3)
    for index in range(300):
        pair, scene = drawings.read(index), drawings.scene(index)
        assert set(pair.captions) == {"en", "zh"} == set(pair.metadata["facts"])
        for language, facts in pair.metadata["facts"].items():
            caption = pair.captions[language]
            assert [(o["colour"], o["shape"]) for o in facts["objects"]] == [
                (o.colour, o.shape) for o in scene.objects
            ]
            colours, shapes = (ZH_COLOURS, ZH_SHAPES) if language == "zh" else (None, None)
            for stated, drawn in zip(facts["objects"], scene.objects, strict=True):
                assert (colours[drawn.colour] if colours else drawn.colour) in caption
                assert (shapes[drawn.shape] if shapes else drawn.shape) in caption
                assert stated.get("size", drawn.size) == drawn.size
            sizes = sum(
                caption.count(word) for word in (("小", "大") if language == "zh" else ("small", "large"))
            )
            assert sizes == sum("size" in stated for stated in facts["objects"])
            assert ("background" in caption or "背景" in caption) == (facts["background"] is not None)
            assert facts["background"] in (None, scene.background)
            assert facts["arrangement"] in (None, scene.arrangement)


FIRST = Drawn("red", "circle", "small", 0.3, 0.5)
SECOND = Drawn("blue", "square", "large", 0.7, 0.5)
MARKS = {
    "row": {
        "en": (
            "to the left of",
            "on the left",
            "^on the left",
            " left of ",
            "to its right",
            "from left to right",
        ),
        "zh": ("在.*的左边", "左边是.*右边是", "在左边", "右边有", "的右边是"),
    },
    "column": {
        "en": ("above", "on top of", "at the top and", "^at the top", "below it", "over"),
        "zh": ("在.*的上面", "上面是.*下面是", "在上面", "下方有", "的下面是"),
    },
}


@pytest.mark.parametrize("arrangement", ["row", "column"])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_sentences_name_the_objects_from_left_to_right_and_from_the_top_down(
    arrangement: str, language: str
) -> None:
    scene = Scene((FIRST, SECOND), "white", arrangement)
    rng = np.random.default_rng(0)
    used = set()
    for _ in range(200):
        caption, _ = describe(scene, language, rng)
        names = ("red", "blue") if language == "en" else ("红", "蓝")
        assert caption.index(names[0]) < caption.index(names[1]), caption
        marks = [mark for mark in MARKS[arrangement][language] if re.search(mark, caption)]
        assert marks, caption
        used.update(marks)
    assert used == set(MARKS[arrangement][language])


def test_captions_are_read_back() -> None:
    drawn = source()
    for index in range(200):
        pair = drawn.read(index)
        for language, text in pair.captions.items():
            assert names_objects(text, language, pair.metadata["objects"]), text
            wanted = [(o["colour"], o["shape"]) for o in pair.metadata["facts"][language]["objects"]]
            assert read_objects(text, language) == wanted


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("a red square", "en"),
        ("a red circle and a red circle", "en"),
        ("a reddish circle", "en"),
        ("a circle that is red", "en"),
        ("红色的正方形", "zh"),
        ("红色的圆和蓝色的圆", "zh"),
        ("红色背景", "zh"),
    ],
)
def test_other_captions_are_wrong(text: str, language: str) -> None:
    circle = [{"colour": "red", "shape": "circle"}]
    assert names_objects("there is a red circle", "en", circle) and names_objects("红圆形", "zh", circle)
    assert not names_objects(text, language, circle)


def test_a_replaced_object_keeps_its_place() -> None:
    drawn = source()
    rng = np.random.default_rng(0)
    for index in range(40):
        scene = drawn.scene(index)
        number = int(rng.integers(len(scene.objects)))
        new = replace_object(scene, number, drawn.trained_pairs, rng)
        old, made = scene.objects[number], new.objects[number]
        assert (made.x, made.y, made.size) == (old.x, old.y, old.size) and new.background == scene.background
        assert made.colour not in {each.colour for each in scene.objects}
        assert (made.colour, made.shape) in drawn.trained_pairs
        assert [o for k, o in enumerate(new.objects) if k != number] == [
            o for k, o in enumerate(scene.objects) if k != number
        ]
        before, after = (np.asarray(render(each, 64)).astype(int) for each in (scene, new))
        x0, y0, x1, y1 = (round(64 * edge) for edge in object_box(scene, number))
        changed = np.abs(before - after).max(2) > 0
        changed[max(0, y0 - 1) : y1 + 1, max(0, x0 - 1) : x1 + 1] = False
        assert not changed.any()
