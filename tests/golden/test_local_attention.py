"""The gather reference against scores, outputs and gradients of the published operators."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cogview2.ops.local_attention import local_attention_2d
from cogview2.ops.local_attention.reference import dense_mask, similar, weighting

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


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_the_operator_equals_published_operators(fixtures: Path, case: str, backend: str) -> None:
    sizes = json.loads((fixtures / "golden/local_attention.json").read_text())[case]
    stored = load_file(fixtures / "golden/local_attention.safetensors")

    def heads_last(name: str) -> torch.Tensor:
        return stored[f"{case}/{name}"].permute(0, 2, 3, 1)[:, :, :, None]

    q, k, v = (heads_last(name).clone().requires_grad_() for name in "qkv")
    kernel = (sizes["kernel_h"], sizes["kernel_w"])
    out = local_attention_2d(q, k, v, kernel, is_causal=sizes["causal"], scale=1.0, backend=backend)
    torch.testing.assert_close(out, heads_last("out"), atol=1e-5, rtol=0)
    out.backward(heads_last("grad_out"))
    for name, tensor in zip("qkv", (q, k, v), strict=True):
        torch.testing.assert_close(tensor.grad, heads_last(f"d{name}"), atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ("local9x5", "causal9x5", "cross5x5_x3"))
def test_dense_masks_show_the_same_window(fixtures: Path, case: str) -> None:
    sizes = json.loads((fixtures / "golden/local_attention.json").read_text())[case]
    scores = load_file(fixtures / "golden/local_attention.safetensors")[f"{case}/scores"]
    kernel, grid = (sizes["kernel_h"], sizes["kernel_w"]), (scores.shape[1], scores.shape[2])
    keys = (grid[0] // 3, grid[1] // 3) if "cross" in case else grid
    mask = dense_mask(grid, keys, kernel, sizes["causal"])
    assert torch.equal(mask.sum(1), (scores[0] != -10000).sum(-1).flatten())
