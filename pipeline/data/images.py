"""Encoded bytes -> an upright RGB picture, or a refusal with its reason; never starts another program."""

import contextlib
import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cogview2.pipeline.config.data import ImageRulesConfig
from cogview2.pipeline.data.records import RefusedError

_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
)
_UNSUPPORTED: tuple[tuple[bytes, str], ...] = (
    (b"%!PS", "EPS"),
    (b"\xc5\xd0\xd3\xc6", "EPS"),
    (b"%PDF", "PDF"),
    (b"8BPS", "PSD"),
    (b"\x00\x00\x01\x00", "ICO"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (b"II+\x00", "BigTIFF"),
    (b"MM\x00+", "BigTIFF"),
)
_HEADER_BYTES = 1024
_RGB_MODES = frozenset({"1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"})
_WHITE = (255, 255, 255)


def _is_svg(header: bytes) -> bool:
    text = header.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<svg", b"<!doctype svg")):
        return True
    return text.startswith((b"<?xml", b"<!--")) and b"<svg" in text and b"<html" not in text


def _format_of(data: bytes) -> str:
    """Tell the format from the first bytes; the file name is never believed."""
    if not data:
        raise RefusedError("image_empty", "the file has no bytes")
    header = data[:_HEADER_BYTES]
    if header[:4] == b"RIFF" and header[8:12] == b"WEBP":
        return "WEBP"
    for signature, name in _SIGNATURES:
        if header.startswith(signature):
            return name
    unsupported = next((name for signature, name in _UNSUPPORTED if header.startswith(signature)), None)
    if header[4:8] == b"ftyp":
        unsupported = f"ISO media ({header[8:12].decode('ascii', 'replace')}: HEIC, AVIF or video)"
    elif _is_svg(header):
        unsupported = "SVG"
    if unsupported:
        raise RefusedError("image_unsupported_format", f"{unsupported}; convert it to JPEG, PNG or WebP")
    raise RefusedError("image_not_an_image", f"starts with {data[:16]!r}, which no picture format does")


def _check_size(size: tuple[int, int], rules: ImageRulesConfig, min_side: int) -> None:
    width, height = size
    if width * height > rules.max_pixels:
        raise RefusedError(
            "image_too_many_pixels", f"{width}x{height} is above data.images.max_pixels {rules.max_pixels}"
        )
    if min(size) < max(min_side, 1):
        raise RefusedError("image_too_small", f"{width}x{height} has a side below {min_side}")
    if max(size) > rules.max_aspect * min(size):
        raise RefusedError(
            "image_extreme_aspect", f"{width}x{height} is beyond data.images.max_aspect {rules.max_aspect}"
        )


def _upright(image: Image.Image) -> Image.Image:
    with contextlib.suppress(
        Exception
    ):  # EXIF is hostile text: whatever it breaks, the pixels are still good
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Scale 0..65535 to 0..255; Pillow's own conversion would clip everything above 255 to white."""
    grey = np.asarray(image).astype(np.uint32)
    result = ((grey + 128) // 257).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        result[grey == transparent] = 255
    return Image.fromarray(result).convert("RGB")


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return `image` in RGB; no copy is made where there is nothing to convert, a picture may have 64 Mpx."""
    if image.mode.startswith("I;16"):
        return _from_16_bit(image)
    if image.has_transparency_data:
        layers = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", layers.size, _WHITE)
        white.paste(layers, mask=layers.getchannel("A"))
        return white
    if image.mode not in _RGB_MODES:
        raise RefusedError(
            "image_unsupported_format", f"pixel mode {image.mode} has no agreed black and white"
        )
    return image if image.mode == "RGB" else image.convert("RGB")


def _reason_of(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return "image_too_many_pixels"
    return "image_truncated" if "truncated" in str(error).lower() else "image_corrupt"


def open_image(data: bytes, rules: ImageRulesConfig, min_side: int) -> Image.Image:
    """Decode one picture.

    The first frame of an animation is taken, the EXIF orientation applied, transparency put on white, 16-bit
    grey scaled, and everything converted to RGB. Colour profiles are ignored.

    Args:
        data: the encoded file: JPEG, PNG, WebP, GIF, BMP or TIFF, told from the bytes.
        rules: limits on bytes, pixels and aspect; checked from the header, before any pixel is decoded.
        min_side: least shorter side in pixels.

    Returns:
        The picture, mode RGB, upright.

    Raises:
        RefusedError: reason image_empty, image_file_too_large, image_not_an_image, image_unsupported_format,
            image_corrupt, image_truncated, image_too_many_pixels, image_too_small or image_extreme_aspect.
    """
    if len(data) > rules.max_file_bytes:
        raise RefusedError(
            "image_file_too_large", f"{len(data)} bytes; data.images.max_file_bytes is {rules.max_file_bytes}"
        )
    name = _format_of(data)
    try:
        with Image.open(io.BytesIO(data), formats=(name,)) as image:
            _check_size(image.size, rules, min_side)
            image.load()
            _check_size(image.size, rules, min_side)
            return _to_rgb(_upright(image))
    except RefusedError:
        raise
    except UnidentifiedImageError as error:
        raise RefusedError("image_corrupt", f"the {name} header is damaged or cut") from error
    except Exception as error:  # decoders raise a dozen types on hostile bytes
        raise RefusedError(_reason_of(error), f"{name}: {type(error).__name__}: {error}") from error


def square(image: Image.Image, size: int) -> Image.Image:
    """Return `image` as size x size pixels: shorter side resized with antialiasing, centre crop."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))


def to_array(image: Image.Image) -> np.ndarray:
    """Return the pixels of an RGB picture as uint8 [3, H, W]."""
    return np.ascontiguousarray(np.asarray(image.convert("RGB"), dtype=np.uint8).transpose(2, 0, 1))
