"""CogLM against logits of the published implementation, loaded by the published names."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cogview2.pipeline.config.model import CogLMConfig
from cogview2.pipeline.models.coglm.masks import CONTEXT, IMAGE, attention_mask
from cogview2.pipeline.models.coglm.model import CogLM

pytestmark = pytest.mark.golden


def load_golden(fixtures: Path, name: str) -> tuple[dict, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return (sizes, state dict, other tensors)."""
    sizes = json.loads((fixtures / f"golden/{name}.json").read_text())
    stored = load_file(fixtures / f"golden/{name}.safetensors")
    state = {key.removeprefix("state/"): value for key, value in stored.items() if key.startswith("state/")}
    return sizes, state, {key: value for key, value in stored.items() if not key.startswith("state/")}


def golden_config(sizes: dict) -> CogLMConfig:
    return CogLMConfig(
        layers=sizes["num_layers"],
        hidden=sizes["hidden_size"],
        heads=sizes["num_attention_heads"],
        max_positions=sizes["max_sequence_length"],
    )


@pytest.mark.parametrize("weighted", [True, False])
def test_logits_equal_the_published_ones(fixtures: Path, weighted: bool) -> None:
    sizes, state, stored = load_golden(fixtures, "coglm")
    model = CogLM(golden_config(sizes), sizes["vocab_size"]).eval()
    model.load_state_dict(state, strict=True)
    bias = stored["log_attention_weights"] if weighted else None
    with torch.no_grad():
        hidden = model(stored["tokens"], stored["position_ids"], stored["mask"] > 0, attention_bias=bias)
        logits = model.logits(hidden)
    expected = stored["logits_with_weights" if weighted else "logits_without_weights"]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(model.logits(hidden, rows=100), expected[..., :100], atol=1e-4, rtol=0)


def test_prefix_mask_comes_from_roles(fixtures: Path) -> None:
    _, _, stored = load_golden(fixtures, "coglm")
    roles = torch.where(stored["position_ids"] < 512, CONTEXT, IMAGE)
    assert torch.equal(attention_mask(roles), stored["mask"] > 0)
