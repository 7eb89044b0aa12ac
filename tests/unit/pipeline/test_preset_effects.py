"""Every key of the table of differences changes what is computed, here or in a named test."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cogview2.pipeline.config.loading import load_recipe
from cogview2.pipeline.config.model import CogLMConfig, DirectSRConfig, IterativeSRConfig
from cogview2.pipeline.config.presets import DIFFERENCES
from cogview2.pipeline.config.sampling import DirectSRSamplingConfig, IterativeSRSamplingConfig
from cogview2.pipeline.config.stages import ObjectiveConfig
from cogview2.pipeline.data.objectives import compose_row, iterative_sr_sample, text_image_sample
from cogview2.pipeline.models.sr.direct import DirectSR
from cogview2.pipeline.models.sr.iterative import IterativeSR
from cogview2.pipeline.models.sr.layout import (
    direct_inputs,
    iterative_inputs,
    lopar_masks,
    new_position_rows,
)
from cogview2.pipeline.sampling.infilling import lay_out_infilling
from cogview2.pipeline.sampling.superres import direct_superres, iterative_superres
from cogview2.pipeline.tokenizers.vocabulary import Vocabulary
from cogview2.pipeline.training.schedules import learning_rate

ROOT = Path(__file__).resolve().parents[3]
UNIT = "tests/unit/pipeline"
SCORES = f"{UNIT}/models/transformer/test_scores.py"
ELSEWHERE = {
    "coglm.model.attention_pb_relax": f"{SCORES}::test_the_relaxation_reaches_the_scores_of_every_model",
    "coglm.model.layernorm_pb_relax": f"{SCORES}::test_relaxed_layer_norm_is_the_literal_formula",
    "sampling.ranking.candidates": f"{UNIT}/sampling/test_text_to_image.py::test_only_the_best_candidates_go_on",
    "sampling.ranking.applies": f"{UNIT}/sampling/test_text_to_image.py"
    "::test_the_released_selection_counts_for_base_pictures_alone",
    "sampling.editing.candidates": "tests/unit/stages/commands/test_edit.py::test_the_recipe_says_how_many",
    "sampling.ranking.start": f"{UNIT}/sampling/test_reranking.py::test_the_start_token_matters",
    "sampling.ranking.softmax": f"{UNIT}/sampling/test_reranking.py::test_equals_the_naive_computation",
    "sampling.ranking.reduce": f"{UNIT}/sampling/test_reranking.py::test_equals_the_naive_computation",
}
BASE = CogLMConfig(
    layers=1, hidden=32, heads=2, max_positions=128, text_length=12, image_position=16, dropout=0.0
)
WORDS = Vocabulary.uniform(100, 86)
ROW = compose_row([[WORDS.english[0]] * 3], np.arange(64), 12, WORDS)
GRID, RATIO = 5, 2


def _random(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def _direct(**options: Any) -> torch.Tensor:
    config = DirectSRConfig(**{"text_length": 6} | options)
    model = _random(DirectSR(BASE, config, GRID, RATIO, WORDS.rows))
    codes = torch.arange(GRID**2)[None]
    inputs = direct_inputs(
        [[110, 111, 112]], codes, config=config, coglm=BASE, ratio=RATIO, base_grid=GRID, start_of_image=180
    )
    with torch.no_grad():
        return torch.as_tensor(model(*inputs))


def _iterative(**options: Any) -> torch.Tensor:
    config = IterativeSRConfig(**{"text_length": 6} | options)
    model = _random(IterativeSR(BASE, config, 10, WORDS.rows))
    inputs = iterative_inputs([[110, 111, 112]], torch.arange(100)[None], config=config, coglm=BASE, grid=10)
    with torch.no_grad():
        return torch.as_tensor(model(*inputs))


def _iterative_sample(**options: Any) -> np.ndarray:
    config = IterativeSRConfig(text_length=4, **options)
    rng = np.random.default_rng(0)
    sample = iterative_sr_sample([110] * 9, np.arange(64), rng, config=config, coglm=BASE, vocabulary=WORDS)
    return sample.loss_mask


def _understanding(**options: Any) -> Any:
    objectives = ObjectiveConfig(caption_ratio=1.0, **options)
    rng = np.random.default_rng(0)
    return text_image_sample(ROW, rng, objectives=objectives, config=BASE, vocabulary=WORDS)


def _started(model: DirectSR | IterativeSR) -> torch.Tensor:
    return model.mixins.extra_position_embedding.position_embeddings.weight.detach()


def _start_of_direct(init: Any) -> torch.Tensor:
    model = DirectSR(BASE, DirectSRConfig(text_length=6, position_init=init), GRID, RATIO, WORDS.rows)
    state = {k: v for k, v in _random(model).state_dict().items() if k.startswith("transformer.")}
    model.init_from_coglm(state)
    return _started(model)


def _start_of_iterative(init: Any) -> torch.Tensor:
    model = IterativeSR(BASE, IterativeSRConfig(text_length=6, position_init=init), 10, WORDS.rows)
    state = {k: v for k, v in _random(model).state_dict().items() if k.startswith("transformer.")}
    model.init_from_coglm(state, base_grid=GRID)
    return _started(model)


def _length(slots: int) -> torch.Tensor:
    row = compose_row([[WORDS.english[0]] * 9], np.arange(64), slots, WORDS)
    config = BASE.model_copy(update={"text_length": slots})
    sample = text_image_sample(
        row, np.random.default_rng(0), objectives=ObjectiveConfig(), config=config, vocabulary=WORDS
    )
    return torch.from_numpy(sample.tokens)


def _rates(steps: int) -> torch.Tensor:
    recipe = load_recipe("quickstart", [f"coglm.train.steps={steps}"])
    train = recipe.coglm.train
    return torch.tensor([learning_rate(step, train.steps, train.optimizer) for step in range(1000)])


def _masks(**options: Any) -> torch.Tensor:
    masks = lopar_masks(24, IterativeSRSamplingConfig(top_k=(5,), **options))
    return torch.stack(masks)


def _direct_codes(temperature: float) -> torch.Tensor:
    model = _random(DirectSR(BASE, DirectSRConfig(text_length=6), GRID, RATIO, WORDS.rows))
    assert isinstance(model, DirectSR)
    return direct_superres(
        model,
        [[110, 111]],
        torch.arange(GRID**2)[None],
        torch.rand(1, 100, 2, generator=torch.Generator().manual_seed(1)),
        vocabulary=WORDS,
        labels=torch.arange(100) % 10,
        config=DirectSRSamplingConfig(temperature=temperature),
    )


def _iterative_codes(**options: Any) -> torch.Tensor:
    model = _random(IterativeSR(BASE, IterativeSRConfig(text_length=6), 10, WORDS.rows))
    assert isinstance(model, IterativeSR)
    return iterative_superres(
        model,
        [[110, 111]],
        torch.arange(100)[None],
        torch.rand(6, 1, 100, generator=torch.Generator().manual_seed(1)),
        vocabulary=WORDS,
        config=IterativeSRSamplingConfig(**options),
    )


def _infilling(second: bool) -> torch.Tensor:
    redrawn = np.zeros((8, 8), dtype=bool)
    redrawn[3, 3] = True
    return lay_out_infilling(
        [110, 111],
        list(range(64)),
        redrawn,
        config=BASE,
        vocabulary=WORDS,
        text_attention_bias=1.4,
        second_start_of_image=second,
    ).tokens


HERE = {
    "sampling.iterative.schedule": lambda: (_masks(schedule="released"), _masks(schedule="diagonal")),
    "sampling.iterative.mask_ratio": lambda: (
        _masks(schedule="diagonal", mask_ratio=0.75),
        _masks(schedule="diagonal", mask_ratio=0.5),
    ),
    "sampling.iterative.window": lambda: (
        _masks(schedule="diagonal", window=6),
        _masks(schedule="diagonal", window=4),
    ),
    "sampling.iterative.rounds": lambda: (
        _masks(schedule="diagonal", rounds=6),
        _masks(schedule="diagonal", rounds=9),
    ),
    "sampling.direct.temperature": lambda: (_direct_codes(1.0), _direct_codes(1.5)),
    "sampling.iterative.temperature": lambda: (
        _iterative_codes(temperature=1.0),
        _iterative_codes(temperature=1.3),
    ),
    "sampling.iterative.top_k": lambda: (_iterative_codes(), _iterative_codes(top_k=(16,))),
    "sampling.editing.second_start_of_image": lambda: (_infilling(True), _infilling(False)),
    "direct_sr.model.local_kernel": lambda: (_direct(local_kernel=(9, 5)), _direct(local_kernel=(9, 9))),
    "iterative_sr.model.local_kernel": lambda: (
        _iterative(local_kernel=(9, 5)),
        _iterative(local_kernel=(9, 9)),
    ),
    "direct_sr.model.cross_kernel": lambda: (_direct(cross_kernel=(5, 5)), _direct(cross_kernel=(3, 3))),
    "direct_sr.model.text_length": lambda: (_direct(text_length=6), _direct(text_length=3)),
    "iterative_sr.model.text_length": lambda: (_iterative(text_length=6), _iterative(text_length=2)),
    "coglm.model.text_length": lambda: (_length(12), _length(8)),
    "coglm.objectives.patch_mode": lambda: (
        _understanding(patch_mode="released").roles,
        _understanding(patch_mode="paper").roles,
    ),
    "coglm.objectives.loss_normalisation": lambda: (
        _understanding(loss_normalisation="batch").loss_weights,
        _understanding(loss_normalisation="region").loss_weights,
    ),
    "coglm.train.steps": lambda: (_rates(1000), _rates(2000)),
    "iterative_sr.model.mask_ratios": lambda: (
        _iterative_sample(mask_ratios=(0.2,)),
        _iterative_sample(mask_ratios=(0.9,)),
    ),
    "direct_sr.model.position_init": lambda: (_start_of_direct("tiled"), _start_of_direct("nearest")),
    "iterative_sr.model.position_init": lambda: (
        _start_of_iterative("tiled"),
        _start_of_iterative("nearest"),
    ),
}


def test_every_key_has_a_test() -> None:
    keys = {each.key for each in DIFFERENCES if each.key is not None}
    assert set(HERE) | set(ELSEWHERE) == keys and not set(HERE) & set(ELSEWHERE)


@pytest.mark.parametrize("key", sorted(HERE))
def test_the_key_changes_something(key: str) -> None:
    first, second = (torch.as_tensor(np.asarray(each)) for each in HERE[key]())
    assert first.shape != second.shape or not torch.equal(first, second)
    again = torch.as_tensor(np.asarray(HERE[key]()[0]))
    assert torch.equal(first, again)  # and nothing else does


@pytest.mark.parametrize("key", sorted(ELSEWHERE))
def test_the_named_test_exists(key: str) -> None:
    file, _, name = ELSEWHERE[key].partition("::")
    assert f"\ndef {name}(" in (ROOT / file).read_text(encoding="utf-8")


def test_the_id_of_pads_changes_no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why the id in the unused text slots of super-resolution is no choice."""
    before = _direct(), _iterative()
    monkeypatch.setattr("cogview2.pipeline.models.sr.layout.TEXT_PAD", WORDS.pad)
    after = _direct(), _iterative()
    for one, other in zip(before, after, strict=True):
        assert not torch.equal(one[:, :3], other[:, :3])
        torch.testing.assert_close(one[:, 3:], other[:, 3:], atol=1e-6, rtol=0)


def test_the_published_new_positions_start_one_row_early() -> None:
    assert new_position_rows(20, 3, 512, "tiled")[0] == 512
    assert new_position_rows(20, 3, 512, "nearest")[0] == 513
