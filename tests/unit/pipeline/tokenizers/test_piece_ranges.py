import pytest

from cogview2.pipeline.tokenizers.piece_ranges import range_of


@pytest.mark.parametrize(
    ("piece", "name"),
    [
        (",", "common"),
        ("\u2581(", "common"),
        ("2024", "common"),
        ("\U0001f600", "common"),
        ("\u2581the", "english"),
        ("\u00fcber", "english"),
        ("'s", "english"),
        ("B2", "english"),
        ("\u7ea2\u8272", "chinese"),
        ("\u3002", "chinese"),
        ("\u2581\u6211", "chinese"),
        ("\u3007", "chinese"),
        ("A\u7ea7", "chinese"),
        ("\U00020000", "chinese"),
        ("\u03b1", "rare"),
        ("\u304b", "rare"),
        ("\ud55c", "rare"),
        ("\u0436", "rare"),
        ("\ue000", "rare"),
        ("\u0301", "rare"),
    ],
)
def test_range_of_a_piece(piece: str, name: str) -> None:
    assert range_of(piece) == name
