"""The three sample builders against outputs of the published builders.

The reference's random draws cannot be repeated, so patches and regions are read from its loss mask and put in
the place of ours; everything else must then be equal.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cogview2.pipeline.config.model import CogLMConfig
from cogview2.pipeline.data import objectives
from cogview2.pipeline.data.objectives import (
    Sample,
    compose_row,
    generation_sample,
    text_sample,
    understanding_sample,
)
from cogview2.pipeline.models.coglm.masks import attention_mask
from cogview2.pipeline.tokenizers.vocabulary import Vocabulary

pytestmark = pytest.mark.golden
CONFIG, ICETK = CogLMConfig(), Vocabulary.icetk()
NAMES = ("single_zh", "single_en", "zh_en", "long")
FIELDS = ("tokens", "position_ids", "labels", "loss_mask")


def _cases(stored: dict[str, torch.Tensor], kind: str) -> list[dict[str, np.ndarray]]:
    prefixes = sorted({key.rpartition("/")[0] for key in stored if f"/{kind}/" in key})
    assert prefixes
    return [
        {name: stored[f"{prefix}/{name}"].numpy() for name in (*FIELDS, "mask", "sample")}
        for prefix in prefixes
    ]


def _equal(ours: Sample, theirs: dict[str, np.ndarray]) -> bool:
    mask = attention_mask(torch.from_numpy(ours.roles)[None])[0, 0].numpy()
    same = all(np.array_equal(getattr(ours, name), theirs[name]) for name in FIELDS)
    return same and np.array_equal(mask, theirs["mask"])


def test_generation(fixtures: Path) -> None:
    for case in _cases(load_file(fixtures / "golden/training_samples.safetensors"), "generation"):
        draws = [
            generation_sample(case["sample"], np.random.default_rng(seed), config=CONFIG, vocabulary=ICETK)
            for seed in range(8)
        ]
        assert any(_equal(ours, case) for ours in draws)
        assert all(int(ours.loss_mask.sum()) == 400 for ours in draws)


def test_understanding(fixtures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for case in _cases(load_file(fixtures / "golden/training_samples.safetensors"), "understanding"):
        loss = case["loss_mask"][112:].reshape(20, 20)
        masked = loss.copy()
        masked[:, 1:] |= loss[:, :-1]
        monkeypatch.setattr(objectives, "draw_patches", lambda *_, drawn=(masked, loss): drawn)
        rng = np.random.default_rng(0)
        assert _equal(understanding_sample(case["sample"], rng, config=CONFIG, vocabulary=ICETK), case)


def test_text(fixtures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for case in _cases(load_file(fixtures / "golden/training_samples.safetensors"), "text"):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], case["loss_mask"].astype(int), [0]])))
        regions = [(int(start), int(stop - start)) for start, stop in edges.reshape(-1, 2)]
        monkeypatch.setattr(objectives, "draw_text_regions", lambda *_, drawn=regions: drawn)
        assert _equal(text_sample(case["sample"], np.random.default_rng(0)), case)


def test_compose_row_gives_the_stored_form(fixtures: Path) -> None:
    stored = load_file(fixtures / "golden/training_samples.safetensors")
    for name in NAMES:
        row = stored[f"{name}/understanding/seed0/sample"].numpy()
        captions, current = [], []
        for piece in row[:112]:
            if piece == ICETK.pad:
                captions, current = captions + [current], []
            else:
                current.append(int(piece))
        composed = compose_row([caption for caption in captions if caption], row[112:], 112, ICETK)
        assert np.array_equal(composed, row)
