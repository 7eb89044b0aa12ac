"""Both super-resolution models: sizes, start from CogLM, freezing, attention against the gather reference."""

import pytest
import torch

from cogview2.ops.local_attention.reference import local_attention_2d_reference
from cogview2.pipeline.config.model import CogLMConfig, DirectSRConfig, IterativeSRConfig
from cogview2.pipeline.models.coglm.model import CogLM
from cogview2.pipeline.models.sr.direct import DirectSR
from cogview2.pipeline.models.sr.iterative import IterativeSR
from cogview2.pipeline.models.sr.layout import direct_inputs, iterative_inputs
from cogview2.pipeline.models.transformer.attention import split_heads

BASE = CogLMConfig(layers=1, hidden=64, heads=4, max_positions=128, text_length=24, image_position=24)
ROWS, SOI, GRID, RATIO = 60, 59, 8, 2
FINE = GRID * RATIO


def _randomise(model: torch.nn.Module) -> None:
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)


def _direct(**options: object) -> DirectSR:
    config = DirectSRConfig(text_length=6, **options)
    model = DirectSR(BASE, config, GRID, RATIO, ROWS).eval()
    _randomise(model)
    return model


def _direct_batch(model: DirectSR) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    codes = torch.randint(0, 40, (2, GRID**2))
    return direct_inputs(
        [[41, 42], [43, 44, 45]],
        codes,
        config=model.config,
        coglm=BASE,
        ratio=RATIO,
        base_grid=GRID,
        start_of_image=SOI,
    )


def _heads_to_grid(x_BNSK: torch.Tensor, side: int) -> torch.Tensor:
    return x_BNSK.transpose(1, 2).unflatten(1, (side, side))


def test_published_parameter_counts() -> None:
    with torch.device("meta"):
        direct = DirectSR(CogLMConfig(), DirectSRConfig(), 20, 3, 150_010)
        iterative = IterativeSR(CogLMConfig(), IterativeSRConfig(), 60, 150_010)
    assert sum(parameter.numel() for parameter in direct.parameters()) == 7_725_895_680
    assert sum(parameter.numel() for parameter in iterative.parameters()) == 5_913_366_528


def test_direct_attention_equals_the_reference() -> None:
    model = _direct()
    layer = model.transformer.layers[0].attention
    plus = model.mixins.attention_plus
    seen = {}
    model.transformer.layers[0].input_layernorm.register_forward_hook(lambda _m, _i, out: seen.update(x=out))
    model.transformer.layers[0].third_layernorm.register_forward_hook(
        lambda _m, ins, _o: seen.update(a=ins[0])
    )
    with torch.no_grad():
        model(*_direct_batch(model))
        base = slice(6, model.level0)
        _, k0, v0 = (_heads_to_grid(t[:, :, base], GRID) for t in layer.project(seen["x"][:, : model.level0]))
        qkv1 = split_heads(plus.query_key_value[0](seen["x"][:, model.level0 :]), 4)
        q1, k1, v1 = (_heads_to_grid(t, FINE) for t in qkv1)
        out, _ = local_attention_2d_reference(
            q1, k1, v1, (9, 5), cross_key=k0, cross_value=v0, cross_kernel_size=(5, 5)
        )
        expected = plus.dense[0](out.flatten(3).flatten(1, 2))
    torch.testing.assert_close(seen["a"][:, model.level0 :], expected, atol=1e-4, rtol=1e-4)


def test_iterative_attention_equals_the_reference() -> None:
    model = IterativeSR(BASE, IterativeSRConfig(text_length=4), FINE, ROWS).eval()
    _randomise(model)
    block, seen = model.transformer.layers[0], {}
    block.input_layernorm.register_forward_hook(lambda _m, _i, out: seen.update(x=out))
    block.third_layernorm.register_forward_hook(lambda _m, ins, _o: seen.update(a=ins[0]))
    codes = torch.randint(0, 40, (2, FINE**2))
    inputs = iterative_inputs([[41, 42], [43]], codes, config=model.config, coglm=BASE, grid=FINE)
    with torch.no_grad():
        model(*inputs)
        q, k, v = block.attention.project(seen["x"])
        cells = [_heads_to_grid(t[:, :, 4:], FINE) for t in (q, k, v)]
        out, _ = local_attention_2d_reference(
            *cells,
            (9, 5),
            additional_keys=k[:, :, :4].transpose(1, 2),
            additional_values=v[:, :, :4].transpose(1, 2),
            additional_bias=torch.where(inputs[2], 0.0, -1e4),
        )
        expected = block.attention.dense(out.flatten(3).flatten(1, 2))
    torch.testing.assert_close(seen["a"][:, 4:], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("init", ["tiled", "nearest"])
def test_both_start_from_coglm(init: str) -> None:
    coglm = CogLM(BASE, ROWS)
    _randomise(coglm)
    state = coglm.state_dict()
    positions = state["transformer.position_embeddings.weight"]
    direct = _direct(position_init=init)
    direct.init_from_coglm(state)
    iterative = IterativeSR(BASE, IterativeSRConfig(text_length=4, position_init=init), FINE, ROWS)
    iterative.init_from_coglm(state, base_grid=GRID)
    first = {"tiled": 24 + GRID * 2 + 3, "nearest": 25 + GRID * 5 + 1}[init]
    for model in (direct, iterative):
        table = model.mixins.extra_position_embedding.position_embeddings.weight
        assert torch.equal(table[10 * FINE + 3], positions[first])
        for name, tensor in model.transformer.state_dict().items():
            assert torch.equal(tensor, state[f"transformer.{name}"])
    plus = direct.mixins.attention_plus
    assert torch.equal(
        plus.query_key_value[0].weight, coglm.transformer.layers[0].attention.query_key_value.weight
    )
    assert torch.equal(plus.dense[0].bias, coglm.transformer.layers[0].attention.dense.bias)


def test_iterative_can_start_from_direct() -> None:
    direct = _direct()
    iterative = IterativeSR(BASE, IterativeSRConfig(text_length=4, init="direct"), FINE, ROWS)
    _randomise(iterative)
    iterative.init_from_direct(direct.state_dict())
    plus = direct.mixins.attention_plus
    attention = iterative.transformer.layers[0].attention
    for ours, theirs in (
        (attention.query_key_value, plus.query_key_value[0]),
        (attention.dense, plus.dense[0]),
    ):
        assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)
    for name, tensor in iterative.state_dict().items():
        if ".attention." not in name:
            assert torch.equal(tensor, direct.state_dict()[name]), name


@pytest.mark.parametrize("frozen", [True, False])
def test_freezing_leaves_the_new_weights_trainable(frozen: bool) -> None:
    model = _direct(freeze_base=frozen)
    trainable = {name.split(".")[0] for name, weight in model.named_parameters() if weight.requires_grad}
    assert trainable == ({"mixins"} if frozen else {"mixins", "transformer"})
    model.train()
    model.logits(model(*_direct_batch(model))[:, model.level0 :], rows=40).sum().backward()
    assert (model.transformer.word_embeddings.weight.grad is None) == frozen
    assert all(weight.grad is not None for weight in model.mixins.parameters())


def test_a_mask_first_made_for_inference_can_train() -> None:
    model = _direct(local_kernel=(7, 3))
    batch = _direct_batch(model)
    with torch.inference_mode():
        model(*batch)
    model(*batch).sum().backward()


def test_base_codes_reach_only_their_neighbourhood() -> None:
    model = _direct(cross_kernel=(1, 1), local_kernel=(1, 1))
    tokens, positions, mask = _direct_batch(model)
    changed = tokens.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 40
    # With one layer, level 1 reads the base codes' own keys: only the four cells above base cell 0 change.
    with torch.no_grad():
        difference = (model(tokens, positions, mask) - model(changed, positions, mask))[0, model.level0 :]
    moved = difference.abs().amax(-1).gt(1e-6).nonzero().flatten().tolist()
    assert moved == [0, 1, FINE, FINE + 1]


def test_wrong_lengths_are_refused() -> None:
    model = _direct()
    with pytest.raises(ValueError, match=str(model.length)):
        model(
            torch.zeros(1, 5, dtype=torch.int64),
            torch.zeros(1, 5, dtype=torch.int64),
            torch.ones(1, 1, 2, 2).bool(),
        )
    iterative = IterativeSR(BASE, IterativeSRConfig(text_length=4), 4, ROWS)
    with pytest.raises(ValueError, match="20 tokens"):
        iterative(
            torch.zeros(1, 5, dtype=torch.int64),
            torch.zeros(1, 5, dtype=torch.int64),
            torch.ones(1, 4).bool(),
        )
    with pytest.raises(ValueError, match="multiple of the base grid"):
        iterative.init_from_coglm({}, base_grid=3)
