"""The generate command: file names, the sheet, and refusals in one sentence."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from cogview2.pipeline.sampling.text_to_image import Drawn
from cogview2.stages.commands import generate


class _Tokenizer:
    """Decodes a code to a grey square of that brightness, 4 pixels a code."""

    def decode(self, codes_BG: torch.Tensor) -> torch.Tensor:
        side = int(codes_BG.shape[1] ** 0.5)
        grey_BHW = codes_BG.view(-1, side, side).float() / 255
        return grey_BHW[:, None].repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)


class _TextToImage:
    def __init__(self, superres: bool) -> None:
        self.superres = superres

    def draw(self, prompts: list[str], seed: int) -> Drawn:
        base = torch.full((len(prompts), 4), 10 + seed)
        direct, final = torch.full((len(prompts), 16), 20), torch.full((len(prompts), 16), 30)
        return Drawn(
            base_codes=base,
            direct_codes=direct if self.superres else None,
            final_codes=final if self.superres else base,
            image_tokenizer=_Tokenizer(),  # type: ignore[arg-type]
            batch=2,
        )


@pytest.fixture(params=[True, False])
def superres(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(
        generate, "load_text_to_image", lambda run, coglm_weights: _TextToImage(request.param)
    )
    return bool(request.param)


def test_files(superres: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pictures"
    prompts = ["A red/square!", "\u7ea2\u8272\u7684\u5706"]
    assert generate.main([str(tmp_path), *prompts, "--out", str(out), "--seed", "5"]) == 0
    names = ["00-a-red-square.png", "01-\u7ea2\u8272\u7684\u5706.png"]
    if superres:
        names += [name.replace(".png", f".{kind}.png") for kind in ("direct", "base") for name in names[:2]]
    assert capsys.readouterr().out.splitlines() == [str(out / name) for name in [*names, "sheet.png"]]
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, "sheet.png"])
    main = Image.open(out / names[0])
    assert main.size == ((16, 16) if superres else (8, 8))
    assert main.getpixel((3, 3)) == ((30,) * 3 if superres else (15,) * 3)
    assert main.text["Description"] == prompts[0] and main.text["Seed"] == "5"
    columns = 3 if superres else 1
    sheet = Image.open(out / "sheet.png")
    assert sheet.size == (columns * 248 + 8, 2 * 278)
    middle = [sheet.getpixel((8 + 248 * column + 120, 150))[0] for column in range(columns)]
    assert middle == ([15, 20, 30] if superres else [15])


def test_default_folder_is_in_the_run(superres: bool, tmp_path: Path) -> None:
    assert generate.main([str(tmp_path), "red"]) == 0
    (folder,) = (tmp_path / "generated").iterdir()
    assert (folder / "00-red.png").is_file()


@pytest.mark.parametrize("prompts", [["red", " "], [""]])
def test_an_empty_prompt_is_refused(
    superres: bool, prompts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main([str(tmp_path), *prompts]) == 78
    assert f"prompt {len(prompts) - 1} is empty" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_usage_error() -> None:
    with pytest.raises(SystemExit) as stop:
        generate.main(["run-without-text"])
    assert stop.value.code == 64


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("../../etc/passwd", "etc-passwd"),
        ("  !!! ", "picture"),
        ("x" * 99, "x" * 40),
        ("Two  Words_here", "two-words-here"),
    ],
)
def test_slug(text: str, name: str) -> None:
    assert generate.slug(text) == name


def test_long_captions_fit_the_sheet() -> None:
    picture = Image.new("RGB", (8, 8))
    assert generate.sheet(["word " * 100], [[picture]]).size == (256, 278)
