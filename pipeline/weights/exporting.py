"""Weights out: the published layout, tensor-parallel parts included, or plain state dicts (spec 10)."""

import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal, cast

import torch

from cogview2.pipeline import fsops
from cogview2.pipeline.errors import CheckpointError
from cogview2.pipeline.weights.archives import MemoryTensor
from cogview2.pipeline.weights.blocks import Blocks, split
from cogview2.pipeline.weights.collection import Collection, Member
from cogview2.pipeline.weights.facts import (
    CogLMFacts,
    DirectFacts,
    ImageFacts,
    IterativeFacts,
    NetworkFacts,
    TextFacts,
)
from cogview2.pipeline.weights.files import load_weights
from cogview2.pipeline.weights.sizes import OURS
from cogview2.pipeline.weights.sources import LATEST, MODEL_CONFIG, SUFFIXES
from cogview2.pipeline.weights.writer import write_safetensors

Layout = Literal["sat", "plain"]
_WORDS = "transformer.word_embeddings.weight"
_STORAGE_FIELDS = {"file", "sha256", "bytes", "source", "iteration"}
_NO_ITERATION = 1
"""Written where the source names none; the published loader wants a number."""


@contextmanager
def staged_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`; on success it gets that name, on error it is gone.

    Raises:
        CheckpointError: `path` exists and is no empty folder.
    """
    if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
        raise CheckpointError(f"{path} exists already; name a new folder")
    fsops.make_dirs(path.parent)
    temporary = path.with_name(f".tmp.{path.name}.{secrets.token_hex(4)}")
    fsops.make_dirs(temporary)
    try:
        with fsops.explained(path):
            yield temporary
        fsops.replace(temporary, path)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)


class _Keeper:
    """A file that remembers why it could not be written: torch reports every such cause in the same words."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.error = file, None  # type: BinaryIO, OSError | None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def save_torch(path: Path, value: Any) -> None:
    """Write a torch file under the name `path`, whole or not at all.

    Raises:
        RunDirectoryError: full disk and the like.
    """
    with fsops.staged(path) as temporary, open(temporary, "xb") as file:
        keeper = _Keeper(file)
        try:
            torch.save(value, cast(IO[bytes], keeper))
        except RuntimeError:
            if keeper.error is not None:
                raise keeper.error from None
            raise


def export_weights(
    kind: str,
    collection: Collection,
    target: Path,
    *,
    parts: int = 1,
    dtype: torch.dtype | None = None,
    layout: Layout = "sat",
) -> list[str]:
    """Write one model so that the published loaders, or plain torch, read it.

    Args:
        kind: weights_manifest.KINDS.
        collection: where it is.
        target: for the transformers in layout `sat` a new folder; else a new file.
        parts: tensor-parallel degree; the vocabulary is padded with zero rows to a multiple of it.
        dtype: of the numbers; by default as they are.
        layout: `sat`, the published one, or `plain`, a bare state dict.

    Returns:
        What was written, in words.

    Raises:
        CheckpointError: the model cannot be cut so, or the target exists.
        RunDirectoryError: full disk and the like.
    """
    member = collection.member(kind)
    transformer = isinstance(member.facts, CogLMFacts | DirectFacts | IterativeFacts)
    if parts != 1 and not (transformer and layout == "sat"):
        raise CheckpointError(f"--tensor-parallel {parts}: only transformers in the layout sat have parts")
    if isinstance(member.facts, CogLMFacts | DirectFacts | IterativeFacts) and layout == "sat":
        return _sat(kind, member, target, parts, dtype)
    if target.exists() or target.is_symlink():
        raise CheckpointError(f"{target} exists already; name a new file")
    fsops.make_dirs(target.parent)
    if kind == "icetk-text":
        if dtype is not None:
            raise CheckpointError("--dtype: a text tokenizer has no numbers to cast")
        fsops.write_bytes(target, member.path.read_bytes())
        return [f"{kind} -> {target}"]
    assert not isinstance(member.facts, TextFacts)
    _file(kind, member.facts, load_weights(member.path), target, layout, dtype)
    return [f"{kind} -> {target}, its sizes -> {target.with_suffix('.json')}"]


def _file(
    kind: str,
    facts: NetworkFacts,
    state: Mapping[str, torch.Tensor],
    target: Path,
    layout: Layout,
    dtype: torch.dtype | None,
) -> None:
    """Write one file with its sizes in a JSON beside it."""
    if target.suffix not in SUFFIXES:
        raise CheckpointError(f"{target} has none of the endings {', '.join(SUFFIXES)}; name such a file")
    if target.suffix == ".safetensors":
        if layout == "sat":
            raise CheckpointError(
                f"{target}: the published layout is a .pt file; pass --layout plain for this one"
            )
        tensors = {name: Blocks.of(MemoryTensor(tensor)) for name, tensor in state.items()}
        write_safetensors(target, tensors, dtype, allow_nonfinite=True, where=kind)
    else:
        cast_state = {name: tensor.to(dtype or tensor.dtype) for name, tensor in state.items()}
        save_torch(target, {"module": cast_state} if layout == "sat" else cast_state)
    sizes = published_config(facts, 1) if not isinstance(facts, ImageFacts) else {}
    fsops.write_json(target.with_suffix(".json"), {**sizes, OURS: own_facts(facts)})


def _sat(
    kind: str,
    member: Member,
    target: Path,
    parts: int,
    dtype: torch.dtype | None,
) -> list[str]:
    facts, state = member.facts, load_weights(member.path)
    assert isinstance(facts, CogLMFacts | DirectFacts | IterativeFacts)
    heads = (facts.config if isinstance(facts, CogLMFacts) else facts.coglm).heads
    if parts < 1 or heads % parts:
        raise CheckpointError(
            f"--tensor-parallel {parts}: {heads} heads cannot be cut into so many equal parts"
        )
    padding = -facts.rows % parts
    words = state[_WORDS]
    if padding:
        state[_WORDS] = torch.cat([words, words.new_zeros(padding, words.shape[1])])
    iteration = facts.iteration if facts.iteration is not None else _NO_ITERATION
    with staged_folder(target) as folder:
        inner = fsops.make_dirs(folder / str(iteration))
        for rank in range(parts):
            part = {
                name: split(name, tensor, rank, parts).to(dtype or tensor.dtype)
                for name, tensor in state.items()
            }
            save_torch(
                inner / f"mp_rank_{rank:02d}_model_states.pt", {"module": part, "iteration": iteration}
            )
        fsops.write_json(folder / MODEL_CONFIG, {**published_config(facts, parts), OURS: own_facts(facts)})
        fsops.write_text(folder / LATEST, str(iteration))
    lines = [f"{kind}, {parts} part{'s' * (parts > 1)}, iteration {iteration} -> {target}"]
    if padding:
        lines.append(
            f"the vocabulary got {padding} zero rows, so that it can be cut into {parts}; keep them out of the softmax"
        )
    return lines


def own_facts(facts: NetworkFacts) -> dict[str, Any]:
    """Return the sizes of a model in our own words, for an exact way back."""
    return facts.model_dump(mode="json", exclude=_STORAGE_FIELDS)


def published_config(facts: NetworkFacts, parts: int) -> dict[str, Any]:
    """Return the model_config.json of the published layout (spec 10.1).

    `vocab_size` is what the embeddings of the parts have together, padding included.
    """
    assert not isinstance(facts, ImageFacts)
    coglm = facts.config if isinstance(facts, CogLMFacts) else facts.coglm
    found: dict[str, Any] = {
        "tokenizer_type": "icetk",
        "num_layers": coglm.layers,
        "hidden_size": coglm.hidden,
        "num_attention_heads": coglm.heads,
        "hidden_size_per_attention_head": coglm.hidden // coglm.heads,
        "inner_hidden_size": coglm.feed_forward_multiplier * coglm.hidden,
        "max_sequence_length": coglm.max_positions,
        "vocab_size": facts.rows + -facts.rows % parts,
        "vocab_size_without_padding": facts.rows,
        "layernorm_order": "sandwich",
        "model_parallel_size": parts,
    }
    if isinstance(facts, DirectFacts):
        base = facts.config.text_length + facts.base_grid**2
        found["layout"] = [facts.config.text_length, base, base + (facts.base_grid * facts.ratio) ** 2]
    elif isinstance(facts, IterativeFacts):
        found["layout"] = [facts.config.text_length, facts.config.text_length + facts.grid**2]
    return found
