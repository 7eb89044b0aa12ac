"""The rank command: order, JSON, options, and bad pictures among good ones."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from cogview2.pipeline.config.sampling import RankingConfig, SamplingConfig
from cogview2.pipeline.errors import DataError
from cogview2.pipeline.sampling.reranking import Ranking
from cogview2.pipeline.sampling.styles import Style
from cogview2.stages.commands import _model_options, rank

CALLS: list[dict[str, Any]] = []


class _Tokenizer:
    rate = 8

    def encode(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        return (pixels_BCHW[:, :, :2, :2].mean(1).flatten(1) * 255).round().long()


class _Cascade:
    sampling = SamplingConfig(batch=2, ranking=RankingConfig(reduce="sum"))
    image_tokenizer, base_grid = _Tokenizer(), 2
    coglm, vocabulary = SimpleNamespace(), SimpleNamespace()

    def encode(self, prompts: list[str]) -> list[list[int]]:
        if prompts == ["?"]:
            raise DataError("prompt 0 is empty ('?'); say what to draw")
        return [[ord(letter) for letter in prompt] for prompt in prompts]

    def encode_styled(self, prompt: str, style: Style) -> tuple[list[int], str | None]:
        assert style == Style()
        ids = self.encode([prompt])[0]
        return ids[:9], "it is too long" if len(ids) > 9 else None


def _rank(model: object, ids: list[int], codes: torch.Tensor, vocabulary: object, **options: Any) -> Ranking:
    CALLS.append({"ids": ids, **options})
    scores = -(codes[:, 0] - 20).abs().float()
    return Ranking(scores.argsort(descending=True, stable=True), scores)


@pytest.fixture(autouse=True)
def loads(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    CALLS.clear()
    loads: list[dict[str, Any]] = []

    def load(run: Path, **options: Any) -> _Cascade:
        loads.append({"run": run, **options})
        return _Cascade()

    monkeypatch.setattr(_model_options, "load_text_to_image", load)
    monkeypatch.setattr(rank, "rank", _rank)
    return loads


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"{grey}.png" for grey in (10, 21, 18)]
    for path in paths:
        Image.new("L", (16, 16), int(path.stem)).save(path)
    return [str(path) for path in paths]


def test_a_long_text_is_cut_aloud(pictures: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert rank.main(["run", "a" * 12, *pictures]) == 0
    assert capsys.readouterr().err == "cogview2 rank: it is too long\n"
    assert CALLS[0]["ids"] == [97] * 9


def test_order(pictures: list[str], capsys: pytest.CaptureFixture[str], loads: list[dict[str, Any]]) -> None:
    assert rank.main(["run", "ab", *pictures]) == 0
    expected = [f"-1.000\t{pictures[1]}", f"-2.000\t{pictures[2]}", f"-10.000\t{pictures[0]}"]
    assert capsys.readouterr().out.splitlines() == expected
    assert CALLS == [{"ids": [97, 98], "start": "language", "softmax": "all", "reduce": "sum", "batch": 2}]
    assert loads == [
        {"run": Path("run"), "device": None, "dtype": None, "coglm_weights": None, "superres": False}
    ]


def test_json(pictures: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert rank.main(["run", "a \u7ea2", *pictures[:2], "--json"]) == 0
    rows = [{"picture": pictures[1], "score": -1.0}, {"picture": pictures[0], "score": -10.0}]
    assert json.loads(capsys.readouterr().out) == {"text": "a \u7ea2", "pictures": rows}


def test_options(pictures: list[str]) -> None:
    for more in (
        ["--start", "chinese", "--softmax", "text", "--reduce", "mean"],
        ["--language", "zh"],
        ["--language", "en"],
    ):
        assert rank.main(["run", "ab", pictures[0], *more]) == 0
    chosen = [(call["start"], call["softmax"], call["reduce"]) for call in CALLS]
    assert chosen == [("chinese", "text", "mean"), ("chinese", "all", "sum"), ("english", "all", "sum")]


def test_bad_pictures_do_not_stop_the_others(
    pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rank.main(["run", "ab", str(tmp_path / "missing.png"), *pictures[:2]]) == 78
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 2 and "missing.png is not a file" in output.err
    assert rank.main(["run", "ab", str(tmp_path / "missing.png")]) == 78
    assert "none of the pictures can be used" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "words"), [(" ", "the text is empty"), ("?", "prompt 0 is empty")])
def test_a_text_is_needed(
    text: str, words: str, pictures: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert rank.main(["run", text, *pictures]) == 78
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["run", "text"], ["run", "t", "p", "--language", "en", "--start", "chinese"]]
)
def test_usage_errors(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        rank.main(arguments)
    assert stop.value.code == 64
