"""One tokenizer for text and pictures over one id space: image codes, text pieces, special tokens (spec 1).

Dims: B batch, G codes of a picture in raster order, H height, W width.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import overload

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from cogview2.pipeline.errors import ConfigError, DataError
from cogview2.pipeline.models.vqvae.model import VQVAE
from cogview2.pipeline.tokenizers.image import ImageTokenizer, fit_square, to_rgb
from cogview2.pipeline.tokenizers.text import TextTokenizer
from cogview2.pipeline.tokenizers.vocabulary import SPECIAL_TOKENS, Vocabulary

RATE = 8
"""Pixels per code, each way, that CogView2 uses."""
_IMAGE_PIECE = re.compile(r"<image_(0|[1-9][0-9]*)>")
Codes = Tensor | np.ndarray | Sequence[int] | Sequence[Sequence[int]]
Picture = str | Path | Image.Image | Tensor


class Icetk:
    """Text to ids and back, pictures to codes and back, names of ids. Immutable."""

    def __init__(self, text: TextTokenizer, vqvae: VQVAE | None = None) -> None:
        """Join the two halves.

        Args:
            text: with the id layout of both.
            vqvae: its codebook has `vocabulary.image_codes` codes; without one there are no pictures.

        Raises:
            ConfigError: the codebook does not fit the id layout.
        """
        codes = text.vocabulary.image_codes if vqvae is None else vqvae.config.codebook_size
        if codes != text.vocabulary.image_codes:
            raise ConfigError(
                f"the codebook has {codes} codes, but the id layout has room for {text.vocabulary.image_codes}; "
                "take image and text tokenizer from the same place"
            )
        self.text, self.vqvae = text, vqvae

    @property
    def vocabulary(self) -> Vocabulary:
        """The id layout."""
        return self.text.vocabulary

    def __len__(self) -> int:
        """Return how many ids have a name (published: 150003)."""
        return self.vocabulary.text_end + len(SPECIAL_TOKENS)

    @overload
    def __getitem__(self, key: int) -> str: ...
    @overload
    def __getitem__(self, key: str) -> int: ...
    def __getitem__(self, key: int | str) -> str | int:
        """Return the name of an id, or the id of a name: a piece, `<image_k>`, or a special token.

        Raises:
            DataError: there is none.
        """
        return self._id(key) if isinstance(key, str) else self._name(int(key))

    def _name(self, token: int) -> str:
        vocabulary = self.vocabulary
        if vocabulary.is_image(token):
            return f"<image_{token}>"
        if vocabulary.is_text(token):
            return self.text.piece(token)
        if not vocabulary.text_end <= token < len(self):
            raise DataError(f"id {token} has no name; ids are 0 to {len(self) - 1}")
        return SPECIAL_TOKENS[token - vocabulary.text_end]

    def _id(self, name: str) -> int:
        if name in SPECIAL_TOKENS:
            return self.vocabulary.text_end + SPECIAL_TOKENS.index(name)
        code = _IMAGE_PIECE.fullmatch(name)
        if code and self.vocabulary.is_image(int(code[1])):
            return int(code[1])
        return self.text.id_of(name)

    def encode_text(self, text: str, *, ignore_linebreak: bool = True) -> list[int]:
        """Return the ids of `text`; no spelling in it becomes a control token.

        Args:
            text: any text.
            ignore_linebreak: a line break is a space; otherwise the `<n>` id.
        """
        return self.text.encode(text, keep_newlines=not ignore_linebreak)

    def decode_text(self, ids: Iterable[int]) -> str:
        """Return the text of text ids; `<n>` is a line break, other control and special tokens are left out."""
        return self.text.decode(ids)

    def discouraged(self, pieces: Iterable[int] = (), names: Iterable[str] = ()) -> "Icetk":
        """Return a tokenizer that uses some pieces only where nothing else fits; see TextTokenizer.discouraged.

        Args:
            pieces: SentencePiece ids, that is text ids without the offset of the image codes, as published.
            names: pieces by name.
        """
        offset = self.vocabulary.image_codes
        named = [self.text.id_of(name) - offset for name in names]
        return Icetk(self.text.discouraged([*pieces, *named]), self.vqvae)

    def _images(self, rate: int) -> ImageTokenizer:
        if self.vqvae is None:
            raise ConfigError("this tokenizer has no image weights; give Icetk a VQVAE")
        return ImageTokenizer(self.vqvae, rate)

    def encode_image(self, picture: Picture, *, image_size: int | None = None, rate: int = RATE) -> Tensor:
        """Return the codes of pictures.

        Args:
            picture: a path or a PIL image of any mode with 8 bits (transparency is put on white), or a tensor:
                uint8 in [0, 255] or float in [0, 1], [B, 3, H, W], [3, H, W], or grey with 1 channel.
            image_size: resize the shorter side to it and cut out the centre; by default taken as it is, and then
                it must be square.
            rate: pixels per code, each way: 4, 8 or 16.

        Returns:
            int64 [B, (side / rate)^2].

        Raises:
            DataError: no such picture, or one of unusable shape, mode or values.
        """
        pixels_BCHW = picture_tensor(picture)
        if image_size is not None:
            pixels_BCHW = fit_square(pixels_BCHW, image_size)
        if pixels_BCHW.dtype == torch.uint8:
            pixels_BCHW = pixels_BCHW.float() / 255
        return self._images(rate).encode(pixels_BCHW)

    def decode_image(self, codes: Codes, *, rate: int = RATE) -> Tensor:
        """Return the pictures of codes, float32 [B, 3, H, W] in [0, 1].

        Args:
            codes: [G] or [B, G] of square pictures, or [B, H, W]; a tensor, an array or lists.
            rate: that of the codes.

        Raises:
            DataError: codes of another shape, or outside the codebook.
        """
        try:
            codes_X = torch.as_tensor(codes)
        except (ValueError, TypeError) as error:
            raise DataError(
                f"codes are not an array of numbers ({error}); give equally long lists"
            ) from error
        images = self._images(rate)
        if codes_X.ndim == 3:
            return images.decode_grid(codes_X)
        return images.decode(codes_X[None] if codes_X.ndim == 1 else codes_X)

    def decode(self, ids: Iterable[int], *, rate: int = RATE) -> list[str | Tensor]:
        """Return the parts of a mixed sequence in order: texts, and pictures float32 [3, H, W].

        Every unbroken run of image codes is one square picture. Special tokens only part the runs.

        Raises:
            DataError: a run of codes that makes no square, or an id outside the layout.
        """
        parts: list[str | Tensor] = []
        for is_image, run in groupby((int(token) for token in ids), self.vocabulary.is_image):
            if is_image:
                parts.append(self.decode_image(list(run), rate=rate)[0])
            else:
                text = self.text.decode(run)
                parts += [text] if text else []
        return parts


def picture_tensor(picture: Picture) -> Tensor:
    """Return pixels [B, 3, H, W], uint8 in [0, 255] or float in [0, 1]; see Icetk.encode_image.

    Raises:
        DataError: a file that cannot be read as a picture, or a tensor of another shape or dtype.
    """
    if isinstance(picture, str | Path):
        try:
            with Image.open(picture) as image:
                return picture_tensor(ImageOps.exif_transpose(image))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"cannot read the picture {picture} ({error}); give a PNG or JPEG") from error
    if isinstance(picture, Image.Image):
        return torch.from_numpy(np.array(to_rgb(picture))).permute(2, 0, 1)[None]
    pixels_BCHW = picture[None] if picture.ndim == 3 else picture
    if pixels_BCHW.ndim != 4 or pixels_BCHW.shape[1] not in (1, 3):
        raise DataError(
            f"a picture tensor is [B, 3, H, W], [3, H, W] or grey with 1 channel, not {list(picture.shape)}"
        )
    if pixels_BCHW.dtype != torch.uint8 and not pixels_BCHW.is_floating_point():
        raise DataError(f"a picture tensor is uint8 or float, not {picture.dtype}; convert it")
    return pixels_BCHW.expand(-1, 3, -1, -1)
