"""The edit command: boxes, masks, files, and refusals in one sentence."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cogview2.pipeline.config.sampling import EditingConfig, SamplingConfig
from cogview2.pipeline.errors import DataError
from cogview2.pipeline.sampling.editing import Edited
from cogview2.pipeline.sampling.regions import Box, Fractions, Region
from cogview2.pipeline.sampling.styles import Style, load_styles
from cogview2.stages.commands import _model_options, edit

CALLS: list[dict[str, Any]] = []


class _Cascade:
    sampling = SamplingConfig(editing=EditingConfig(region_share=0.5))


def _edit(cascade: object, picture: Image.Image, region: Region, text: str, **options: Any) -> Edited:
    CALLS.append({"picture": picture, "region": region, "text": text, **options})
    count = options["candidates"]
    mask = np.zeros((16, 16), dtype=bool)
    mask[4:8, 4:8] = True
    pictures = np.stack([np.full((16, 16, 3), 10 + k, dtype=np.uint8) for k in range(count)])
    return Edited(
        pictures=pictures,
        before=np.full((16, 16, 3), 200, dtype=np.uint8),
        mask=mask,
        crop=Box(2, 2, 10, 10),
        kept=Box(0, 0, 20, 20),
        base_codes=torch.zeros(count, 4, dtype=torch.int64),
        redrawn=np.ones((2, 2), dtype=bool),
        fine_codes=None,
        numbers=tuple(reversed(range(count))),
        scores=torch.arange(count).float() if count > 1 else None,
        notes=("the picture was enlarged",),
    )


@pytest.fixture(autouse=True)
def loads(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    CALLS.clear()
    loads: list[dict[str, Any]] = []

    def load(run: Path, **options: Any) -> _Cascade:
        loads.append({"run": run, **options})
        return _Cascade()

    monkeypatch.setattr(_model_options, "load_text_to_image", load)
    monkeypatch.setattr(edit, "edit", _edit)
    return loads


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "in.png"
    Image.new("RGB", (40, 20), "white").save(path)
    return path


def test_the_recipe_says_how_many(picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [str(tmp_path), str(picture), "red", "--box", "1,2,13,14", "--out", str(tmp_path / "out")]
    assert edit.main(arguments) == 0
    monkeypatch.setattr(_Cascade, "sampling", SamplingConfig(editing=EditingConfig(candidates=3)))
    assert edit.main(arguments) == 0
    assert edit.main([*arguments, "--candidates", "2"]) == 0
    assert [call["candidates"] for call in CALLS] == [1, 3, 2]


def test_files(picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = [str(tmp_path), str(picture), "--box", "1,2,13,14", "A red/circle", "--out", str(out)]
    assert edit.main([*arguments, "--seed", "7", "--candidates", "2"]) == 0
    output = capsys.readouterr()
    paths = [out / "00-a-red-circle.png", out / "01-a-red-circle.png", out / "sheet.png"]
    assert output.out.splitlines() == [str(path) for path in paths]
    assert output.err == "cogview2 edit: the picture was enlarged\n"
    assert sorted(out.iterdir()) == paths
    with Image.open(paths[1]) as best:
        assert best.size == (16, 16) and best.getpixel((0, 0)) == (11, 11, 11)
        facts = best.text  # type: ignore[attr-defined]
    assert facts["Description"] == "A red/circle" and facts["Seed"] == "7" and facts["Number"] == "0"
    assert facts["Source"] == "in.png" and facts["Box"] == "1,2,13,14" and facts["Score"] == "1.0000"
    assert facts["Kept"] == "0,0,20,20" and facts["Crop"] == "2,2,10,10"
    assert json.loads(facts["Options"])["region_share"] == 0.5
    with Image.open(paths[2]) as sheet:
        assert sheet.size == (4 * 248 + 8, 278)
        middles = [sheet.getpixel((8 + 248 * column + 90, 120)) for column in range(4)]
    assert [middles[k] for k in (0, 2, 3)] == [(200, 200, 200), (10, 10, 10), (11, 11, 11)]
    assert middles[1] == pytest.approx((227, 100, 100), abs=15)  # half red, smoothed by the enlargement
    (call,) = CALLS
    assert call["region"] == Box(1, 2, 13, 14) and call["seed"] == 7 and call["ranked"] is True


def test_one_file(picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "Best.PNG"
    arguments = [
        str(tmp_path),
        str(picture),
        "red",
        "--box",
        "0,0,9,9",
        "--out",
        str(out),
        "--candidates",
        "2",
    ]
    assert edit.main(arguments) == 0
    assert sorted(path.name for path in out.parent.iterdir()) == ["Best.01.png", "Best.PNG", "Best.sheet.png"]


def test_default_folder_is_in_the_run(picture: Path, tmp_path: Path) -> None:
    assert edit.main([str(tmp_path / "run"), str(picture), "red", "--box", "0,0,9,9"]) == 0
    (folder,) = (tmp_path / "run" / "edited").iterdir()
    assert (folder / "00-red.png").is_file() and (folder / "sheet.png").is_file()


def test_options(picture: Path, tmp_path: Path, loads: list[dict[str, Any]]) -> None:
    arguments = [str(tmp_path), str(picture), "red", "--box", "0,0,9,9"]
    assert edit.main(arguments) == 0
    assert CALLS[0]["config"] == EditingConfig(region_share=0.5)
    words = (
        "--crop whole --cells touched --known before --paste region --no-harmonise --second-start-of-image"
    )
    more = ["--region-share", "0.6", "--no-rank", "--base-only", "--weights", "w.safetensors"]
    assert edit.main([*arguments, *words.split(), *more]) == 0
    assert CALLS[1]["config"] == EditingConfig(
        crop="whole",
        region_share=0.6,
        cells="touched",
        known="before",
        second_start_of_image=True,
        paste="region",
        harmonise=False,
    )
    assert CALLS[1]["ranked"] is False
    run = {"run": tmp_path, "device": None, "dtype": None, "coglm_weights": None, "superres": True}
    assert loads == [run, run | {"coglm_weights": Path("w.safetensors"), "superres": False}]


def test_style_dtype_and_device(
    picture: Path, tmp_path: Path, loads: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tmp_path), str(picture), "red", "--box", "0,0,9,9", "--out", str(tmp_path / "out")]
    assert edit.main([*arguments, "--style", "flat", "--dtype", "bfloat16", "--device", "cpu"]) == 0
    assert CALLS[0]["style"] == load_styles()["flat"]
    assert loads[0]["dtype"] == torch.bfloat16 and loads[0]["device"] == torch.device("cpu")
    with Image.open(tmp_path / "out" / "00-red.png") as best:
        assert best.text["Style"] == "flat"  # type: ignore[attr-defined]
    own = tmp_path / "own.yaml"
    own.write_text("mine: {suffix: wild}")
    assert edit.main([*arguments, "--style", "mine", "--styles", str(own)]) == 0
    assert CALLS[1]["style"].suffix == "wild"
    assert edit.main(arguments) == 0
    assert CALLS[2]["style"] == Style()
    assert edit.main([*arguments, "--style", "nothing"]) == 78
    assert edit.main([*arguments, "--device", "nowhere"]) == 78
    assert "there is no device 'nowhere'" in capsys.readouterr().err


def test_mask(picture: Path, tmp_path: Path) -> None:
    mask = Image.new("L", (40, 20), 0)
    mask.paste(255, (5, 5, 10, 10))
    mask.paste(127, (20, 5, 30, 10))
    mask.save(tmp_path / "mask.png")
    arguments = [str(tmp_path), str(picture), "red", "--mask", str(tmp_path / "mask.png")]
    assert edit.main([*arguments, "--out", str(tmp_path / "x.png")]) == 0
    region = CALLS[0]["region"]
    assert region.shape == (20, 40) and region.sum() == 25 and region[5:10, 5:10].all()
    clear = Image.new("RGBA", (40, 20), (0, 0, 0, 255))
    clear.paste((0, 0, 0, 0), (0, 0, 4, 4))
    clear.save(tmp_path / "mask.png")
    assert edit.read_mask(tmp_path / "mask.png").sum() == 16


def test_a_turned_picture_is_edited_as_people_see_it(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert edit.main([str(tmp_path), str(tmp_path / "turned.jpg"), "red", "--box", "0.,0,1,1"]) == 0
    assert CALLS[0]["picture"].size == (20, 40) and CALLS[0]["region"] == Fractions(0, 0, 1, 1)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("1,2,30,40", Box(1, 2, 30, 40)),
        ("0,0,1,1", Box(0, 0, 1, 1)),
        ("0.0,0,1,1", Fractions(0, 0, 1, 1)),
        (" .25, .5 ,0.75,1.0", Fractions(0.25, 0.5, 0.75, 1)),
        ("30,10,20,5", Box(30, 10, 20, 5)),  # pixels are checked with the picture
    ],
)
def test_boxes(text: str, box: Box | Fractions) -> None:
    assert edit.parse_box(text) == box


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1,2,3", "is not four numbers"),
        ("1,2,3,x", "is not four numbers"),
        ("1,2,3,nan", "is not four numbers"),
        ("1e9,2,3,4", "is not four numbers"),
        ("1.5,2,3,4", "has parts of pixels"),
        ("-0.1,0,1,1", "fractions lie within 0 to 1"),
        ("0.5,0,0.4,1", "x1 0.4 must be above x0 0.5"),
    ],
)
def test_refused_boxes(text: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        edit.parse_box(text)


def test_refusals(picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [str(tmp_path), str(picture), "red"]
    missing, text = tmp_path / "no.png", tmp_path / "text.png"
    text.write_text("no picture")
    cases = [
        ([str(tmp_path), str(picture), " ", "--box", "0,0,2,2"], "the text is empty"),
        ([str(tmp_path), str(missing), "red", "--box", "0,0,2,2"], "is not a file"),
        ([str(tmp_path), str(text), "red", "--box", "0,0,2,2"], "copy it again or choose another picture"),
        ([*good, "--mask", str(missing)], "is not a file"),
        ([*good, "--box", "1,2,3"], "is not four numbers"),
        (
            [*good, "--box", "0,0,2,2", "--region-share", "1.5"],
            "--region-share 1.5: input should be less than 1",
        ),
        ([*good, "--box", "0,0,2,2", "--out", str(picture)], "is the picture or the mask itself"),
    ]
    before = picture.read_bytes()
    inside = [*good, "--box", "0,0,2,2", "--out", str(picture / "x")]
    assert edit.main(inside) == 73  # a file is in the way: said before any model is loaded
    assert "a part of the path is a file" in capsys.readouterr().err and not CALLS
    for arguments, words in cases:
        assert edit.main(arguments) == 78, arguments
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("cogview2 edit: ") and words in error
    assert picture.read_bytes() == before and sorted(tmp_path.iterdir()) == [picture, text]


@pytest.mark.parametrize(
    "more", [[], ["--box", "0,0,1,1", "--mask", "m.png"], ["--box", "0,0,1,1", "--candidates", "x"]]
)
def test_usage_errors(more: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        edit.main(["run", "in.png", "red", *more])
    assert stop.value.code == 64
