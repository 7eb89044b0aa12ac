import pytest
import torch
from published_weights import rank_state, transformer_state

from cogview2.pipeline.errors import CheckpointError
from cogview2.pipeline.weights import blocks
from cogview2.pipeline.weights.archives import MemoryTensor, Stored
from cogview2.pipeline.weights.blocks import Blocks, merge, split

STATE = transformer_state(extra="direct", rows=32)


def _parts(name: str, count: int) -> list[Stored]:
    return [MemoryTensor(rank_state(STATE, rank, count)[name]) for rank in range(count)]


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("chunk", [1, 100, 2**20])
def test_parts_merge_into_the_whole(count: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "CHUNK_BYTES", chunk)
    for name, tensor in STATE.items():
        merged = merge(name, _parts(name, count), "here")
        assert merged.shape == tuple(tensor.shape) and merged.dtype == tensor.dtype
        assert torch.equal(merged.tensor(), tensor), name
        assert torch.equal(torch.cat(list(merged.chunks())), tensor), name


@pytest.mark.parametrize("count", [1, 2, 4])
def test_split_cuts_as_published(count: int) -> None:
    for rank in range(count):
        expected = rank_state(STATE, rank, count)
        for name, tensor in STATE.items():
            assert torch.equal(split(name, tensor, rank, count), expected[name]), name


def test_the_published_rule_in_numbers() -> None:
    # Two ranks, hidden size 8: rank 0 holds the rows 0-3, 8-11, 16-19 (spec 12).
    rows = torch.arange(24.0)[:, None].expand(24, 8).contiguous()
    ours = split("transformer.layers.0.attention.query_key_value.weight", rows, 0, 2)
    assert ours[:, 0].tolist() == [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19]


@pytest.mark.parametrize("rows", [0, 1, 8, 9, 16, 31, 32])
def test_the_first_rows_of_a_merged_vocabulary(rows: int) -> None:
    name = "transformer.word_embeddings.weight"
    assert torch.equal(merge(name, _parts(name, 4), "here").first_rows(rows).tensor(), STATE[name][:rows])


def test_a_number_and_an_empty_tensor() -> None:
    assert torch.equal(Blocks.of(MemoryTensor(torch.tensor(2.0))).tensor(), torch.tensor(2.0))
    assert Blocks.of(MemoryTensor(torch.empty(0, 3))).tensor().shape == (0, 3)


def test_copies_that_differ_are_refused() -> None:
    name = "transformer.layers.1.attention.dense.bias"
    first, second = _parts(name, 2)
    second.rows(0, 16)[3] += 1
    with pytest.raises(CheckpointError, match=f"{name} should be the same on every part"):
        merge(name, [first, second], "here")


def test_equal_nan_copies_are_equal() -> None:
    parts = [MemoryTensor(torch.tensor([1.0, float("nan")])) for _ in range(2)]
    assert merge("transformer.final_layernorm.weight", parts, "here").tensor()[0] == 1


@pytest.mark.parametrize(
    ("name", "shapes", "words"),
    [
        ("transformer.final_layernorm.weight", [(4,), (5,)], "do not fit together"),
        ("a.query_key_value.weight", [(4, 2), (4, 2)], "no multiple of 3"),
        ("mlp.dense_4h_to_h.weight", [(4,), (4,)], "not rows and columns"),
    ],
)
def test_parts_that_do_not_fit_are_refused(name: str, shapes: list[tuple[int, ...]], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        merge(name, [MemoryTensor(torch.zeros(shape)) for shape in shapes], "here")


def test_a_tensor_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(CheckpointError, match="cannot be cut into 5 parts"):
        split("transformer.word_embeddings.weight", STATE["transformer.word_embeddings.weight"], 0, 5)
