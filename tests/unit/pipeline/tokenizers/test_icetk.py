"""The joint tokenizer on a hand-made text model with the published known points, and a tiny VQVAE."""

import io
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from cogview2.pipeline.config.model import VQVAEConfig
from cogview2.pipeline.errors import ConfigError, DataError
from cogview2.pipeline.models.vqvae.model import RATES, VQVAE
from cogview2.pipeline.tokenizers.icetk import Icetk, picture_tensor
from cogview2.pipeline.tokenizers.image import fit_square
from cogview2.pipeline.tokenizers.text import TextTokenizer
from cogview2.pipeline.tokenizers.vocabulary import Vocabulary

PIECE = model_pb2.ModelProto.SentencePiece
B = "\u2581"
STOP = "\u3002"
NI_HAO, SHI_JIE, ZHE_LI_SHI = "\u4f60\u597d", "\u4e16\u754c", "\u8fd9\u91cc\u662f"
KNOWN = {
    **{5: B, 6: ",", 7: ".", 12: ":", 27: ";", 31: "?", 35: "!", 40: "-", 63823: STOP, 125803: "\u03b1"},
    **{19316: f"{B}Hello", 932: f"{B}World", 115: f"{B}I", 344: f"{B}am", 2881: f"{B}ice", 15955: "tk"},
    **{74874: NI_HAO, 64097: SHI_JIE, 74947: ZHE_LI_SHI},
    **{120: "<", 121: ">", 122: "pad", 123: "n", 124: "start", 125: "_", 126: "of", 127: "image", 128: "5"},
    **{129: "unk", 130: "s", 131: "/", 132: "english", 133: f"{B}<", 134: "Hello", 125700: "-----"},
}
"""SentencePiece id -> piece. The first line and the vectors below are published facts; the rest is filling."""
ENGLISH = ("Hello World! I am icetk.", [39316, 20932, 20035, 20115, 20344, 22881, 35955, 20007])
CHINESE = (
    f"{NI_HAO}{SHI_JIE}\uff01{ZHE_LI_SHI} icetk{STOP}",
    [20005, 94874, 84097, 20035, 94947, 22881, 35955, 83823],
)


def synthetic_model(**types: int) -> bytes:
    """A model of 130000 pieces with those of KNOWN; `types` gives <pad> and <n> another type."""
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c"] * 3),
        model_writer=writer,
        model_type="unigram",
        vocab_size=9,
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc",
        minloglevel=2,
    )
    proto = model_pb2.ModelProto.FromString(writer.getvalue())
    proto.ClearField("pieces")
    control = [("<unk>", PIECE.UNKNOWN), ("<s>", PIECE.CONTROL), ("</s>", PIECE.CONTROL)]
    control += [("<pad>", types.get("pad", PIECE.CONTROL)), ("<n>", types.get("n", PIECE.USER_DEFINED))]
    for piece, kind in control:
        proto.pieces.add(piece=piece, score=0.0, type=kind)
    for index in range(len(control), 130_000):
        piece = KNOWN.get(index, f"\ue000{index}")
        proto.pieces.add(piece=piece, score=-5.0 - len(piece) / 10, type=PIECE.NORMAL)
    proto.trainer_spec.vocab_size = 130_000
    return bytes(proto.SerializeToString())


@pytest.fixture(scope="module")
def text() -> TextTokenizer:
    return TextTokenizer.from_bytes(synthetic_model(), Vocabulary.icetk())


def _vqvae(codes: int) -> VQVAE:
    torch.manual_seed(0)
    model = VQVAE(
        VQVAEConfig(
            base_channels=8,
            encoder_multipliers=(1, 1, 2),
            decoder_multipliers=((1, 1, 1, 1, 2), (1, 1, 1, 2), (1, 1, 2)),
            encoder_res_blocks=1,
            latent_channels=8,
            codebook_size=codes,
            norm_groups=4,
        )
    )
    with torch.no_grad():
        model.quantizer.initialize(model(torch.rand(4, 3, 32, 32), quantize=False).latents)
    return model


@pytest.fixture(scope="module")
def icetk(text: TextTokenizer) -> Icetk:
    return Icetk(text, _vqvae(20_000))


def test_known_points_of_the_id_space(icetk: Icetk) -> None:
    names = {20000: "<unk>", 20002: "</s>", 20003: "<pad>", 20004: "<n>", 20005: B, 20006: ",", 20007: "."}
    names |= {20012: ":", 20027: ";", 20031: "?", 20035: "!", 83823: STOP, 145803: "\u03b1"}
    names |= {0: "<image_0>", 19999: "<image_19999>"}
    names |= {150000: "<start_of_image>", 150001: "<start_of_english>", 150002: "<start_of_chinese>"}
    for token, name in names.items():
        assert icetk[token] == name and icetk[name] == token
    assert len(icetk) == 150_003 and icetk.vocabulary.rows == 150_010
    assert (icetk.vocabulary.english, icetk.vocabulary.chinese) == ((20100, 83823), (83823, 145653))


@pytest.mark.parametrize(("sentence", "ids"), [ENGLISH, CHINESE])
def test_published_vectors_by_offset(icetk: Icetk, sentence: str, ids: list[int]) -> None:
    assert icetk.encode_text(sentence) == ids
    assert icetk.decode_text(ids) == sentence.replace("\uff01", "!")


@pytest.mark.parametrize(
    "key", [-1, 150_003, 150_009, "<image_20000>", "<image_007>", "<image_-1>", "nowhere", ""]
)
def test_what_has_no_name_is_refused(icetk: Icetk, key: int | str) -> None:
    with pytest.raises(DataError, match="no name|no piece"):
        icetk[key]


def test_line_breaks(icetk: Icetk) -> None:
    newline = icetk["<n>"]
    assert newline not in icetk.encode_text("Hello\nHello")
    ids = icetk.encode_text("Hello\nHello", ignore_linebreak=False)
    assert ids.count(newline) == 1 and icetk.decode_text(ids) == "Hello\nHello"


ZERO_WIDTH = ("\u200b", "\u200d", "\u2060", "\ufeff", "\u00ad")
CONTROLS = ("<start_of_image>", "<start_of_english>", "<pad>", "<n>", "</s>", "<s>", "<unk>", "<image_5>")
HOSTILE = [
    *CONTROLS,
    *(control.replace("<", "\uff1c").replace(">", "\uff1e") for control in CONTROLS),
    *(control.replace("<", "\ufe64").replace(">", "\ufe65") for control in CONTROLS),
    *(control[:2] + mark + control[2:] for control in CONTROLS[:4] for mark in ZERO_WIDTH),
    "\uff1c\uff50\uff41\uff44\uff1e",  # full-width letters too
    "<pad>" * 3,
    f"{B}<pad>{B}",
    "<p\ufdd0ad> \ufdd0",
    "<\x00pad>",
]


@pytest.mark.parametrize(
    "types", [{}, {"pad": PIECE.NORMAL, "n": PIECE.NORMAL}, {"pad": PIECE.USER_DEFINED, "n": PIECE.CONTROL}]
)
def test_user_text_cannot_spell_a_control_token(types: dict[str, int]) -> None:
    icetk = Icetk(TextTokenizer.from_bytes(synthetic_model(**types), Vocabulary.icetk()))
    forbidden = {icetk[name] for name in CONTROLS if name != "<unk>"} | {
        20000 + index for index in range(1, 5)
    }
    for hostile in HOSTILE:
        for keep in (False, True):
            ids = icetk.encode_text(f"Hello {hostile}Hello", ignore_linebreak=not keep)
            assert not forbidden & set(ids), hostile
            assert ids.count(39316) >= 1
    assert icetk.decode_text([20003, 39316, 20002]) == "Hello"


def test_pieces_that_published_code_adds_at_run_time_never_match() -> None:
    # The reference appends its special tokens as ordinary pieces of score 0, which win every segmentation.
    proto = model_pb2.ModelProto.FromString(synthetic_model())
    for index, name in zip(
        range(90_000, 90_003), ("<start_of_image>", "<start_of_english>", "<start_of_chinese>"), strict=True
    ):
        proto.pieces[index].piece, proto.pieces[index].score = name, 0.0
    plain = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    assert 90_000 in plain.encode("Hello <start_of_image>")
    tokenizer = TextTokenizer.from_bytes(proto.SerializeToString(), Vocabulary.icetk())
    for hostile in (
        "<start_of_image>",
        "\uff1cstart_of_image\uff1e",
        "<start_of_english>",
        "<start\u200d_of_image>",
    ):
        ids = tokenizer.encode(f"Hello {hostile}")
        assert not {110_000, 110_001, 110_002} & set(ids) and len(ids) > 3


def test_a_model_that_sentencepiece_refuses(text: TextTokenizer) -> None:
    proto = model_pb2.ModelProto.FromString(text.model_bytes)
    proto.pieces[90_000].piece = "<pad>"
    with pytest.raises(DataError, match="not a usable SentencePiece model"):
        TextTokenizer.from_bytes(proto.SerializeToString(), Vocabulary.icetk())


def test_discouraging_pieces_returns_another_tokenizer(icetk: Icetk) -> None:
    dashes, dash = 145_700, 20_040
    assert icetk.encode_text("-----") == [20_005, dashes]
    split = icetk.discouraged(range(125_653, 130_000))
    assert split.encode_text("-----") == [20_005, *[dash] * 5]
    assert icetk.encode_text("-----") == [20_005, dashes]
    assert split.vqvae is icetk.vqvae and split.encode_text(ENGLISH[0]) == ENGLISH[1]
    named = icetk.discouraged(names=["-----", f"{B}Hello"])
    assert named.encode_text("-----") == [20_005, *[dash] * 5]
    # Where no other piece fits, it still serves.
    assert icetk.discouraged([932]).encode_text("World") == [20_932]
    with pytest.raises(DataError, match="is no piece"):
        icetk.discouraged([130_000])
    with pytest.raises(DataError, match="no piece"):
        icetk.discouraged(names=["nowhere"])


@pytest.mark.parametrize("rate", RATES)
def test_pictures_by_path_by_image_and_by_tensor(icetk: Icetk, tmp_path: Path, rate: int) -> None:
    array = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    image = Image.fromarray(array)
    image.save(tmp_path / "a.png")
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    codes = icetk.encode_image(image, rate=rate)
    assert codes.shape == (1, (32 // rate) ** 2) and codes.dtype == torch.int64
    for picture in (tmp_path / "a.png", str(tmp_path / "a.png"), tensor, tensor[None], tensor / 255):
        assert torch.equal(icetk.encode_image(picture, rate=rate), codes)
    assert icetk.vqvae is not None
    assert torch.equal(codes, icetk.vqvae.encode(tensor[None] / 255, rate).flatten(1))


def test_pictures_of_other_modes_and_sizes(icetk: Icetk, tmp_path: Path) -> None:
    grey = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 72), dtype=np.uint8), "L")
    rgb = grey.convert("RGB")
    codes = icetk.encode_image(rgb, image_size=32)
    assert codes.shape == (1, 16)
    assert torch.equal(icetk.encode_image(grey, image_size=32), codes)
    tensor = torch.from_numpy(np.array(grey))[None]
    assert torch.equal(icetk.encode_image(tensor, image_size=32), codes)
    palette = rgb.quantize(256)
    expected = icetk.encode_image(palette.convert("RGB"), image_size=32)
    assert torch.equal(icetk.encode_image(palette, image_size=32), expected)
    clear = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    assert (picture_tensor(clear) == 255).all()
    solid = rgb.convert("RGBA")
    assert torch.equal(icetk.encode_image(solid, image_size=32), codes)
    with pytest.raises(DataError, match="square pictures"):
        icetk.encode_image(rgb)
    for mode in ("I", "F", "I;16"):
        with pytest.raises(DataError, match="scale the picture to 8 bits"):
            icetk.encode_image(Image.new(mode, (32, 32)))
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # stands on its side
    rgb.save(turned, exif=exif)
    assert picture_tensor(turned).shape == (1, 3, 72, 40)


@pytest.mark.parametrize(("height", "width"), [(40, 72), (72, 41), (20, 33), (32, 32)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_resize_and_centre_crop(height: int, width: int, dtype: torch.dtype) -> None:
    ramp = torch.linspace(0, 1, width).expand(1, 3, height, width)
    pixels = (ramp * 255).round().to(torch.uint8) if dtype == torch.uint8 else ramp
    out = fit_square(pixels, 32)
    assert out.shape == (1, 3, 32, 32) and out.dtype == dtype
    # The centre cell keeps the centre's brightness, and the slope per pixel is that of the resized picture.
    values = out.float()[0, 0, 0] / (255 if dtype == torch.uint8 else 1)
    short = min(height, width)
    slope = (values[24] - values[8]) / 16
    assert values[15:17].mean() == pytest.approx(0.5, abs=0.02)
    assert float(slope) == pytest.approx(short / 32 / (width - 1), rel=0.1)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (torch.zeros(2, 32, 32), "not \\[2, 32, 32\\]"),
        (torch.zeros(32, 32), "not \\[32, 32\\]"),
        (torch.zeros(3, 32, 32, dtype=torch.int64), "uint8 or float"),
        (torch.full((3, 32, 32), 9.0), "must lie in"),
        ("missing.png", "cannot read the picture"),
    ],
)
def test_bad_pictures(icetk: Icetk, picture: torch.Tensor | str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        icetk.encode_image(picture)


def test_a_file_that_is_no_picture(icetk: Icetk, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (64, 64)).save(path)
    for content in (b"", b"text", path.read_bytes()[:60]):
        path.write_bytes(content)
        with pytest.raises(DataError, match="cannot read the picture"):
            icetk.encode_image(path)


def test_flat_and_square_codes_of_any_batch(icetk: Icetk) -> None:
    codes = torch.randint(0, 20_000, (3, 16))
    single = torch.cat([icetk.decode_image(row) for row in codes])
    assert single.shape == (3, 3, 32, 32)
    for given in (codes, codes.view(3, 4, 4), codes.numpy(), codes.tolist()):
        torch.testing.assert_close(icetk.decode_image(given), single)
    torch.testing.assert_close(icetk.decode_image(codes[0].tolist()), single[:1])
    assert icetk.decode_image(codes.view(3, 2, 8)).shape == (3, 3, 16, 64)
    assert icetk.decode_image(codes, rate=4).shape == (3, 3, 16, 16)
    for bad, message in (
        (codes[:, :15], "square grid"),
        (torch.tensor(3), "square grid"),
        (codes.view(1, 3, 4, 4), "square grid"),
        (codes.float(), "must be integers"),
        ([[1, 2], [3]], "equally long"),
        ([20_000] * 4, "lie in"),
        ([], "square grid"),
    ):
        with pytest.raises(DataError, match=message):
            icetk.decode_image(bad)  # type: ignore[arg-type]


def test_a_mixed_sequence_comes_apart(icetk: Icetk) -> None:
    first, second = torch.randint(0, 20_000, (2, 16)).tolist()
    start = icetk["<start_of_image>"]
    ids = [*ENGLISH[1], start, *first, start, *second, icetk["<start_of_chinese>"], *CHINESE[1], 20003]
    text, one, other, chinese = icetk.decode(ids)
    assert (text, chinese) == (ENGLISH[0], CHINESE[0].replace("\uff01", "!"))
    assert torch.equal(one, icetk.decode_image(first)[0])  # type: ignore[arg-type]
    assert torch.equal(other, icetk.decode_image(second)[0])  # type: ignore[arg-type]
    assert icetk.decode([]) == []
    with pytest.raises(DataError, match="square"):
        icetk.decode([*first, *second])
    with pytest.raises(DataError, match="not text"):
        icetk.decode([150_010])


def test_halves_that_do_not_fit(text: TextTokenizer) -> None:
    with pytest.raises(ConfigError, match="the codebook has 50 codes"):
        Icetk(text, _vqvae(50))
    with pytest.raises(ConfigError, match="no image weights"):
        Icetk(text).encode_image(torch.zeros(3, 32, 32))
