"""From boxes and masks on pictures of any size to crops and cells."""

import numpy as np
import pytest
from PIL import Image

from cogview2.pipeline.errors import DataError
from cogview2.pipeline.sampling.regions import Box, Fractions, bounds, cells_of, crop_around, workpiece


def _picture(width: int, height: int) -> Image.Image:
    ramp = np.zeros((height, width, 3), dtype=np.uint8)
    ramp[..., 0] = np.linspace(0, 255, width).astype(np.uint8)
    ramp[..., 1] = np.linspace(0, 255, height).astype(np.uint8)[:, None]
    return Image.fromarray(ramp)


def test_a_picture_of_the_right_size_stays_as_it_is() -> None:
    picture = _picture(64, 64)
    work = workpiece(picture, Box(8, 16, 40, 48), 64, 4)
    assert np.array_equal(work.pixels, np.asarray(picture))
    assert bounds(work.mask) == Box(8, 16, 40, 48) and work.mask.sum() == 32 * 32
    assert work.notes == () and work.kept == Box(0, 0, 64, 64)


def test_a_wide_picture_is_cut_and_says_so() -> None:
    work = workpiece(_picture(256, 128), Box(64, 0, 128, 64), 64, 4)
    assert work.kept == Box(64, 0, 192, 128)
    assert bounds(work.mask) == Box(0, 0, 32, 32)
    (note,) = work.notes
    assert "256x128" in note and "128 pixels at its left and right were cut off" in note
    assert abs(int(work.pixels[0, 0, 0]) - 64) <= 2  # the left end of the middle square


def test_a_small_picture_is_enlarged_and_says_so() -> None:
    work = workpiece(_picture(16, 32), Box(0, 8, 16, 16), 64, 4)
    assert work.pixels.shape == (64, 64, 3) and bounds(work.mask) == Box(0, 0, 64, 32)
    assert "cut off" in work.notes[0] and "top and bottom" in work.notes[0]
    assert "enlarged from 16x16 to 64x64" in work.notes[1]


def test_a_box_over_the_edge_of_the_square_is_cut() -> None:
    work = workpiece(_picture(256, 128), Box(0, 0, 96, 128), 64, 4)
    assert bounds(work.mask) == Box(0, 0, 16, 64)
    assert "0,0,96,128 was cut at the edge" in work.notes[1]
    with pytest.raises(DataError, match=r"box 0,0,64,128 lies outside of the middle square 64,0,192,128"):
        workpiece(_picture(256, 128), Box(0, 0, 64, 128), 64, 4)
    mask = np.zeros((128, 256), dtype=bool)
    mask[3, 5] = True
    with pytest.raises(DataError, match=r"box 5,3,6,4 lies outside"):
        workpiece(_picture(256, 128), mask, 64, 4)


@pytest.mark.parametrize(
    ("box", "grown"),
    [
        (Box(30, 30, 31, 31), Box(27, 27, 35, 35)),
        (Box(0, 0, 1, 1), Box(0, 0, 8, 8)),
        (Box(63, 63, 64, 64), Box(56, 56, 64, 64)),
        (Box(10, 20, 40, 21), Box(10, 17, 40, 25)),
    ],
)
def test_a_tiny_part_grows_to_one_code_and_says_so(box: Box, grown: Box) -> None:
    work = workpiece(_picture(64, 64), box, 64, 8)
    assert bounds(work.mask) == grown and work.mask.sum() == grown.width * grown.height
    assert f"was grown to {grown.width}x{grown.height}" in work.notes[0]


def test_one_pixel_of_a_huge_picture_is_not_lost() -> None:
    mask = np.zeros((1000, 1000), dtype=bool)
    mask[501, 333] = True
    for region in (mask, Box(333, 501, 334, 502)):
        marked = bounds(workpiece(_picture(1000, 1000), region, 64, 1).mask)
        assert marked == Box(21, 32, 22, 33)


def test_masks_may_have_several_parts() -> None:
    mask = np.zeros((128, 128), dtype=bool)
    mask[10:20, 10:20] = mask[100:120, 60:80] = True
    work = workpiece(_picture(128, 128), mask, 64, 4)
    assert work.mask[5:10, 5:10].all() and work.mask[50:60, 30:40].all()
    assert work.mask.sum() == 25 + 100
    assert bounds(work.mask) == Box(5, 5, 40, 60)
    large = np.kron(mask, np.ones((3, 3), dtype=bool))
    assert np.array_equal(workpiece(_picture(384, 384), large, 128, 4).mask, mask)


@pytest.mark.parametrize(
    ("region", "words"),
    [
        (Box(30, 10, 20, 40), "box 30,10,20,40 is empty: x1 20 must be above x0 30"),
        (Box(10, 10, 20, 10), "y1 10 above y0 10"),
        (Box(-1, 0, 20, 20), "box -1,0,20,20 is not inside the picture of 64x64"),
        (Box(0, 0, 65, 20), "keep x within 0 to 64 and y within 0 to 64"),
        (np.zeros((64, 64), dtype=bool), "the mask marks nothing"),
        (np.ones((32, 64), dtype=bool), "the mask has 64x32 pixels and the picture 64x64"),
    ],
)
def test_refused_regions(region: Box | np.ndarray, words: str) -> None:
    with pytest.raises(DataError, match=words):
        workpiece(_picture(64, 64), region, 64, 4)


def _mask(box: Box, full: int = 480) -> np.ndarray:
    mask = np.zeros((full, full), dtype=bool)
    mask[box.slices] = True
    return mask


def test_crop_sides_are_those_of_the_published_rule() -> None:
    for side in range(1, 480):
        crop = crop_around(_mask(Box(0, 0, side, 1)), 0.7, whole=False)
        expected = int(side * 20 / 14)
        assert crop.width == crop.height == (expected if expected < 480 else 480)


@pytest.mark.parametrize(
    ("marked", "crop"),
    [
        (Box(200, 200, 270, 270), Box(185, 185, 285, 285)),
        (Box(0, 410, 70, 480), Box(0, 380, 100, 480)),
        (Box(100, 200, 170, 210), Box(85, 155, 185, 255)),
        (Box(0, 0, 336, 10), Box(0, 0, 480, 480)),
    ],
)
def test_crops(marked: Box, crop: Box) -> None:
    assert crop_around(_mask(marked), 0.7, whole=False) == crop
    assert crop_around(_mask(marked), 0.7, whole=True) == Box(0, 0, 480, 480)


def test_cells() -> None:
    mask = np.zeros((40, 40), dtype=bool)
    mask[5:20, 9:31] = True  # cells of 10 pixels, sampled at their first pixel
    nearest = cells_of(mask, 4)
    assert np.argwhere(nearest).tolist() == [[1, 1], [1, 2], [1, 3]]
    touched = cells_of(mask, 4, "touched")
    assert np.argwhere(touched).tolist() == [[r, c] for r in (0, 1) for c in range(4)]
    small = np.zeros((40, 40), dtype=bool)
    small[13:18, 24:33] = True
    assert np.argwhere(cells_of(small, 4)).tolist() == [
        [1, 2]
    ]  # missed by the sampling: the most covered one
    assert cells_of(np.ones((3, 3), dtype=bool), 20).all()  # a crop smaller than the grid


@pytest.mark.parametrize("side", [64, 100, 480, 512])
def test_fractions_become_pixels_of_the_working_picture_as_published(side: int) -> None:
    rng = np.random.default_rng(side)
    for _ in range(40):
        (x0, x1), (y0, y1) = np.sort(rng.random((2, 2)))
        if x1 - x0 < 0.05 or y1 - y0 < 0.05:
            continue
        work = workpiece(_picture(side, side), Fractions(x0, y0, x1, y1), 480, 1)
        expected = Box(int(480 * x0), int(480 * y0), int(480 * x1), int(480 * y1))
        assert bounds(work.mask) == expected


def test_fractions_of_a_wide_picture_count_from_its_own_edge() -> None:
    work = workpiece(_picture(256, 128), Fractions(0.25, 0.0, 0.5, 1.0), 64, 4)
    assert bounds(work.mask) == Box(0, 0, 32, 64)
    with pytest.raises(DataError, match="outside of the middle square"):
        workpiece(_picture(256, 128), Fractions(0.0, 0.0, 0.25, 1.0), 64, 4)
    assert Fractions(0.5, 0.5, 0.501, 0.501).pixels(100, 50) == Box(50, 25, 51, 26)
