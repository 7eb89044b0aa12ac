from typing import Any

import pytest
import torch
from published_weights import HEADS, ROWS, sat_config, transformer_state

from cogview2.pipeline.config.model import CogLMConfig, DirectSRConfig, IterativeSRConfig, VQVAEConfig
from cogview2.pipeline.errors import CheckpointError
from cogview2.pipeline.weights.facts import CogLMFacts, DirectFacts, ImageFacts, IterativeFacts, NetworkFacts
from cogview2.pipeline.weights.importing import count_parameters
from cogview2.pipeline.weights.sizes import Wishes, count_layers, kind_of, sizes_of

PUBLISHED: dict[str, tuple[NetworkFacts, int]] = {
    "coglm": (CogLMFacts(config=CogLMConfig(), rows=150_010), 5_902_307_328),
    "direct-sr": (
        DirectFacts(config=DirectSRConfig(), coglm=CogLMConfig(), rows=150_010, base_grid=20, ratio=3),
        7_725_895_680,
    ),
    "iterative-sr": (
        IterativeFacts(config=IterativeSRConfig(), coglm=CogLMConfig(), rows=150_010, grid=60),
        5_913_366_528,
    ),
    "icetk-image": (ImageFacts(config=VQVAEConfig()), 97_439_497),
}


def _shapes(facts: NetworkFacts) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in facts.build().state_dict().items()}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_sizes_come_back_from_published_shapes_alone(kind: str) -> None:
    facts, parameters = PUBLISHED[kind]
    shapes = _shapes(facts)
    assert count_parameters(shapes) == parameters
    assert kind_of(set(shapes)) == kind
    found = sizes_of(kind, shapes, {}, Wishes(), "here").facts
    assert found == facts


def _tiny(extra: str = "", **options: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in transformer_state(extra=extra, **options).items()}


def test_sizes_of_another_transformer() -> None:
    found = sizes_of("coglm", _tiny(), sat_config(), Wishes(), "here").facts
    assert isinstance(found, CogLMFacts)
    config = found.config
    assert (config.layers, config.hidden, config.heads, config.max_positions) == (2, 16, HEADS, 64)
    assert (found.rows, config.feed_forward_multiplier, config.vocabulary.rows) == (ROWS, 4, ROWS)


def test_layout_and_kernels_of_the_json_count() -> None:
    known = sat_config(layout=[8, 12, 48], kernel_size=3, kernel_size2=7)
    found = sizes_of("direct-sr", _tiny("direct"), known, Wishes(), "here").facts
    assert isinstance(found, DirectFacts)
    assert (found.base_grid, found.ratio, found.config.text_length) == (2, 3, 8)
    assert (found.config.local_kernel, found.config.cross_kernel) == ((5, 3), (7, 7))
    known = sat_config(layout="5,41", kernel_size=2)
    iterative = sizes_of("iterative-sr", _tiny("iterative"), known, Wishes(), "here").facts
    assert isinstance(iterative, IterativeFacts)
    assert (iterative.grid, iterative.config.text_length, iterative.config.local_kernel) == (6, 5, (3, 2))


def test_without_a_layout_the_published_ratio_is_assumed_and_said() -> None:
    found = sizes_of("direct-sr", _tiny("direct"), sat_config(), Wishes(), "here")
    assert isinstance(found.facts, DirectFacts)
    assert (found.facts.base_grid, found.facts.ratio) == (2, 3)
    assert "no layout is given" in found.notes[0]


@pytest.mark.parametrize(
    ("known", "wishes", "rows"),
    [
        (sat_config(vocab_size=27), Wishes(), 27),
        (sat_config(vocab_size=30, vocab_size_without_padding=28), Wishes(), 28),
        (sat_config(), Wishes(rows=20), 20),
        ({"num_attention_heads": 4}, Wishes(), 30),
    ],
)
def test_padded_rows_of_the_vocabulary(known: dict[str, Any], wishes: Wishes, rows: int) -> None:
    found = sizes_of("coglm", _tiny(), known, wishes, "here")
    assert isinstance(found.facts, CogLMFacts) and found.facts.rows == rows
    assert bool(found.notes) == (rows < ROWS)


def test_the_operators_heads_count_before_the_json() -> None:
    found = sizes_of("coglm", _tiny(), sat_config(num_attention_heads=2), Wishes(heads=8), "here").facts
    assert isinstance(found, CogLMFacts) and found.config.heads == 8


@pytest.mark.parametrize(
    "older", [{"layernorm_order": None, "sandwich_ln": True}, {"layernorm_order": "sandwich"}]
)
def test_older_key_names_are_understood(older: dict[str, Any]) -> None:
    sizes_of("coglm", _tiny(), sat_config(**older), Wishes(), "here")


BAD: dict[str, tuple[dict[str, Any], Wishes, str]] = {
    "no heads": ({}, Wishes(), "pass --heads"),
    "layers": (sat_config(num_layers=3), Wishes(), "num_layers 3, but its tensors have 2"),
    "hidden": (sat_config(hidden_size=32), Wishes(), "hidden_size 32, but its tensors have 16"),
    "inner": (sat_config(inner_hidden_size=32), Wishes(), "inner_hidden_size 32, but"),
    "pre norm": (sat_config(layernorm_order="pre"), Wishes(), "pre, not sandwich"),
    "no sandwich": (sat_config(layernorm_order=None, sandwich_ln=False), Wishes(), "not sandwich"),
    "head size": (sat_config(hidden_size_per_attention_head=8), Wishes(), "are not the hidden size"),
    "heads do not divide": ({}, Wishes(heads=3), "not a multiple of heads"),
    "too many rows": (sat_config(vocab_size=31), Wishes(), "the embeddings have 30 rows"),
    "text for a number": (sat_config(num_layers="2"), Wishes(), "not a number"),
    "negative": (sat_config(num_attention_heads=-4), Wishes(), "not a number"),
    "layout falls": (sat_config(layout=[12, 8, 44]), Wishes(), "rising numbers"),
    "layout of two": (sat_config(layout=[8, 44]), Wishes(), "is not 3 rising numbers"),
    "layout and cells": (sat_config(layout=[8, 12, 40]), Wishes(), "its tensors have 36"),
    "no square base": (sat_config(layout=[8, 11, 47]), Wishes(), "no square grid"),
    "base does not divide": (sat_config(layout=[8, 24, 60]), Wishes(), "no multiple of the base grid"),
    "own words, nonsense": ({"cogview2": {"config": 3}}, Wishes(), "has no sizes of a direct-sr"),
    "own words, no table": ({"cogview2": 3}, Wishes(), "is no table"),
}


@pytest.mark.parametrize("case", BAD)
def test_contradictions_are_refused(case: str) -> None:
    known, wishes, words = BAD[case]
    with pytest.raises(CheckpointError, match=words):
        sizes_of("direct-sr", _tiny("direct"), known, wishes, "here")


def test_our_own_words_are_exact() -> None:
    facts = DirectFacts(
        config=DirectSRConfig(local_kernel=(9, 9), text_length=7),
        coglm=CogLMConfig(layers=2, hidden=16, heads=2, max_positions=64),
        rows=30,
        base_grid=3,
        ratio=2,
    )
    known = {"cogview2": facts.model_dump(mode="json"), "num_attention_heads": 4}
    assert sizes_of("direct-sr", _tiny("direct"), known, Wishes(), "here").facts == facts
    with pytest.raises(CheckpointError, match="heads 4, but its tensors have 2"):
        sizes_of("direct-sr", _tiny("direct"), known, Wishes(heads=4), "here")


def test_a_layer_number_of_a_billion_builds_no_billion_layers() -> None:
    shapes = _tiny() | {"transformer.layers.999999999.input_layernorm.weight": (16,)}
    assert count_layers(shapes) == 3


@pytest.mark.parametrize("shape", [(30,), (0, 16), (30, 16, 1)])
def test_an_anchor_of_another_form_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointError, match="2 dims are needed"):
        sizes_of(
            "coglm", _tiny() | {"transformer.word_embeddings.weight": shape}, {}, Wishes(heads=4), "here"
        )


@pytest.mark.parametrize(
    "config",
    [
        VQVAEConfig(base_channels=8, norm_groups=4, latent_channels=12, codebook_size=7),
        VQVAEConfig(
            base_channels=64,
            encoder_multipliers=(1, 1, 3),
            encoder_res_blocks=1,
            decoder_multipliers=((1, 2, 1, 2, 4), (2, 1, 2, 4), (1, 3, 4)),
        ),
    ],
)
def test_sizes_of_another_vqvae(config: VQVAEConfig) -> None:
    shapes = _shapes(ImageFacts(config=config))
    known = {"norm_groups": config.norm_groups, "base_channels": config.base_channels}
    found = sizes_of("icetk-image", shapes, known, Wishes(), "here").facts
    assert isinstance(found, ImageFacts) and found.config == config


def test_vqvae_sizes_that_contradict_the_json_are_refused() -> None:
    shapes = _shapes(ImageFacts(config=VQVAEConfig(base_channels=32, codebook_size=7)))
    with pytest.raises(CheckpointError, match="codebook_size 8, but its tensors have 7"):
        sizes_of("icetk-image", shapes, {"codebook_size": 8}, Wishes(), "here")
    with pytest.raises(CheckpointError, match="not a multiple of norm_groups"):
        sizes_of("icetk-image", shapes, {"norm_groups": 5}, Wishes(), "here")
