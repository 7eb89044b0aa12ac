"""Direct and iterative super-resolution against logits and inputs of the published implementation."""

import json
from math import isqrt
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cogview2.pipeline.config.model import CogLMConfig, DirectSRConfig, IterativeSRConfig
from cogview2.pipeline.models.sr.direct import DirectSR
from cogview2.pipeline.models.sr.iterative import IterativeSR
from cogview2.pipeline.models.sr.layout import direct_inputs, iterative_inputs, level0_mask, lopar_masks

pytestmark = pytest.mark.golden
START_OF_IMAGE = 150_000


def _load(
    fixtures: Path, name: str
) -> tuple[dict, CogLMConfig, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    sizes = json.loads((fixtures / f"golden/{name}.json").read_text())
    stored = load_file(fixtures / f"golden/{name}.safetensors")
    base = CogLMConfig(
        layers=sizes["num_layers"],
        hidden=sizes["hidden_size"],
        heads=sizes["num_attention_heads"],
        max_positions=sizes["max_sequence_length"],
    )
    state = {key.removeprefix("state/"): value for key, value in stored.items() if key.startswith("state/")}
    return sizes, base, state, {key: value for key, value in stored.items() if not key.startswith("state/")}


def _kernels(sizes: dict) -> tuple[tuple[int, int], tuple[int, int]]:
    size, cross = sizes["kernel_size"], sizes["kernel_size2"]
    return (2 * size - 1, size), (cross, cross)


def test_direct_sr_logits(fixtures: Path) -> None:
    sizes, base, state, stored = _load(fixtures, "dsr")
    text, level0, length = sizes["layout"]
    base_grid = isqrt(level0 - text)
    local, cross = _kernels(sizes)
    config = DirectSRConfig(text_length=text, local_kernel=local, cross_kernel=cross)
    ratio = isqrt(length - level0) // base_grid
    model = DirectSR(base, config, base_grid, ratio, sizes["vocab_size"]).eval()
    model.load_state_dict(state, strict=True)
    tokens = stored["tokens"]
    positions = stored["position_ids"].expand_as(tokens)
    mask = (stored["mask"] > 0).expand(tokens.shape[0], 1, -1, -1)
    with torch.no_grad():
        logits = model.logits(model(tokens, positions, mask), rows=20_000)
    torch.testing.assert_close(logits[:, stored["logit_rows"]], stored["logits"], atol=1e-4, rtol=0)

    real = torch.tensor([int(row) for row in stored["mask"][-1, :text]]).bool()
    inputs = direct_inputs(
        [tokens[0, :text][real].tolist()],
        tokens[:1, text:level0],
        config=config,
        coglm=base,
        ratio=ratio,
        base_grid=base_grid,
        start_of_image=int(tokens[0, -1]),
    )
    for ours, theirs in zip(inputs, (tokens[:1], positions[:1], mask[:1]), strict=True):
        assert torch.equal(ours, theirs)


def test_iterative_sr_logits(fixtures: Path) -> None:
    sizes, base, state, stored = _load(fixtures, "itersr")
    text, length = sizes["layout"]
    grid = isqrt(length - text)
    config = IterativeSRConfig(text_length=text, local_kernel=_kernels(sizes)[0])
    model = IterativeSR(base, config, grid, sizes["vocab_size"]).eval()
    model.load_state_dict(state, strict=True)
    tokens = stored["tokens"]
    positions = stored["position_ids"].expand_as(tokens)
    real = (stored["mask"] > 0).reshape(1, text).expand(tokens.shape[0], -1)
    with torch.no_grad():
        logits = model.logits(model(tokens, positions, real), rows=20_000)
    torch.testing.assert_close(logits[:, stored["logit_rows"]], stored["logits"], atol=1e-4, rtol=0)

    ids = [tokens[0, :text][real[0]].tolist()]
    inputs = iterative_inputs(ids, tokens[:1, text:], config=config, coglm=base, grid=grid)
    for ours, theirs in zip(inputs, (tokens[:1], positions[:1], real[:1]), strict=True):
        assert torch.equal(ours, theirs)


def test_direct_sr_call_of_full_size(fixtures: Path) -> None:
    calls = load_file(fixtures / "golden/sampling_calls.safetensors")
    tokens, positions = calls["direct_sr_call/tokens"], calls["direct_sr_call/pos"]
    text = tokens[0, :96][calls["direct_sr_call/mask"][-1, :96] > 0].tolist()
    ours = direct_inputs(
        [text],
        tokens[:, 96:496],
        config=DirectSRConfig(),
        coglm=CogLMConfig(),
        ratio=3,
        base_grid=20,
        start_of_image=START_OF_IMAGE,
    )
    assert torch.equal(ours[0], tokens[:, :4096])
    assert torch.equal(ours[1][0], positions)
    assert torch.equal(ours[2][0, 0], calls["direct_sr_call/mask"] > 0)
    assert torch.equal(level0_mask(ours[2][:, 0, -1, :96], 400), ours[2])


def test_iterative_sr_calls_of_full_size(fixtures: Path) -> None:
    calls = load_file(fixtures / "golden/sampling_calls.safetensors")
    expected = json.loads((fixtures / "golden/sampling_calls.json").read_text())["iterative_sr"]["masked"]
    passes = lopar_masks(60)
    assert [int(mask.sum()) for mask in passes] == expected
    for step, mask in enumerate(passes, start=1):
        tokens = calls[f"iterative_sr_call{step}/tokens"]
        assert torch.equal(tokens[0, 16:] == START_OF_IMAGE, mask.flatten())
    real = calls["iterative_sr_call1/mask"] > 0
    first = calls["iterative_sr_call1/tokens"]
    start = calls["iterative_sr_start"].masked_fill(passes[0].flatten(), START_OF_IMAGE)
    ours = iterative_inputs(
        [first[0, :16][real[0]].tolist()], start, config=IterativeSRConfig(), coglm=CogLMConfig(), grid=60
    )
    assert torch.equal(ours[0], first)
    assert torch.equal(ours[1][0], calls["iterative_sr_call1/pos"])
    assert torch.equal(ours[2], real)
