"""Attention bias, the sandwich block against its formula, dropout, and the published initial weights."""

import math

import pytest
import torch
from torch.nn.functional import layer_norm

from cogview2.pipeline.config.model import CogLMConfig
from cogview2.pipeline.models.transformer.attention import SelfAttention, attend, score_bias, split_heads
from cogview2.pipeline.models.transformer.block import Block
from cogview2.pipeline.models.transformer.embeddings import tied_logits
from cogview2.pipeline.models.transformer.init import seeded
from cogview2.pipeline.models.transformer.trunk import Transformer

CONFIG = CogLMConfig(layers=2, hidden=32, heads=4, max_positions=40, text_length=8, image_position=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hidden_keys_get_no_weight_and_empty_rows_stay_finite(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 3, 8).to(dtype).unbind()
    v = torch.eye(3, 8, dtype=dtype)[None, None]
    visible = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 0]]).bool()
    weights = torch.tensor([50.0, 0.0, 90.0])
    out = attend(q, k, v, score_bias(visible[None, None], dtype, weights), 0.0)[0, 0, :, :3].float()
    assert out[0].tolist() == [1, 0, 0]
    assert out[1, 2] == 0
    assert torch.isfinite(out).all()
    if dtype != torch.float16:
        torch.testing.assert_close(out[2], torch.full((3,), 1 / 3), atol=2e-3, rtol=0)


def test_bias_is_added_before_masking() -> None:
    bias = score_bias(torch.tensor([True, False]), torch.float32, torch.tensor([1.4, 1.4]))
    assert bias[0] == pytest.approx(1.4)
    assert bias[1] <= -10000


def test_heads_are_contiguous_columns_of_contiguous_thirds() -> None:
    q, k, v = split_heads(torch.arange(24.0).view(1, 1, 24), heads=2)
    assert q[0, 1, 0].tolist() == [4, 5, 6, 7]
    assert k[0, 0, 0].tolist() == [8, 9, 10, 11]
    assert v[0, 1, 0].tolist() == [20, 21, 22, 23]


def test_block_follows_the_sandwich_formula() -> None:
    torch.manual_seed(1)
    block = Block(CONFIG).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 5, 32)
    visible = torch.ones(5, 5).tril().bool()

    def norm(y: torch.Tensor, name: str) -> torch.Tensor:
        layer = getattr(block, name)
        return layer_norm(y, (32,), layer.weight, layer.bias, 1e-5)

    y = norm(x, "input_layernorm")
    qkv = y @ block.attention.query_key_value.weight.T + block.attention.query_key_value.bias
    heads = []
    for head in range(4):
        q, k, v = (qkv[..., third * 32 + head * 8 : third * 32 + head * 8 + 8] for third in range(3))
        scores = (q / math.sqrt(8)) @ k.mT
        heads.append((scores * visible - 10000 * (1 - visible.float())).softmax(-1) @ v)
    a = torch.cat(heads, -1) @ block.attention.dense.weight.T + block.attention.dense.bias
    z = x + norm(a, "third_layernorm")
    m = norm(z, "post_attention_layernorm") @ block.mlp.dense_h_to_4h.weight.T + block.mlp.dense_h_to_4h.bias
    m = 0.5 * m * (1 + torch.tanh(0.7978845608028654 * m * (1 + 0.044715 * m * m)))
    m = m @ block.mlp.dense_4h_to_h.weight.T + block.mlp.dense_4h_to_h.bias
    expected = z + norm(m, "fourth_layernorm")
    bias = score_bias(visible, torch.float32)
    torch.testing.assert_close(block(x, lambda y: block.attention(y, bias)), expected, atol=1e-4, rtol=1e-4)


def test_dropout_acts_only_in_training() -> None:
    torch.manual_seed(0)
    attention = SelfAttention(CONFIG)
    x, bias = torch.randn(1, 6, 32), torch.zeros(6, 6)
    assert not torch.equal(attention(x, bias), attention(x, bias))
    attention.eval()
    assert torch.equal(attention(x, bias), attention(x, bias))


def test_fresh_weights_are_the_published_ones() -> None:
    torch.manual_seed(0)
    trunk = Transformer(CogLMConfig(layers=8, hidden=128, heads=4), rows=500)
    block = trunk.layers[3]
    for weight in (
        trunk.word_embeddings.weight,
        trunk.position_embeddings.weight,
        block.mlp.dense_h_to_4h.weight,
    ):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    for weight in (block.attention.dense.weight, block.mlp.dense_4h_to_h.weight):
        assert weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    for name, parameter in trunk.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif "layernorm" in name:
            assert (parameter == 1).all()


def test_seeded_neither_reads_nor_moves_the_outer_generator() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with seeded(5):
        first = torch.rand(2)
    assert torch.equal(torch.rand(3), expected)
    with seeded(5):
        assert torch.equal(torch.rand(2), first)


def test_recomputing_activations_changes_nothing() -> None:
    torch.manual_seed(0)
    trunk = Transformer(CONFIG, rows=10)
    bias = torch.zeros(7, 7)
    x = torch.randn(1, 7, 32)
    grads = []
    for recompute in (False, True):
        trunk.activation_checkpointing = recompute
        trunk.zero_grad()
        torch.manual_seed(3)
        trunk(x, lambda layer, attention, y: attention(y, bias)).square().sum().backward()
        grads.append([parameter.grad for parameter in trunk.layers.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_logits_are_float32_products_with_the_first_rows() -> None:
    hidden, words = torch.randn(2, 3, 8).bfloat16(), torch.randn(20, 8).bfloat16()
    full = tied_logits(hidden, words, rows=5)
    assert full.dtype == torch.float32
    torch.testing.assert_close(full, hidden.float() @ words[:5].float().T)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(tied_logits(hidden.float(), words.float(), rows=5), full)
