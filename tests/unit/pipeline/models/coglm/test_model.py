"""CogLM: parameter count, caching, isolation of hidden tokens, and the map to pipe layers."""

import pytest
import torch

from cogview2.pipeline.config.model import CogLMConfig
from cogview2.pipeline.errors import CheckpointError
from cogview2.pipeline.models.coglm.masks import CONTEXT, IMAGE, attention_mask
from cogview2.pipeline.models.coglm.model import CogLM
from cogview2.pipeline.models.coglm.pipe import PipeBlock, PipeFinalNorm, PipePositions, PipeWords, plain_name

TINY = CogLMConfig(layers=2, hidden=64, heads=4, max_positions=128, text_length=24, image_position=32)


class ListCache:
    """The simplest KeyValueCache."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if layer in self.layers:
            old_k, old_v = self.layers[layer]
            k, v = torch.cat([old_k, k], 2), torch.cat([old_v, v], 2)
        self.layers[layer] = k, v
        return k, v


def _model() -> CogLM:
    torch.manual_seed(0)
    model = CogLM(TINY, rows=50).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_published_parameter_count() -> None:
    with torch.device("meta"):
        model = CogLM(CogLMConfig(), rows=150_010)
    assert sum(parameter.numel() for parameter in model.parameters()) == 5_902_307_328


def test_cached_steps_equal_one_pass() -> None:
    model, prompt, length = _model(), 5, 12
    tokens = torch.randint(0, 50, (2, length))
    positions = torch.cat([torch.arange(prompt), 32 + torch.arange(length - prompt)]).expand(2, -1)
    mask = attention_mask(torch.tensor([[CONTEXT] * prompt + [IMAGE] * (length - prompt)] * 2))
    bias = torch.zeros(length, length)
    bias[:, :prompt] = 1.4
    with torch.no_grad():
        whole = model.logits(model(tokens, positions, mask, attention_bias=bias))
        cache, parts = ListCache(), []
        for start, stop in [(0, prompt + 1), *((step, step + 1) for step in range(prompt + 1, length))]:
            parts.append(
                model(
                    tokens[:, start:stop],
                    positions[:, start:stop],
                    mask[:, :, start:stop, :stop],
                    attention_bias=bias[start:stop, :stop],
                    cache=cache,
                )
            )
    torch.testing.assert_close(model.logits(torch.cat(parts, 1)), whole, atol=1e-4, rtol=1e-4)


def test_hidden_tokens_have_no_influence() -> None:
    model = _model()
    tokens = torch.randint(0, 50, (1, 8))
    mask = attention_mask(torch.tensor([[CONTEXT, CONTEXT, 0, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE]]))
    positions = torch.arange(8)[None]
    changed = tokens.clone()
    changed[0, 2] = (changed[0, 2] + 1) % 50
    changed[0, 6:] = (changed[0, 6:] + 1) % 50
    with torch.no_grad():
        before, after = model(tokens, positions, mask), model(changed, positions, mask)
    assert torch.equal(before[0, [0, 1, 3, 4, 5]], after[0, [0, 1, 3, 4, 5]])
    assert not torch.allclose(before[0, 6], after[0, 6])


def test_dropout_acts_only_in_training() -> None:
    model = _model()
    tokens, positions = torch.randint(0, 50, (1, 6)), torch.arange(6)[None]
    mask = torch.ones(1, 1, 6, 6).bool()
    assert torch.equal(model(tokens, positions, mask), model(tokens, positions, mask))
    model.train()
    assert not torch.equal(model(tokens, positions, mask), model(tokens, positions, mask))


def test_pipe_layers_hold_every_weight_once() -> None:
    layers = [
        PipeWords(TINY, 50, seed=0),
        PipePositions(TINY, seed=1),
        PipeBlock(TINY, seed=2),
        PipeBlock(TINY, seed=3),
        PipeFinalNorm(TINY),
    ]
    found = [
        (plain_name(f"{index}.{name}", TINY), parameter.shape)
        for index, layer in enumerate(layers)
        for name, parameter in layer.named_parameters()
    ]
    assert sorted(found) == sorted((name, tensor.shape) for name, tensor in _model().state_dict().items())


@pytest.mark.parametrize(
    ("pipe", "plain"),
    [
        ("tied_modules.word_embeddings.weight", "word_embeddings.weight"),
        ("0.weight", "word_embeddings.weight"),
        ("1.position_embeddings.weight", "position_embeddings.weight"),
        ("3.attention.dense.bias", "layers.1.attention.dense.bias"),
        ("4.bias", "final_layernorm.bias"),
    ],
)
def test_plain_names_of_pipe_weights(pipe: str, plain: str) -> None:
    assert plain_name(pipe, TINY) == f"transformer.{plain}"


def test_foreign_names_are_refused() -> None:
    with pytest.raises(CheckpointError, match="no weights"):
        plain_name("5.weight", TINY)
    for name in ("optimizer.weight", "mixins.x", "transformer.layers.1.attention.dense.bias"):
        with pytest.raises(CheckpointError, match="layer index"):
            plain_name(name, TINY)
