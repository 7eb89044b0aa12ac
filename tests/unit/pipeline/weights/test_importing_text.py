from pathlib import Path

import pytest
from published_weights import vqvae_file, vqvae_state
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from cogview2.pipeline.errors import CheckpointError, CogView2Error
from cogview2.pipeline.tokenizers.vocabulary import CONTROL_PIECES, Vocabulary
from cogview2.pipeline.weights.folder import WeightsFolder
from cogview2.pipeline.weights.importing import Wanted, id_layout, import_weights


def _text_model(pieces: list[str]) -> bytes:
    proto = model_pb2.ModelProto()
    proto.trainer_spec.model_type = model_pb2.TrainerSpec.UNIGRAM
    for index, piece in enumerate(pieces):
        kind = {0: 2, 1: 3, 2: 3, 3: 3, 4: 4}.get(index, 1)  # unknown, control x3, user-defined, normal
        proto.pieces.add(piece=piece, score=-float(index), type=kind)
    return bytes(proto.SerializeToString())


WORDS = [*CONTROL_PIECES, ",", "7", "\u2581the", "dog", "s", "\u732b", "\u3002", "\u72d7", "\u03b1", "\u0436"]


def test_ranges_of_another_text_model_are_read_off_its_pieces(tmp_path: Path) -> None:
    (tmp_path / "t.model").write_bytes(_text_model(WORDS))
    import_weights("icetk-text", tmp_path / "t.model", tmp_path / "dst", Wanted(image_codes=50))
    folder = WeightsFolder(tmp_path / "dst")
    vocabulary = folder.vocabulary()
    assert (vocabulary.common, vocabulary.english) == ((50, 58), (58, 61))
    assert (vocabulary.chinese, vocabulary.rare) == ((61, 64), (64, 66))
    assert vocabulary.start_of_image == 66
    tokenizer = folder.text_tokenizer()
    assert tokenizer.decode(tokenizer.encode("\u732b")) == "\u732b"


def test_stray_pieces_cost_one_misfit_each() -> None:
    pieces = [*CONTROL_PIECES, ",", "a", "b", ".", "c", "\u732b", "d", "\u72d7", "\u03b1"]
    vocabulary = id_layout(_text_model(pieces), 10, "t")
    assert vocabulary.english[0] == 17 and vocabulary.english[1] == vocabulary.chinese[0] == 21
    assert vocabulary.chinese[1] == 24


def test_a_model_of_the_published_size_has_the_published_ranges(tmp_path: Path) -> None:
    pieces = [*CONTROL_PIECES, *(f"w{i}" for i in range(130_000 - len(CONTROL_PIECES)))]
    assert id_layout(_text_model(pieces), 20_000, "t") == Vocabulary.icetk()


def test_image_codes_come_from_the_vqvae_of_the_folder(tmp_path: Path) -> None:
    vqvae_file(tmp_path / "ice_image.pt", vqvae_state())
    import_weights("icetk-image", tmp_path / "ice_image.pt", tmp_path / "dst", Wanted())
    (tmp_path / "t.model").write_bytes(_text_model(WORDS))
    import_weights("icetk-text", tmp_path / "t.model", tmp_path / "dst", Wanted())
    assert WeightsFolder(tmp_path / "dst").vocabulary().image_codes == 12
    WeightsFolder(tmp_path / "dst").check()
    report = import_weights(
        "icetk-text", tmp_path / "t.model", tmp_path / "dst", Wanted(replace=True, image_codes=13)
    )
    assert "12 codes" in report.warnings[0]
    with pytest.raises(CheckpointError, match="cannot draw: icetk-image has 12 codes"):
        WeightsFolder(tmp_path / "dst").check()


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x0a\x05", _text_model(["a", "b"]), _text_model(["x"] * 9)]
)
def test_other_files_are_no_text_models(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.model").write_bytes(content)
    with pytest.raises(CogView2Error) as caught:
        import_weights("icetk-text", tmp_path / "t.model", tmp_path / "dst", Wanted())
    assert caught.value.exit_code == 78 and not (tmp_path / "dst").exists()
