import pytest

from cogview2.pipeline.errors import DataError
from cogview2.pipeline.tokenizers.vocabulary import CONTROL_PIECES, Vocabulary


def test_the_published_layout() -> None:
    vocabulary = Vocabulary.icetk()
    assert (vocabulary.image_codes, vocabulary.text_pieces, vocabulary.rows) == (20_000, 130_000, 150_010)
    assert vocabulary.common == (20_000, 20_100)
    assert vocabulary.english == (20_100, 83_823)
    assert vocabulary.chinese == (83_823, 145_653)
    assert vocabulary.rare == (145_653, 150_000)
    assert (vocabulary.unk, vocabulary.eos, vocabulary.pad) == (20_000, 20_002, 20_003)
    assert (vocabulary.newline, vocabulary.boundary) == (20_004, 20_005)
    assert vocabulary.start_of_image == 150_000
    assert vocabulary.start_of("en") == 150_001
    assert vocabulary.start_of("zh") == 150_002
    assert len(CONTROL_PIECES[-1]) == 1 and ord(CONTROL_PIECES[-1]) == 0x2581


@pytest.mark.parametrize(
    ("token", "image", "text"),
    [(0, True, False), (19_999, True, False), (20_000, False, True), (149_999, False, True)]
    + [(150_000, False, False), (150_009, False, False), (-1, False, False)],
)
def test_what_an_id_is(token: int, image: bool, text: bool) -> None:
    vocabulary = Vocabulary.icetk()
    assert (vocabulary.is_image(token), vocabulary.is_text(token)) == (image, text)


@pytest.mark.parametrize(
    ("ids", "language"),
    [([39316, 20932, 20035], "en"), ([20005, 94874, 84097], "zh"), ([83_822], "en"), ([83_823], "zh")]
    + [([145_803], "zh"), ([], "en")],
)
def test_language_of_ids(ids: list[int], language: str) -> None:
    assert Vocabulary.icetk().language_of(ids) == language


def test_rows_default_to_just_enough_and_the_file_round_trips(tmp_path) -> None:
    vocabulary = Vocabulary.uniform(64, 100)
    assert vocabulary.rows == 64 + 100 + 3
    assert vocabulary.start_of_chinese == vocabulary.rows - 1
    spare = Vocabulary.uniform(64, 100, rows=180)
    spare.save(tmp_path / "vocabulary.json")
    assert Vocabulary.load(tmp_path / "vocabulary.json") == spare


def test_uniform_covers_the_text_ids_without_gaps() -> None:
    for pieces in (6, 7, 11, 100, 1001):
        vocabulary = Vocabulary.uniform(10, pieces)
        assert vocabulary.common[0] == 10 and vocabulary.rare[1] == 10 + pieces
        assert vocabulary.common[1] - vocabulary.common[0] >= len(CONTROL_PIECES)


@pytest.mark.parametrize(("pieces", "rows", "word"), [(5, None, "text_pieces|common|6"), (20, 25, "rows 25")])
def test_layouts_that_cannot_be(pieces: int, rows: int | None, word: str) -> None:
    with pytest.raises(DataError, match=word):
        Vocabulary.uniform(10, pieces, rows)


def test_gaps_between_ranges_are_refused() -> None:
    with pytest.raises(ValueError, match="must start at 20"):
        Vocabulary(
            image_codes=10, text_pieces=30, common=(10, 20), english=(21, 25), chinese=(25, 30), rare=(30, 40)
        )


def test_unknown_language_is_refused() -> None:
    with pytest.raises(DataError, match="'fr'"):
        Vocabulary.icetk().start_of("fr")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"image_codes": 3}', b"\xff\xfe"])
def test_files_that_are_no_vocabulary(tmp_path, content: bytes) -> None:
    path = tmp_path / "vocabulary.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match="is not a vocabulary"):
        Vocabulary.load(path)
    with pytest.raises(DataError, match="is not a vocabulary"):
        Vocabulary.load(tmp_path / "absent.json")
