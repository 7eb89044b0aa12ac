"""Masked scores against the published rule in every dtype, and PB-relax of attention and layer norm."""

import math

import pytest
import torch
import torch.nn.functional as F

from cogview2.pipeline.config.model import CogLMConfig, DirectSRConfig, IterativeSRConfig
from cogview2.pipeline.models.coglm.masks import CONTEXT, HIDDEN, IMAGE, attention_mask
from cogview2.pipeline.models.coglm.model import CogLM
from cogview2.pipeline.models.coglm.pipe import PipeBlock, PipeFinalNorm
from cogview2.pipeline.models.sr.direct import DirectSR
from cogview2.pipeline.models.sr.iterative import IterativeSR
from cogview2.pipeline.models.sr.layout import direct_inputs, iterative_inputs
from cogview2.pipeline.models.transformer.attention import attend, relaxed_scores, score_bias
from cogview2.pipeline.models.transformer.norm import LayerNorm

ALPHA = 32.0
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Of the weights, which lie in [0, 1]."""
SIZES = {"layers": 2, "hidden": 32, "heads": 4, "max_positions": 64, "text_length": 8, "image_position": 16}


def published(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, log_weights: torch.Tensor
) -> torch.Tensor:
    """scores + W, times M, minus 10000 (1 - M), softmax, all in the working dtype (spec 2.3)."""
    mask = visible.to(q.dtype)
    scores = (q / math.sqrt(q.shape[-1])) @ k.mT + log_weights.to(q.dtype)
    return (scores * mask - 10_000 * (1 - mask)).softmax(-1) @ v


def _qkv(dtype: torch.dtype, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 6, 16, dtype=torch.float64).unbind()
    return (q * scale).to(dtype), k.to(dtype), v.to(dtype)


def _visible() -> torch.Tensor:
    visible = torch.ones(2, 1, 6, 6).tril().bool()
    visible[0, 0, 2] = False  # rows without any visible key
    visible[1, 0, 5] = False
    return visible


@pytest.mark.parametrize("alpha", [0.0, ALPHA])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("weight", [0.0, 1.4, 8.0, -3.0])
def test_attention_equals_the_published_formula(dtype: torch.dtype, weight: float, alpha: float) -> None:
    q, k, v = _qkv(dtype)
    visible, log_weights = _visible(), torch.tensor([weight, weight, 0.0, 0.0, 0.0, weight])
    out = attend(q, k, v, score_bias(visible, dtype, log_weights), 0.0, alpha)
    expected = published(q.double(), k.double(), v.double(), visible, log_weights)
    rows = visible.any(-1)[:, 0]
    error = (out.double() - expected).abs().amax((1, 3))
    assert error[rows].max() < 3 * TOLERANCE[dtype]
    if alpha or dtype != torch.float16:
        assert error[~rows].max() < 3 * TOLERANCE[dtype]  # uniform, whatever W
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("alpha", [0.0, ALPHA])
def test_what_hidden_keys_hold_changes_no_bit(dtype: torch.dtype, alpha: float) -> None:
    q, k, v = _qkv(dtype)
    visible = torch.tensor([True, True, False, True, False, False])[None, None, None].expand(2, 1, 6, 6)
    bias = score_bias(visible, dtype, torch.full((6,), 1.4))
    before = attend(q, k, v, bias, 0.0, alpha)
    hidden = ~visible[0, 0, 0]
    k[:, :, hidden], v[:, :, hidden] = 300, -7
    assert torch.equal(attend(q, k, v, bias, 0.0, alpha), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_relaxed_scores_are_the_formula_of_the_paper(dtype: torch.dtype) -> None:
    q, k, _ = _qkv(dtype, 10)
    scores = (q / 4) @ k.mT
    literal = (scores / ALPHA - (scores / ALPHA).amax(-1, keepdim=True)) * ALPHA
    ours = relaxed_scores(q, k, torch.zeros(6, 6), ALPHA)
    torch.testing.assert_close(ours, literal, atol=1e-4 if dtype == torch.float32 else 1e-12, rtol=0)
    assert (ours.amax(-1) == 0).all()


def test_gradients_of_relaxed_attention_are_those_of_plain_attention() -> None:
    visible, gradients = _visible(), []
    bias, seeing = score_bias(visible, torch.float64), visible.any(-1, keepdim=True)
    for alpha in (0.0, ALPHA):
        leaves = [part.requires_grad_() for part in _qkv(torch.float64)]
        out = attend(leaves[0], leaves[1], leaves[2], bias, 0.0, alpha)
        # Rows that see nothing have no loss; the published masking gives them no gradient either.
        gradients.append(torch.autograd.grad((out.square() * seeing).sum(), leaves))
    for plain, relaxed in zip(*gradients, strict=True):
        torch.testing.assert_close(relaxed, plain, atol=1e-10, rtol=0)


def test_scores_beyond_float16_need_the_relaxation() -> None:
    q, k, v = _qkv(torch.float16, 1.0)
    q, k = q * 300, k * 300
    visible = torch.ones(6, 6).tril().bool()
    scores = (q.double() / 4) @ k.double().mT
    truth = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v.double()
    assert scores.abs().max() > 2 * torch.finfo(torch.float16).max
    literal = published(q, k, v, visible, torch.zeros(6))
    assert literal.isnan().any()
    out = attend(q, k, v, score_bias(visible, torch.float16), 0.0, alpha=ALPHA)
    torch.testing.assert_close(out.double(), truth, atol=1e-3, rtol=0)


def test_dropout_of_relaxed_attention_drops_weights() -> None:
    q, k, v = _qkv(torch.float32)
    bias = torch.zeros(6, 6)
    torch.manual_seed(1)
    draws = torch.stack([attend(q, k, v, bias, 0.5, ALPHA) for _ in range(3000)])
    assert not torch.equal(draws[0], draws[1])
    torch.testing.assert_close(draws.mean(0), attend(q, k, v, bias, 0.0, ALPHA), atol=0.12, rtol=0)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_relaxed_layer_norm_is_the_literal_formula(scale: float) -> None:
    torch.manual_seed(0)
    norm = LayerNorm(CogLMConfig(hidden=32, heads=4, layernorm_pb_relax=True)).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(3, 5, 32, dtype=torch.float64) * scale
    y = x / (x.abs().max() / 8)
    variance = ((y - y.mean(-1, keepdim=True)) ** 2).mean(-1, keepdim=True)
    expected = (y - y.mean(-1, keepdim=True)) / (variance + 1e-5).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(norm(x), expected, atol=1e-12, rtol=0)
    plain = LayerNorm(CogLMConfig(hidden=32, heads=4)).double()
    plain.load_state_dict(norm.state_dict())
    torch.testing.assert_close(plain(x), F.layer_norm(x, (32,), norm.weight, norm.bias, 1e-5))
    # Scale-free: what differs is eps alone, and that shows only where x is small.
    difference = float((plain(x) - norm(x)).detach().abs().max())
    assert difference > 1e-1 if scale == 1e-3 else difference < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_relaxed_layer_norm_of_extremes_stays_finite(dtype: torch.dtype) -> None:
    norm = LayerNorm(CogLMConfig(hidden=32, heads=4, layernorm_pb_relax=True)).to(dtype)
    x = torch.randn(2, 32, dtype=dtype)
    for scale in (torch.finfo(dtype).max / 8, torch.finfo(dtype).tiny, 0.0):
        assert torch.isfinite(norm(x * scale)).all(), scale


def _relaxed(**options: object) -> CogLMConfig:
    return CogLMConfig(**SIZES, dropout=0.0, **options)  # type: ignore[arg-type]


def _models(config: CogLMConfig) -> list[tuple[torch.nn.Module, tuple[torch.Tensor, ...]]]:
    """CogLM, direct SR and iterative SR of one seed, with inputs that have pads."""
    torch.manual_seed(3)
    direct, iterative = DirectSRConfig(text_length=6), IterativeSRConfig(text_length=5)
    base, fine = torch.arange(4)[None] % 20, torch.arange(16)[None] % 20
    roles = torch.tensor([[CONTEXT, CONTEXT, HIDDEN, HIDDEN, IMAGE, IMAGE, IMAGE]])
    models: list[tuple[torch.nn.Module, tuple[torch.Tensor, ...]]] = [
        (CogLM(config, 50), (torch.arange(7)[None], torch.arange(7)[None], attention_mask(roles))),
        (
            DirectSR(config, direct, 2, 2, 50),
            direct_inputs(
                [[30, 31]], base, config=direct, coglm=config, ratio=2, base_grid=2, start_of_image=45
            ),
        ),
        (
            IterativeSR(config, iterative, 4, 50),
            iterative_inputs([[30, 31]], fine, config=iterative, coglm=config, grid=4),
        ),
    ]
    for model, _ in models:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return models


def test_every_model_takes_the_relaxation_and_computes_the_same() -> None:
    plain = _models(_relaxed())
    relaxed = _models(_relaxed(attention_pb_relax=ALPHA, layernorm_pb_relax=True))
    for (one, inputs), (other, _) in zip(plain, relaxed, strict=True):
        assert list(one.state_dict()) == list(other.state_dict())
        other.load_state_dict(one.state_dict())
        norms = [part for part in other.modules() if isinstance(part, torch.nn.LayerNorm)]
        assert len(norms) == 9 and all(isinstance(norm, LayerNorm) and norm.pb_relax for norm in norms)
        with torch.no_grad():
            torch.testing.assert_close(other(*inputs), one(*inputs), atol=2e-3, rtol=0)


def test_the_relaxation_reaches_the_scores_of_every_model(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def counted(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor, alpha: float) -> torch.Tensor:
        seen.append(alpha)
        return relaxed_scores(q, k, bias, alpha)

    monkeypatch.setattr("cogview2.pipeline.models.transformer.attention.relaxed_scores", counted)
    for model, inputs in _models(_relaxed(attention_pb_relax=8)):
        seen.clear()
        model(*inputs)
        assert seen == [8, 8], type(model)


def test_pipe_layers_take_the_relaxation() -> None:
    config = _relaxed(attention_pb_relax=ALPHA, layernorm_pb_relax=True)
    roles = torch.tensor([[CONTEXT, CONTEXT, HIDDEN, HIDDEN, IMAGE, IMAGE, IMAGE]])
    model = CogLM(config, 50)
    hidden = torch.randn(1, 7, 32)
    blocks = [PipeBlock(config, seed) for seed in (1, 2)]
    for block, plain in zip(blocks, model.transformer.layers, strict=True):
        plain.load_state_dict(block.state_dict())
    norm = PipeFinalNorm(config)
    assert norm.pb_relax and blocks[0].input_layernorm.pb_relax and blocks[0].attention.pb_relax == ALPHA
    bias = score_bias(attention_mask(roles), torch.float32)
    expected = model.transformer(hidden, lambda layer, attention, x: attention(x, bias))
    out = norm(blocks[1](blocks[0]((hidden, roles))))
    assert torch.equal(out, expected)
