"""Which backend attends, and what the log says about it."""

import logging

import pytest
import torch

from cogview2.pipeline.config.model import CogLMConfig
from cogview2.pipeline.models.transformer import backends
from cogview2.pipeline.models.transformer.attention import SelfAttention, attend
from cogview2.pipeline.models.transformer.backends import backend_for, why_not_flex

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def a_new_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    backends._warn.cache_clear()


def test_flex_serves_on_a_gpu_and_sdpa_on_a_cpu() -> None:
    assert backend_for(GPU, torch.bfloat16, 64, 0.0) == "flex"
    assert backend_for(GPU, torch.float16, 64, 0.0) == "flex"
    assert backend_for(CPU, torch.float32, 64, 0.0) == "sdpa"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((CPU, torch.bfloat16, 64, 0.0), "cpu"),
        ((GPU, torch.bfloat16, 64, 0.1), "dropout"),
        ((GPU, torch.bfloat16, 64, 0.0, 32.0), "pb_relax"),
        ((GPU, torch.float64, 64, 0.0), "float64"),
        ((GPU, torch.bfloat16, 8, 0.0), "16 channels"),
    ],
)
def test_every_reason_is_one_sentence(arguments: tuple, word: str) -> None:
    reason = why_not_flex(*arguments)
    assert reason is not None and word in reason and "\n" not in reason
    assert backend_for(*arguments) == "sdpa"


def test_old_gpus_keep_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert "8.0" in str(why_not_flex(GPU, torch.float16, 64, 0.0))


def test_a_slower_choice_on_a_gpu_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            backend_for(GPU, torch.bfloat16, 64, 0.1)
            backend_for(CPU, torch.bfloat16, 64, 0.1)
    assert len(caplog.records) == 1 and "dropout" in caplog.text


def test_dropout_counts_in_training_alone() -> None:
    config = CogLMConfig(layers=1, hidden=32, heads=2, dropout=0.1, max_positions=8)
    attention = SelfAttention(config)
    assert attention.backend(GPU, torch.bfloat16) == "sdpa"
    assert attention.eval().backend(GPU, torch.bfloat16) == "flex"
    relaxed = SelfAttention(config.model_copy(update={"attention_pb_relax": 32.0})).eval()
    assert relaxed.backend(GPU, torch.bfloat16) == "sdpa"


def test_a_block_mask_excludes_dropout_and_relaxed_scores() -> None:
    q = torch.zeros(1, 1, 2, 16)
    for dropout, alpha in ((0.1, 0.0), (0.0, 32.0)):
        with pytest.raises(AssertionError, match="neither"):
            attend(q, q, q, object(), dropout, alpha)  # type: ignore[arg-type]
