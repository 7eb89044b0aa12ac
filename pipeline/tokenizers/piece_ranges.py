"""Which of the four id ranges a piece belongs to, and the model with its pieces in that order (spec 1.1)."""

import math
import unicodedata

from sentencepiece import sentencepiece_model_pb2 as model_pb2

from cogview2.pipeline.errors import DataError
from cogview2.pipeline.tokenizers.vocabulary import BOUNDARY, CONTROL_PIECES, RANGE_NAMES

_CJK_BLOCKS = (
    (0x2E80, 0x303F),  # radicals, ideographic description, symbols and punctuation
    (0x3100, 0x312F),  # Bopomofo
    (0x31A0, 0x31EF),  # Bopomofo extended, strokes
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0xFE30, 0xFE4F),  # vertical and compatibility punctuation
    (0xFF00, 0xFF65),  # full-width forms
    (0x20000, 0x323AF),
)
_WORD_BOUNDARY = CONTROL_PIECES[BOUNDARY]
_NORMAL = model_pb2.ModelProto.SentencePiece.NORMAL


def is_cjk(character: str) -> bool:
    """Return whether `character` is a Chinese ideograph or Chinese punctuation (kana and hangul are not)."""
    code = ord(character)
    return any(first <= code <= last for first, last in _CJK_BLOCKS)


def has_cjk(text: str) -> bool:
    """Return whether any character of `text` is Chinese."""
    return any(map(is_cjk, text))


def range_of(piece: str) -> str:
    """Return the name of the id range of a piece, from its characters alone.

    Any Chinese character makes it "chinese" (the published layout has the ideographic full stop there); Latin
    letters, with digits or marks, make it "english"; nothing but punctuation, digits and symbols "common";
    all else (other scripts, unprintable characters) is "rare".
    """
    text = piece.replace(_WORD_BOUNDARY, "")
    if has_cjk(text):
        return "chinese"
    kinds = set()
    for character in text:
        if unicodedata.name(character, "").startswith("LATIN"):
            kinds.add("latin")
        elif unicodedata.category(character)[0] in "PSN":
            kinds.add("common")
        elif not unicodedata.category(character).startswith("M"):
            kinds.add("other")
    if "other" in kinds or (text and not kinds):
        return "rare"
    return "english" if "latin" in kinds else "common"


def group_pieces(model: bytes, rare_frequency: float) -> tuple[bytes, tuple[int, int, int, int]]:
    """Rewrite a trained model so that its pieces stand in the order of the id layout.

    Args:
        model: a unigram model whose first five pieces are the control pieces.
        rare_frequency: learned pieces with a smaller probability than this are "rare" whatever their script.

    Returns:
        The new model, byte for byte determined by the old one, and the number of pieces in each range.

    Raises:
        DataError: the model has no lone word boundary (a corpus without words).
    """
    proto = model_pb2.ModelProto.FromString(model)
    groups: dict[str, list[model_pb2.ModelProto.SentencePiece]] = {name: [] for name in RANGE_NAMES}
    control = list(proto.pieces[:BOUNDARY])
    assert tuple(piece.piece for piece in control) == CONTROL_PIECES[:BOUNDARY]
    boundary = []
    for piece in proto.pieces[BOUNDARY:]:
        if piece.piece == _WORD_BOUNDARY:
            boundary.append(piece)
            continue
        rare = piece.type == _NORMAL and math.exp(piece.score) < rare_frequency
        groups["rare" if rare else range_of(piece.piece)].append(piece)
    if len(boundary) != 1:
        raise DataError("the trained text model has no word-boundary piece; give the tokenizer ordinary text")
    groups["common"] = control + boundary + groups["common"]
    ordered = [piece.SerializeToString(deterministic=True) for name in RANGE_NAMES for piece in groups[name]]
    proto.ClearField("pieces")
    for data in ordered:
        proto.pieces.add().ParseFromString(data)
    counts = [len(groups[name]) for name in RANGE_NAMES]
    return bytes(proto.SerializeToString(deterministic=True)), (counts[0], counts[1], counts[2], counts[3])
