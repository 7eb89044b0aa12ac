"""Text to model ids and back, with a SentencePiece model; user text never becomes a control id (spec 1.2)."""

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import sentencepiece
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # no stubs in the wheel
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from cogview2.pipeline.errors import DataError
from cogview2.pipeline.tokenizers.vocabulary import (
    BOUNDARY,
    CONTROL_PIECES,
    NEWLINE,
    SPECIAL_TOKENS,
    UNK,
    Vocabulary,
)

NEWLINE_MARK = "\ufdd0"
"""A Unicode noncharacter, never valid in interchanged text: the only spelling of the newline id."""
DISCOURAGED_SCORE = -100.0
"""Log probability of a piece that is to be used only where no other fits."""
_PIECE = model_pb2.ModelProto.SentencePiece
_NEVER_TEXT = {*CONTROL_PIECES[UNK + 1 : NEWLINE], *SPECIAL_TOKENS}


def parse_model(data: bytes, origin: str) -> model_pb2.ModelProto:
    """Parse a SentencePiece model and check its first pieces against `CONTROL_PIECES`.

    Raises:
        DataError: not a SentencePiece model, or one with other control pieces.
    """
    try:
        proto = model_pb2.ModelProto.FromString(data)
    except DecodeError as error:
        raise DataError(f"{origin} is not a SentencePiece model; run train_tokenizer again") from error
    first = tuple(piece.piece for piece in proto.pieces[: len(CONTROL_PIECES)])
    for index in (UNK, NEWLINE, BOUNDARY):
        if len(first) <= index or first[index] != CONTROL_PIECES[index]:
            raise DataError(
                f"{origin} starts with the pieces {first}, but the id layout needs {CONTROL_PIECES}; "
                "use a model written by train_tokenizer or the published icetk one"
            )
    return proto


def _is_control(piece: model_pb2.ModelProto.SentencePiece) -> bool:
    return piece.type != _PIECE.UNKNOWN and piece.piece in _NEVER_TEXT


def guarded(proto: model_pb2.ModelProto) -> bytes:
    """Return the model for encoding: same ids and scores, but no piece that user text can spell as a control.

    SentencePiece matches user-defined pieces in the raw text, and ordinary ones in the normalised text. `<n>`
    gets a spelling that no text holds. Any other user-defined piece, and an ordinary one that spells a control or
    special token (published code adds those with the best score there is), becomes a control piece, which is
    never matched.
    """
    copy = model_pb2.ModelProto()
    copy.CopyFrom(proto)
    for index, piece in enumerate(copy.pieces):
        if index == NEWLINE:
            piece.piece = NEWLINE_MARK
            piece.type = _PIECE.USER_DEFINED
        elif piece.type == _PIECE.USER_DEFINED or _is_control(piece):
            piece.type = _PIECE.CONTROL
    return bytes(copy.SerializeToString(deterministic=True))


class TextTokenizer:
    """A SentencePiece model whose pieces stand at `image_codes` in the id layout."""

    def __init__(self, model_path: Path, vocabulary: Vocabulary) -> None:
        """Load the model.

        Args:
            model_path: the .model file.
            vocabulary: its id layout; it may be wider than the model; such ids are never produced.

        Raises:
            DataError: unreadable, or more pieces than the layout has room for.
        """
        try:
            data = Path(model_path).read_bytes()
        except OSError as error:
            raise DataError(f"cannot read the text model {model_path}: {error.strerror}") from error
        self._load(data, vocabulary, str(model_path))

    @classmethod
    def from_bytes(cls, model: bytes, vocabulary: Vocabulary) -> "TextTokenizer":
        """Make a tokenizer of the content of a .model file; see the constructor."""
        tokenizer = cls.__new__(cls)
        tokenizer._load(model, vocabulary, "the text model")
        return tokenizer

    def _load(self, data: bytes, vocabulary: Vocabulary, origin: str) -> None:
        proto = parse_model(data, origin)
        if len(proto.pieces) > vocabulary.text_pieces:
            raise DataError(
                f"{origin} has {len(proto.pieces)} pieces, more than the {vocabulary.text_pieces} of the id "
                "layout; take model and vocabulary from the same tokenizer"
            )
        self.vocabulary = vocabulary
        self.model_bytes = data
        """The content of the .model file, as it was read."""
        self.pieces = len(proto.pieces)
        hidden = (_PIECE.CONTROL, _PIECE.UNUSED)
        self._silent = {
            index
            for index, piece in enumerate(proto.pieces)
            if (piece.type in hidden or _is_control(piece)) and index != NEWLINE
        }
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=guarded(proto))
        except RuntimeError as error:
            raise DataError(
                f"{origin} is not a usable SentencePiece model ({error}); run train_tokenizer again"
            ) from error

    @cached_property
    def _names(self) -> list[str]:
        return [piece.piece for piece in model_pb2.ModelProto.FromString(self.model_bytes).pieces]

    @cached_property
    def _index(self) -> dict[str, int]:
        return {name: index for index, name in reversed(list(enumerate(self._names)))}

    def piece(self, token: int) -> str:
        """Return the piece of a text id, as the model spells it (word boundaries are U+2581).

        Raises:
            DataError: no text id, or one that the model has no piece for.
        """
        index = token - self.vocabulary.image_codes
        if not 0 <= index < self.pieces:
            first = self.vocabulary.image_codes
            raise DataError(f"id {token} has no piece; text ids are {first} to {first + self.pieces - 1}")
        return self._names[index]

    def id_of(self, piece: str) -> int:
        """Return the text id of a piece, spelled as in the model; the first one of equal pieces.

        Raises:
            DataError: the model has no such piece.
        """
        if piece not in self._index:
            raise DataError(f"the text model has no piece {piece!r}; encode the text instead")
        return self._index[piece] + self.vocabulary.image_codes

    def discouraged(self, pieces: Iterable[int]) -> "TextTokenizer":
        """Return a tokenizer that uses `pieces` only where no others fit; this one stays as it is.

        Args:
            pieces: SentencePiece ids, without the offset of the image codes, as published (spec 1.2).

        Raises:
            DataError: a number that is no piece.
        """
        proto = model_pb2.ModelProto.FromString(self.model_bytes)
        for index in pieces:
            if not 0 <= index < self.pieces:
                raise DataError(f"{index} is no piece; SentencePiece ids are 0 to {self.pieces - 1}")
            proto.pieces[index].score = DISCOURAGED_SCORE
        return self.from_bytes(proto.SerializeToString(deterministic=True), self.vocabulary)

    def encode(self, text: str, *, keep_newlines: bool = False) -> list[int]:
        """Return the model ids of `text`.

        Args:
            text: any text; spellings of control tokens in it are ordinary characters.
            keep_newlines: turn each line break into the `<n>` id; by default it is a space.

        Raises:
            DataError: text that is not valid Unicode (lone surrogates).
        """
        text = text.replace(NEWLINE_MARK, "")
        if keep_newlines:
            text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\n", NEWLINE_MARK)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"text {text[:40]!r} is not valid Unicode ({error.reason} at character {error.start}); "
                "repair the text"
            ) from error
        pieces = self._processor.encode(text)
        return [piece + self.vocabulary.image_codes for piece in pieces]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of model ids; `<n>` is a line break, other control and special tokens are left out.

        Raises:
            DataError: an image code, or an id outside the layout.
        """
        pieces: list[int] = []
        for token in ids:
            piece = int(token) - self.vocabulary.image_codes
            if piece < 0 or token >= self.vocabulary.rows:
                raise DataError(
                    f"id {token} is not text; text ids are {self.vocabulary.image_codes} to "
                    f"{self.vocabulary.text_end - 1}"
                )
            if piece < self.pieces and piece not in self._silent:
                pieces.append(piece)
        return str(self._processor.decode(pieces)).replace(NEWLINE_MARK, "\n")
