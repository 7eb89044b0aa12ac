"""Direct and iterative super-resolution: the tensors of every model call, and what is drawn."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cogview2.pipeline.config.model import CogLMConfig, DirectSRConfig, IterativeSRConfig
from cogview2.pipeline.config.sampling import DirectSRSamplingConfig, IterativeSRSamplingConfig
from cogview2.pipeline.models.sr.direct import DirectSR
from cogview2.pipeline.models.sr.iterative import IterativeSR
from cogview2.pipeline.models.sr.layout import (
    RELEASED_PATTERN,
    diagonal_pattern,
    direct_inputs,
    iterative_inputs,
    lopar_masks,
)
from cogview2.pipeline.sampling import superres
from cogview2.pipeline.sampling.noise import batch_uniforms
from cogview2.pipeline.sampling.superres import direct_superres, iterative_superres
from cogview2.pipeline.tokenizers.vocabulary import Vocabulary

BASE = CogLMConfig(layers=1, hidden=16, heads=2, max_positions=32, text_length=8, image_position=10)
VOCABULARY = Vocabulary.uniform(20, 30)
TEXTS = [[30, 31, 32], [40]]
ICETK = Vocabulary.icetk()


class _Recorder(nn.Module):
    """Stands for a model of the published size: notes its inputs, and its logits point at id `position`."""

    def __init__(self, length: int, **facts: object) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.length, self.calls = length, []
        for name, value in facts.items():
            setattr(self, name, value)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        self.calls.append([part.clone() for part in inputs])
        return torch.arange(self.length).float()[None, :, None]

    def logits(self, hidden: torch.Tensor, rows: int) -> torch.Tensor:
        return torch.zeros(len(hidden), rows).scatter_(1, hidden.long(), 1e4)


def _random(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


@pytest.fixture(scope="module")
def direct() -> DirectSR:
    model = DirectSR(BASE, DirectSRConfig(text_length=5), 4, 2, VOCABULARY.rows)
    return _random(model)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def iterative() -> IterativeSR:
    return _random(IterativeSR(BASE, IterativeSRConfig(text_length=3), 8, VOCABULARY.rows))  # type: ignore[return-value]


def _direct(model: DirectSR, texts: list[list[int]], base: torch.Tensor, numbers: list[int]) -> torch.Tensor:
    return direct_superres(
        model,
        texts,
        base,
        batch_uniforms(0, numbers, "direct", 64, 2),
        vocabulary=VOCABULARY,
        labels=torch.arange(20) % 6,
        config=DirectSRSamplingConfig(),
    )


def _iterative(
    model: IterativeSR, texts: list[list[int]], codes: torch.Tensor, numbers: list[int]
) -> torch.Tensor:
    return iterative_superres(
        model,
        texts,
        codes,
        batch_uniforms(0, numbers, "iterative", 64, 6).permute(2, 0, 1),
        vocabulary=VOCABULARY,
        config=IterativeSRSamplingConfig(),
    )


def test_each_image_is_its_own(
    direct: DirectSR, iterative: IterativeSR, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = torch.randint(0, 20, (2, 16), generator=torch.Generator().manual_seed(0))
    codes = _direct(direct, TEXTS, base, [3, 4])
    final = _iterative(iterative, TEXTS, codes, [3, 4])
    assert codes.shape == final.shape == (2, 64) and 0 <= codes.min() and codes.max() < 20
    monkeypatch.setattr(superres, "_ROWS", 7)
    for row in range(2):
        alone = _direct(direct, TEXTS[row : row + 1], base[row : row + 1], [3 + row])
        assert torch.equal(alone[0], codes[row])
        alone = _iterative(iterative, TEXTS[row : row + 1], alone, [3 + row])
        assert torch.equal(alone[0], final[row])
    assert direct.training and iterative.training


def test_kept_cells_keep_their_code(iterative: IterativeSR) -> None:
    codes = torch.randint(0, 20, (1, 64), generator=torch.Generator().manual_seed(1))
    before = codes.clone()
    final = _iterative(iterative, TEXTS[:1], codes, [0])
    kept = ~lopar_masks(8)[0].flatten()
    assert torch.equal(codes, before)
    assert torch.equal(final[0, kept], codes[0, kept]) and not torch.equal(final, codes)


def test_a_cell_is_final_after_the_pass_of_its_value() -> None:
    """With the number of the pass as the drawn code, every cell ends with its own value."""

    class Counter(_Recorder):
        def logits(self, hidden: torch.Tensor, rows: int) -> torch.Tensor:
            return torch.zeros(len(hidden), rows).index_fill_(1, torch.tensor([len(self.calls)]), 1e4)

    model = Counter(3 + 36, base=BASE, config=IterativeSRConfig(text_length=3), grid=6)
    final = iterative_superres(
        model,  # type: ignore[arg-type]
        [[30]],
        torch.full((1, 36), 9),
        torch.zeros(6, 1, 36),
        vocabulary=VOCABULARY,
        config=IterativeSRSamplingConfig(),
    )
    values = torch.tensor(RELEASED_PATTERN).flatten()
    assert torch.equal(final[0], torch.where(values > 0, values, 9)) and len(model.calls) == 6


class _Counter(_Recorder):
    """Draws the number of the pass everywhere."""

    def __init__(self, grid: int) -> None:
        super().__init__(3 + grid**2, base=BASE, config=IterativeSRConfig(text_length=3), grid=grid)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(*inputs).expand(len(inputs[0]), -1, -1)

    def logits(self, hidden: torch.Tensor, rows: int) -> torch.Tensor:
        return torch.zeros(len(hidden), rows).index_fill_(1, torch.tensor([len(self.calls)]), 1e4)


def _count(
    grid: int, rows: int, config: IterativeSRSamplingConfig, edit_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, _Counter]:
    model = _Counter(grid)
    final = iterative_superres(
        model,  # type: ignore[arg-type]
        [[30]] * rows,
        torch.full((rows, grid**2), 19),
        torch.zeros(config.passes, rows, grid**2),
        vocabulary=VOCABULARY,
        config=config,
        edit_mask=edit_mask,
    )
    return final, model


def test_other_schedules_run_as_often_as_they_have_rounds() -> None:
    config = IterativeSRSamplingConfig(schedule="diagonal", window=4, mask_ratio=0.5, rounds=3, top_k=(7,))
    final, model = _count(8, 2, config)
    values = torch.from_numpy(diagonal_pattern(4, 0.5, 3)).repeat(2, 2).flatten()
    assert len(model.calls) == 3 and torch.equal(final, torch.where(values > 0, values, 19).expand(2, -1))


@pytest.mark.parametrize("rows", [1, 2])
def test_an_edit_mask_keeps_what_is_outside(rows: int) -> None:
    edited = torch.zeros(rows, 8, 8, dtype=torch.bool)
    edited[:, 2:5, 1:7] = True
    edited[-1, 6:] = True
    final, model = _count(8, 2, IterativeSRSamplingConfig(), edited.flatten(1))
    values = torch.tensor(RELEASED_PATTERN).repeat(2, 2)[:8, :8].flatten()
    for row in range(2):
        inside = edited[min(row, rows - 1)].flatten()
        assert torch.equal(final[row], torch.where(inside & (values > 0), values, 19))
        sent = model.calls[0][0][row, 3:] == VOCABULARY.start_of_image
        assert torch.equal(sent, inside & (values > 0))
    assert len(model.calls) == 6


def test_a_pass_without_open_cells_needs_no_model_run() -> None:
    edited = torch.zeros(1, 36, dtype=torch.bool)
    edited[0, [1, 3]] = True  # values 0 and 2
    final, model = _count(6, 1, IterativeSRSamplingConfig(), edited)
    assert len(model.calls) == 2 and final[0, 3] == 2 and (final[0] == 19).sum() == 35
    assert not _count(6, 1, IterativeSRSamplingConfig(), edited & False)[1].calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(direct: DirectSR, iterative: IterativeSR, dtype: torch.dtype) -> None:
    """Hidden states stay near those of float32, and codes are drawn."""
    base = torch.randint(0, 20, (2, 16), generator=torch.Generator().manual_seed(0))
    halves = [copy.deepcopy(model).to(dtype) for model in (direct, iterative)]
    codes = _direct(halves[0], TEXTS, base, [3, 4])  # type: ignore[arg-type]
    final = _iterative(halves[1], TEXTS, codes, [3, 4])  # type: ignore[arg-type]
    assert 0 <= final.min() and final.max() < 20
    inputs = [
        direct_inputs(
            TEXTS,
            base,
            config=direct.config,
            coglm=BASE,
            ratio=2,
            base_grid=4,
            start_of_image=VOCABULARY.start_of_image,
        ),
        iterative_inputs(TEXTS, codes, config=iterative.config, coglm=BASE, grid=8),
    ]
    for model, half, given in zip((direct, iterative), halves, inputs, strict=True):
        with superres.inference(model, half):
            exact, rounded = model(*given), half(*given)
            logits = half.logits(rounded, 20)
        assert rounded.dtype == dtype and logits.dtype == torch.float32
        error = (rounded.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        assert error < (0.05 if dtype == torch.bfloat16 else 0.01)


def test_refusals(iterative: IterativeSR, direct: DirectSR) -> None:
    with pytest.raises(ValueError, match=r"\[1, 64, 2\]"):
        _direct(direct, TEXTS[:1], torch.zeros(1, 16, dtype=torch.int64), [0, 1])
    with pytest.raises(ValueError, match="top_k"):
        IterativeSRSamplingConfig.model_validate({"top_k": (1, 2)})
    for wrong in (
        torch.ones(1, 36),
        torch.ones(3, 36, dtype=torch.bool),
        torch.ones(1, 35, dtype=torch.bool),
    ):
        with pytest.raises(ValueError, match=r"bool \[2 or 1, 36\]"):
            _count(6, 2, IterativeSRSamplingConfig(), wrong)


@pytest.mark.golden
def test_published_direct_call(fixtures: Path) -> None:
    stored = load_file(fixtures / "golden/sampling_calls.safetensors")
    tokens, mask = stored["direct_sr_call/tokens"], stored["direct_sr_call/mask"]
    model = _Recorder(4096, base=CogLMConfig(), config=DirectSRConfig(), base_grid=20, ratio=3)
    codes = direct_superres(
        model,  # type: ignore[arg-type]
        [tokens[0, :96][mask[-1, :96] > 0].tolist()],
        tokens[:, 96:496],
        torch.zeros(1, 3600, 2),
        vocabulary=ICETK,
        labels=stored["cluster_sampling/cluster_label"],
        config=DirectSRSamplingConfig(),
    )
    [(sent, positions, visible)] = model.calls
    assert torch.equal(sent, tokens[:, :4096])
    assert torch.equal(positions[0], stored["direct_sr_call/pos"])
    assert torch.equal(visible[0, 0], mask > 0)
    assert not stored["direct_sr_call/W"].any()  # and DirectSR has no such argument
    assert [int(visible[0, 0, row].sum()) for row in (0, 90, 95, 96, 495)] == [96, 96, 5, 405, 405]
    assert codes[0].tolist() == list(range(496, 4096))  # row 496 + k gives code k


@pytest.mark.golden
def test_published_iterative_calls(fixtures: Path) -> None:
    """The published run drew its own codes; they are fed back: what pass m draws is what call m + 1 shows."""
    stored = load_file(fixtures / "golden/sampling_calls.safetensors")
    expected = json.loads((fixtures / "golden/sampling_calls.json").read_text())["iterative_sr"]
    calls = [stored[f"iterative_sr_call{step}/tokens"] for step in range(1, 7)]
    masks = [mask.flatten() for mask in lopar_masks(60)]

    class Replay(_Recorder):
        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            super().forward(*inputs)
            known = calls[len(self.calls)][0] if len(self.calls) < 6 else torch.zeros(3616, dtype=torch.int64)
            known = known.masked_fill(known == ICETK.start_of_image, 0)
            return known.float()[None, :, None]

    model = Replay(3616, base=CogLMConfig(), config=IterativeSRConfig(), grid=60)
    real = stored["iterative_sr_call1/mask"][0] > 0
    final = iterative_superres(
        model,  # type: ignore[arg-type]
        [calls[0][0, :16][real].tolist()],
        stored["iterative_sr_start"],
        torch.zeros(6, 1, 3600),
        vocabulary=ICETK,
        config=IterativeSRSamplingConfig(),
    )
    assert [int(mask.sum()) for mask in masks] == expected["masked"]
    assert list(IterativeSRSamplingConfig().top_k) == expected["top_k"]
    assert IterativeSRSamplingConfig().temperature == expected["temperature"]
    assert len(model.calls) == 6
    for (tokens, positions, text_mask), theirs in zip(model.calls, calls, strict=True):
        assert torch.equal(tokens, theirs)
        assert torch.equal(positions[0], stored["iterative_sr_call1/pos"])
        assert torch.equal(text_mask[0], real)
    assert torch.equal(final[0, ~masks[0]], stored["iterative_sr_start"][0, ~masks[0]])
    assert int((~masks[0]).sum()) == 1300
