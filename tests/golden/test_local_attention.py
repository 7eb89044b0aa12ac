"""The gather reference against scores, outputs and gradients of the published operators."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cogview2.ops.local_attention.reference import cross_mask, local_mask, similar, weighting

pytestmark = pytest.mark.golden
CASES = ("local9x5", "causal9x5", "cross5x5_x3", "group", "cross_anis")


def _grid_last(tensor: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] -> [B, N=1, H, W, C]."""
    return tensor.permute(0, 2, 3, 1)[:, None].contiguous()


@pytest.mark.parametrize("case", CASES)
def test_reference_equals_published_operators(fixtures: Path, case: str) -> None:
    sizes = json.loads((fixtures / "golden/local_attention.json").read_text())[case]
    stored = load_file(fixtures / "golden/local_attention.safetensors")
    kernel = (sizes["kernel_h"], sizes["kernel_w"])
    causal = sizes["causal"]
    q, k, v = (_grid_last(stored[f"{case}/{name}"]).requires_grad_() for name in "qkv")
    scores = similar(q, k, kernel, is_causal=causal)
    torch.testing.assert_close(scores[:, 0], stored[f"{case}/scores"], atol=1e-4, rtol=0)
    assert torch.equal(scores[:, 0] == -10000, stored[f"{case}/scores"] == -10000)
    out = weighting(scores.softmax(-1), v, kernel, is_causal=causal)
    torch.testing.assert_close(out, _grid_last(stored[f"{case}/out"]), atol=1e-4, rtol=0)
    out.backward(_grid_last(stored[f"{case}/grad_out"]))
    for name, tensor in zip("qkv", (q, k, v), strict=True):
        torch.testing.assert_close(tensor.grad, _grid_last(stored[f"{case}/d{name}"]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ("local9x5", "causal9x5", "cross5x5_x3"))
def test_dense_masks_show_the_same_window(fixtures: Path, case: str) -> None:
    sizes = json.loads((fixtures / "golden/local_attention.json").read_text())[case]
    scores = load_file(fixtures / "golden/local_attention.safetensors")[f"{case}/scores"]
    kernel, grid = (sizes["kernel_h"], sizes["kernel_w"]), scores.shape[1]
    mask = cross_mask(grid, 3, kernel) if "cross" in case else local_mask(grid, kernel, sizes["causal"])
    assert torch.equal(mask.sum(1), (scores[0] != -10000).sum(-1).flatten())
