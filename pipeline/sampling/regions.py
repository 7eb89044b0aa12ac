"""The geometry of editing: from a picture of any size and a marked part to a working picture, a crop and cells (spec 7).

Boxes are half-open, in pixels, x to the right and y down. F is the side of the working picture, the full size of the
cascade; S is the side of the crop; H and W are those of the picture that a person gave.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as functional
from PIL import Image

from cogview2.pipeline.data.images import square
from cogview2.pipeline.errors import DataError


@dataclass(frozen=True)
class Box:
    """Pixels left <= x < right, top <= y < bottom."""

    left: int
    top: int
    right: int
    bottom: int

    def __str__(self) -> str:
        return f"{self.left},{self.top},{self.right},{self.bottom}"

    @property
    def width(self) -> int:
        """In pixels."""
        return self.right - self.left

    @property
    def height(self) -> int:
        """In pixels."""
        return self.bottom - self.top

    @property
    def slices(self) -> tuple[slice, slice]:
        """Rows and columns, to cut arrays [H, W, ...] with."""
        return slice(self.top, self.bottom), slice(self.left, self.right)


@dataclass(frozen=True)
class Fractions:
    """A box in shares of width and height; it becomes pixels on the working picture alone, as published."""

    left: float
    top: float
    right: float
    bottom: float

    def pixels(self, width: int, height: int) -> Box:
        """Return it in whole pixels of a picture, at least one each way."""
        left, top = min(int(self.left * width), width - 1), min(int(self.top * height), height - 1)
        right, bottom = int(self.right * width), int(self.bottom * height)
        return Box(left, top, max(right, left + 1), max(bottom, top + 1))


Region = Box | Fractions | np.ndarray
"""The part to draw again: a box, or a bool mask [H, W] of any number of parts; all on the picture as given."""


@dataclass(frozen=True)
class Workpiece:
    """The square picture that is edited."""

    pixels: np.ndarray
    """uint8 [F, F, 3]."""
    mask: np.ndarray
    """bool [F, F], True = draw again."""
    kept: Box
    """The square of the given picture that it shows."""
    notes: tuple[str, ...]
    """What was changed on the way, a sentence each."""


def _check(region: Box | np.ndarray, width: int, height: int) -> None:
    """Raise DataError for a region that is empty, reversed, or not inside the picture."""
    if isinstance(region, Box):
        if region.width <= 0 or region.height <= 0:
            raise DataError(
                f"box {region} is empty: x1 {region.right} must be above x0 {region.left} and y1 {region.bottom} above "
                f"y0 {region.top}; give x0,y0,x1,y1"
            )
        if min(region.left, region.top) < 0 or region.right > width or region.bottom > height:
            raise DataError(
                f"box {region} is not inside the picture of {width}x{height} pixels; keep x within 0 to {width} and y "
                f"within 0 to {height}"
            )
        return
    if region.ndim != 2 or region.dtype != np.bool_:
        raise ValueError(f"a mask must be bool [H, W], not {region.dtype} {list(region.shape)}")
    if region.shape != (height, width):
        raise DataError(
            f"the mask has {region.shape[1]}x{region.shape[0]} pixels and the picture {width}x{height}; "
            "draw the mask over the picture at its size"
        )
    if not region.any():
        raise DataError("the mask marks nothing; paint what is to be drawn again white")


def bounds(mask: np.ndarray) -> Box:
    """Return the bounding box of all that is True in `mask`, bool [H, W]; it must not be empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return Box(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def _middle_square(width: int, height: int) -> Box:
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return Box(left, top, left + side, top + side)


def _working_mask(region: Region, kept: Box, full: int, width: int, height: int) -> np.ndarray:
    """Return the region on the working picture, bool [F, F]; empty when it lies where the picture was cut off."""
    mask = np.zeros((full, full), dtype=bool)
    side = kept.width
    if isinstance(region, Fractions):

        def placed(share: float, length: int, origin: int) -> int:
            # A square picture is not cut, and int(F * share) is then the published place, free of rounding.
            exact = full * share if length == side else full * (share * length - origin) / side
            return min(max(int(exact), 0), full)

        left, right = placed(region.left, width, kept.left), placed(region.right, width, kept.left)
        top, bottom = placed(region.top, height, kept.top), placed(region.bottom, height, kept.top)
        mask[top : max(bottom, top + 1), left : max(right, left + 1)] = True
        return mask
    if isinstance(region, Box):

        def mapped(value: int, origin: int) -> int:
            return min(max((value - origin) * full // side, 0), full)

        left, right = mapped(region.left, kept.left), mapped(region.right, kept.left)
        top, bottom = mapped(region.top, kept.top), mapped(region.bottom, kept.top)
        if region.left < kept.right and region.right > kept.left:
            right = max(right, left + 1)
        if region.top < kept.bottom and region.bottom > kept.top:
            bottom = max(bottom, top + 1)
        mask[top:bottom, left:right] = True
        return mask
    cut = region[kept.slices]
    source = (np.arange(full) * 2 + 1) * side // (2 * full)
    mask |= cut[source][:, source]
    rows, columns = np.nonzero(cut)  # also what the sampling misses when the picture shrinks
    mask[rows * full // side, columns * full // side] = True
    return mask


def _grown(start: int, stop: int, least: int, limit: int) -> tuple[int, int]:
    """Return an interval of at least `least` around the given one, shifted to stay in [0, limit)."""
    missing = max(0, least - (stop - start))
    first = min(max(start - missing // 2, 0), limit - (stop - start) - missing)
    return first, first + (stop - start) + missing


def workpiece(picture: Image.Image, region: Region, full: int, least: int) -> Workpiece:
    """Return the working picture: the shorter side at full size, the middle square of it (spec 7).

    Args:
        picture: RGB, any size.
        region: on `picture`.
        full: F in pixels.
        least: a smaller region is grown to this width and height in pixels of the working picture: one code.

    Raises:
        DataError: a region that is empty, reversed, outside of the picture, or wholly in the part that is cut off.
    """
    width, height = picture.size
    marked_at = region.pixels(width, height) if isinstance(region, Fractions) else region
    _check(marked_at, width, height)
    kept = _middle_square(width, height)
    notes = []
    if width != height:
        ends = "left and right" if width > height else "top and bottom"
        rest = max(width, height) - kept.width
        notes.append(
            f"only the middle square of {kept.width}x{kept.width} pixels of the {width}x{height} picture is edited; "
            f"{rest} pixels at its {ends} were cut off"
        )
    if kept.width < full:
        notes.append(
            f"the picture was enlarged from {kept.width}x{kept.width} to {full}x{full} pixels, the size of the models"
        )
    mask = _working_mask(region, kept, full, width, height)
    whole = bounds(marked_at) if isinstance(marked_at, np.ndarray) else marked_at
    outside = whole.left >= kept.right or whole.right <= kept.left
    if not mask.any() or outside or whole.top >= kept.bottom or whole.bottom <= kept.top:
        raise DataError(
            f"box {whole} lies outside of the middle square {kept} of the {width}x{height} picture, and only that is "
            "edited; crop the picture around the part first"
        )
    if (
        whole.left < kept.left
        or whole.right > kept.right
        or whole.top < kept.top
        or whole.bottom > kept.bottom
    ):
        notes.append(f"the marked part {whole} was cut at the edge of that square, {kept}")
    marked = bounds(mask)
    if marked.width < least or marked.height < least:
        left, right = _grown(marked.left, marked.right, least, full)
        top, bottom = _grown(marked.top, marked.bottom, least, full)
        mask[top:bottom, left:right] = True
        notes.append(
            f"the marked part, {marked.width}x{marked.height} pixels of the working picture, is smaller than one code "
            f"and was grown to {right - left}x{bottom - top}"
        )
    return Workpiece(np.asarray(square(picture, full)).copy(), mask, kept, tuple(notes))


def crop_around(mask: np.ndarray, share: float, *, whole: bool) -> Box:
    """Return the square that the models see, in pixels of the working picture (spec 7).

    Its side is the longer one of the marked part's bounding box divided by `share`; it is centred on that box and
    shifted inside the picture.

    Args:
        mask: bool [F, F], not empty.
        share: of the square's side that the region takes.
        whole: always the whole picture, as also when the square would be as large.
    """
    full, marked = len(mask), bounds(mask)
    side = int(
        max(marked.width, marked.height) / share + 1e-9
    )  # 49 / 0.7 is 70.00000000000001 or 69.99999999999999
    if whole or side >= full:
        return Box(0, 0, full, full)
    left = min(max((marked.left + marked.right - side) // 2, 0), full - side)
    top = min(max((marked.top + marked.bottom - side) // 2, 0), full - side)
    return Box(left, top, left + side, top + side)


def cells_of(mask_SS: np.ndarray, grid: int, rule: str = "nearest") -> np.ndarray:
    """Return which cells of a grid over the crop are drawn again, bool [grid, grid]; at least one.

    Args:
        mask_SS: bool, not empty.
        grid: cells each way.
        rule: `nearest`: cells whose pixel in nearest-neighbour resizing is marked (released); `touched`: cells with any
            marked pixel. When the first gives none, the cell with most marked pixels is taken.
    """
    mask = torch.from_numpy(mask_SS)[None, None].float()
    if rule == "touched":
        cells = functional.adaptive_max_pool2d(mask, grid)
    else:
        cells = functional.interpolate(mask, size=(grid, grid), mode="nearest")
    found = cells[0, 0].numpy() >= 0.5
    if not found.any():
        covered = functional.adaptive_avg_pool2d(mask, grid)[0, 0]
        found.flat[int(covered.argmax())] = True
    return np.asarray(found)
