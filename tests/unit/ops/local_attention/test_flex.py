"""The FlexAttention backend, uncompiled, against a dense softmax over hand-counted windows."""

import math
from typing import Any

import pytest
import torch

from cogview2.ops.local_attention import reference
from cogview2.ops.local_attention.flex import (
    HIDDEN_BIAS,
    Layout,
    dense_mask,
    local_attention_2d_flex,
    missing_for_flex,
)

LAYOUTS = {
    "window": Layout((5, 7), (3, 5)),
    "even window": Layout((4, 6), (2, 4)),
    "larger than the grid": Layout((3, 2), (9, 9)),
    "causal": Layout((6, 9), (9, 5), is_causal=True),
    "tokens": Layout((6, 4), (3, 3), tokens=3),
    "coarse": Layout((6, 9), (5, 3), cross_grid=(3, 3), cross_kernel_size=(3, 3)),
    "all": Layout((6, 8), (3, 5), is_causal=True, tokens=2, cross_grid=(2, 8), cross_kernel_size=(1, 3)),
    "coarse alone": Layout((6, 6), None, cross_grid=(2, 3), cross_kernel_size=(3, 3)),
}


def _draw(layout: Layout, dtype: torch.dtype) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Arguments of a call, and its keys and values side by side, [B, K, 2, H, D]."""
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(2, *sizes, 2, 8, generator=generator, dtype=dtype)

    query, parts = draw(*layout.grid), []
    arguments: dict[str, Any] = {"query": query, "key": None, "value": None, "kernel_size": (1, 1)}
    if layout.tokens:
        tokens = draw(layout.tokens, 2)
        arguments |= {"additional_keys": tokens[:, :, 0], "additional_values": tokens[:, :, 1]}
        parts.append(tokens)
    if layout.cross_keys:
        cross = draw(*layout.cross_grid, 2)
        arguments |= {"cross_key": cross[..., 0, :, :], "cross_value": cross[..., 1, :, :]}
        arguments["cross_kernel_size"] = layout.cross_kernel_size
        parts.append(cross.flatten(1, 2))
    if layout.kernel_size is not None:
        local = draw(*layout.grid, 2)
        arguments |= {"key": local[..., 0, :, :], "value": local[..., 1, :, :]}
        arguments |= {"kernel_size": layout.kernel_size, "is_causal": layout.is_causal}
        parts.append(local.flatten(1, 2))
    return arguments, parts


def _dense(
    layout: Layout, query: torch.Tensor, parts: list[torch.Tensor], bias: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = torch.cat(parts, dim=1).double().unbind(2)
    scores = torch.einsum("bqhd,bkhd->bhqk", query.flatten(1, 2).double(), keys) * scale + bias[:, None, None]
    scores = scores.masked_fill(~dense_mask(layout), -math.inf)
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values)
    return out.unflatten(1, layout.grid), scores.logsumexp(-1).transpose(1, 2).unflatten(1, layout.grid)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
def test_one_softmax_over_all_keys(name: str, dtype: torch.dtype) -> None:
    layout = LAYOUTS[name]
    arguments, parts = _draw(layout, dtype)
    out, lse = local_attention_2d_flex(**arguments, scale=0.3, return_lse=True)
    expected, expected_lse = _dense(layout, arguments["query"], parts, torch.zeros(2, layout.keys), 0.3)
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 4e-2}[dtype]
    assert out.dtype == dtype
    assert lse.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=tolerance, rtol=0)


@pytest.mark.parametrize("hidden", (-math.inf, -10_000.0))
def test_biases_of_tokens_and_coarse_keys(hidden: float) -> None:
    layout = LAYOUTS["all"]
    arguments, parts = _draw(layout, torch.float32)
    token_bias = torch.tensor([[hidden, 0.5], [hidden, hidden]])
    out, lse = local_attention_2d_flex(
        **arguments, additional_bias=token_bias, cross_bias=torch.tensor(-0.7), return_lse=True
    )
    bias = torch.zeros(2, layout.keys)
    bias[:, :2] = token_bias.clamp_min(HIDDEN_BIAS)
    bias[:, 2 : 2 + layout.cross_keys] = -0.7
    expected, expected_lse = _dense(layout, arguments["query"], parts, bias, 1 / math.sqrt(8))
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-6, rtol=0)


def test_masks_are_those_of_the_reference() -> None:
    assert torch.equal(dense_mask(Layout((7, 7), (5, 3))), reference.dense_mask((7, 7), (7, 7), (5, 3)))
    assert torch.equal(
        dense_mask(Layout((7, 7), (5, 3), is_causal=True)), reference.dense_mask((7, 7), (7, 7), (5, 3), True)
    )
    coarse = Layout((6, 6), None, cross_grid=(2, 2), cross_kernel_size=(3, 1))
    assert torch.equal(dense_mask(coarse), reference.dense_mask((6, 6), (2, 2), (3, 1)))


def test_an_empty_batch_stays_in_the_graph() -> None:
    query, key, value = (torch.randn(0, 4, 4, 2, 8, requires_grad=True) for _ in range(3))
    with torch.no_grad():
        out, lse = local_attention_2d_flex(query, key, value, (3, 3), return_lse=True)
    assert out.shape == (0, 4, 4, 2, 8) and lse.shape == (0, 4, 4, 2)


def test_what_it_cannot_do_is_a_sentence() -> None:
    query = torch.randn(1, 2, 2, 1, 8)
    with pytest.raises(ValueError, match="FlexAttention has no dropout, got dropout_p=0.1; use the backend"):
        local_attention_2d_flex(query, query, query, (3, 3), dropout_p=0.1)
    with pytest.raises(ValueError, match="FlexAttention has no backward pass on the CPU; use the backend"):
        local_attention_2d_flex(query.clone().requires_grad_(), query, query, (3, 3))
    assert missing_for_flex(query) is None
