"""The generate command: file names, the sheet, and refusals in one sentence."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from cogview2.pipeline.config.sampling import SamplingConfig
from cogview2.pipeline.sampling.meter import Meter
from cogview2.pipeline.sampling.styles import Style
from cogview2.pipeline.sampling.text_to_image import Drawn, Pick
from cogview2.stages.commands import _model_options, generate


class _Tokenizer:
    """Decodes a code to a grey square of that brightness, 4 pixels a code."""

    def decode(self, codes_BG: torch.Tensor) -> torch.Tensor:
        side = int(codes_BG.shape[1] ** 0.5)
        grey_BHW = codes_BG.view(-1, side, side).float() / 255
        return grey_BHW[:, None].repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)


class _TextToImage:
    """Notes how it was loaded and asked; draws grey pictures."""

    def __init__(self, superres: bool, **loading: object) -> None:
        self.superres, self.loading, self.sampling = superres, loading, SamplingConfig()
        self.asked: dict[str, object] = {}

    def with_sampling(self, sampling: SamplingConfig) -> "_TextToImage":
        self.sampling = sampling
        return self

    def draw(
        self,
        prompts: list[str],
        seed: int,
        *,
        style: Style,
        candidates: int | None,
        keep: int,
        meter: Meter,
    ) -> Drawn:
        self.asked = dict(style=style, candidates=candidates, keep=keep)
        with meter.stage("base", torch.nn.Linear(1, 1), len(prompts)):
            pass
        rows = len(prompts) * keep
        base = torch.full((rows, 4), 10 + seed)
        direct, final = torch.full((rows, 16), 20), torch.full((rows, 16), 30)
        scores = [None] if candidates is None else [-1.5 - place for place in range(keep)]
        picks = [
            Pick(prompt, 3 * place, score)
            for prompt in range(len(prompts))
            for place, score in enumerate(scores)
        ]
        return Drawn(
            base_codes=base,
            direct_codes=direct if self.superres else None,
            final_codes=final if self.superres else base,
            image_tokenizer=_Tokenizer(),  # type: ignore[arg-type]
            batch=2,
            picks=tuple(picks),
        )


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[_TextToImage]:
    """What the command has loaded."""
    made: list[_TextToImage] = []

    def load(path: Path, *, superres: bool, **loading: object) -> _TextToImage:
        made.append(_TextToImage(superres, path=path, **loading))
        return made[-1]

    monkeypatch.setattr(_model_options, "load_text_to_image", load)
    return made


@pytest.mark.parametrize("superres", [True, False])
def test_files(
    superres: bool, loaded: list[_TextToImage], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pictures"
    prompts = ["A red/square!", "\u7ea2\u8272\u7684\u5706"]
    arguments = [str(tmp_path), *prompts, "--out", str(out), "--seed", "5"] + ["--base-only"] * (not superres)
    assert generate.main(arguments) == 0
    names = ["00-a-red-square.png", "01-\u7ea2\u8272\u7684\u5706.png"]
    if superres:
        names += [name.replace(".png", f".{kind}.png") for kind in ("direct", "base") for name in names[:2]]
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [str(out / name) for name in [*names, "sheet.png"]]
    assert printed.err.splitlines()[1].split()[:3] == ["base", "2", "0"]
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


def test_default_folder_is_in_the_run(loaded: list[_TextToImage], tmp_path: Path) -> None:
    assert generate.main([str(tmp_path), "red"]) == 0
    (folder,) = (tmp_path / "generated").iterdir()
    assert (folder / "00-red.png").is_file()


@pytest.mark.parametrize("prompts", [["red", " "], [""]])
def test_an_empty_prompt_is_refused(
    loaded: list[_TextToImage], prompts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main([str(tmp_path), *prompts]) == 78
    assert f"prompt {len(prompts) - 1} is empty" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["run-without-text"],
        ["run", "x", "--batch", "0"],
        ["run", "x", "--keep", "-1"],
        ["run", "x", "--candidates", "two"],
        ["run", "x", "--dtype", "int8"],
    ],
)
def test_usage_error(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        generate.main(arguments)
    assert stop.value.code == 64


def test_options_reach_the_models(loaded: list[_TextToImage], tmp_path: Path) -> None:
    styles = tmp_path / "styles.yaml"
    styles.write_text("wood: {suffix: carved}\n")
    options = ["--device", "cpu", "--dtype", "bfloat16", "--batch", "7", "--weights", "w.safetensors"]
    options += ["--styles", str(styles), "--style", "wood", "--candidates", "5", "--keep", "2"]
    assert generate.main([str(tmp_path), "red", *options]) == 0
    (cascade,) = loaded
    assert cascade.superres and cascade.sampling == SamplingConfig(batch=7)
    assert cascade.asked == {"style": Style(suffix="carved"), "candidates": 5, "keep": 2}
    wanted = {"device": torch.device("cpu"), "dtype": torch.bfloat16, "coglm_weights": Path("w.safetensors")}
    assert cascade.loading == wanted | {"path": tmp_path}


def test_defaults(loaded: list[_TextToImage], tmp_path: Path) -> None:
    assert generate.main([str(tmp_path), "red"]) == 0
    (cascade,) = loaded
    assert cascade.superres and cascade.sampling == SamplingConfig()
    assert cascade.asked == {"style": Style(), "candidates": None, "keep": 1}
    assert cascade.loading == {"path": tmp_path, "device": None, "dtype": None, "coglm_weights": None}


def test_several_pictures_of_a_prompt(loaded: list[_TextToImage], tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["red", "blue", "--candidates", "4", "--keep", "2", "--base-only", "--out", str(out)]
    assert generate.main([str(tmp_path), *arguments]) == 0
    names = ["00-red.png", "00-red-2.png", "01-blue.png", "01-blue-2.png"]
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, "sheet.png"])
    second = Image.open(out / "01-blue-2.png").text
    assert second["Description"] == "blue" and second["Number"] == "1"
    assert second["Candidate"] == "3" and second["Score"] == "-2.5000"
    assert Image.open(out / "sheet.png").size == (256, 4 * 278)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--style", "wood"], "no style 'wood'"),
        (["--styles", "missing.yaml"], "cannot read missing.yaml"),
        (["--device", "abacus"], "no device 'abacus' here"),
        (["--device", "cuda:99"], "no device 'cuda:99' here"),
    ],
)
def test_refusals(
    loaded: list[_TextToImage],
    options: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert generate.main([str(tmp_path), "red", *options]) == 78
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1
    assert not list(tmp_path.iterdir())


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
