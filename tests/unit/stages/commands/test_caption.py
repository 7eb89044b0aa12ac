"""The caption command: lines, JSON, options, and bad pictures among good ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cogview2.pipeline.config.sampling import CaptioningConfig, SamplingConfig
from cogview2.pipeline.sampling.captioning import Caption
from cogview2.stages.commands import _model_options, caption

CALLS: list[dict[str, Any]] = []


class _Tokenizer:
    rate = 8

    def encode(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        return (pixels_BCHW[:, :, :2, :2].mean(1).flatten(1) * 255).round().long()


class _Cascade:
    sampling = SamplingConfig(batch=2, captioning=CaptioningConfig(max_tokens=5))
    image_tokenizer, base_grid = _Tokenizer(), 2


def _caption(
    cascade: object, codes: torch.Tensor, language: str, config: CaptioningConfig, seed: int, **options: Any
) -> list[list[Caption]]:
    CALLS.append({"language": language, "config": config, "seed": seed, "count": len(codes), **options})
    return [
        [Caption(f"{language} grey {int(row[0])}", (1, 2), -0.5, True), Caption("other", (3,), -1.0, False)]
        for row in codes
    ]


@pytest.fixture(autouse=True)
def loads(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    CALLS.clear()
    loads: list[dict[str, Any]] = []

    def load(run: Path, **options: Any) -> _Cascade:
        loads.append({"run": run, **options})
        return _Cascade()

    monkeypatch.setattr(_model_options, "load_text_to_image", load)
    monkeypatch.setattr(caption, "caption_candidates", _caption)
    return loads


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"{grey}.png" for grey in (10, 20, 30)]
    for path in paths:
        Image.new("L", (16, 16), int(path.stem)).save(path)
    return [str(path) for path in paths]


def test_lines(pictures: list[str], capsys: pytest.CaptureFixture[str], loads: list[dict[str, Any]]) -> None:
    assert caption.main(["run", *pictures]) == 0
    expected = [
        f"{path}\t{language}\t-0.500\t{language} grey {Path(path).stem}"
        for path in pictures
        for language in ("en", "zh")
    ]
    assert capsys.readouterr().out.splitlines() == expected
    assert loads == [
        {"run": Path("run"), "device": None, "dtype": None, "coglm_weights": None, "superres": False}
    ]
    assert [(call["language"], call["count"], call["numbers"]) for call in CALLS] == [
        ("en", 2, [0, 1]),
        ("zh", 2, [0, 1]),
        ("en", 1, [2]),
        ("zh", 1, [2]),
    ]


def test_json_holds_every_candidate(pictures: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert caption.main(["run", *pictures, "--json", "--language", "zh"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["picture"] for one in found] == pictures
    assert found[1]["language"] == "zh"
    assert found[1]["captions"] == [
        {"text": "zh grey 20", "ids": [1, 2], "score": -0.5, "ended": True},
        {"text": "other", "ids": [3], "score": -1.0, "ended": False},
    ]


def test_options(pictures: list[str]) -> None:
    assert caption.main(["run", pictures[0], "--language", "en"]) == 0
    more = "--candidates 4 --temperature 0.7 --top-k 3 --max-tokens 9 --seed 6".split()
    assert caption.main(["run", pictures[0], "--language", "en", *more]) == 0
    assert CALLS[0]["config"] == CaptioningConfig(max_tokens=5) and CALLS[0]["seed"] == 0
    assert CALLS[1]["config"] == CaptioningConfig(max_tokens=9, temperature=0.7, top_k=3, candidates=4)
    assert CALLS[1]["seed"] == 6


def test_bad_pictures_do_not_stop_the_others(
    pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(Path(pictures[0]).read_bytes()[:40])
    arguments = ["run", str(bad), pictures[0], str(tmp_path / "missing.png"), str(tmp_path), pictures[2]]
    assert caption.main([*arguments, "--language", "en"]) == 78
    output = capsys.readouterr()
    assert [line.split("\t")[0] for line in output.out.splitlines()] == [pictures[0], pictures[2]]
    errors = output.err.splitlines()
    assert len(errors) == 3 and all(line.startswith("cogview2 caption: ") for line in errors)
    assert "bad.png cannot be used: image_" in errors[0] and "missing.png is not a file" in errors[1]
    assert caption.main(["run", str(bad), "--json"]) == 78
    assert capsys.readouterr().out == "[]\n"


def test_refused_options(pictures: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert caption.main(["run", pictures[0], "--temperature", "-1"]) == 78
    assert "--temperature -1.0: input should be greater than or equal to 0" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        caption.main(["run"])
    assert stop.value.code == 64
