"""Sizes of a model from the shapes of its tensors, and from the JSON that published archives carry (spec 10)."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isqrt
from typing import Any

from pydantic import ValidationError

from cogview2.pipeline.config.model import (
    CogLMConfig,
    DirectSRConfig,
    IterativeSRConfig,
    VocabularyConfig,
    VQVAEConfig,
)
from cogview2.pipeline.errors import CheckpointError
from cogview2.pipeline.weights.facts import (
    NETWORKS,
    PUBLISHED_RATIO,
    CogLMFacts,
    DirectFacts,
    ImageFacts,
    IterativeFacts,
    NetworkFacts,
)

Shapes = Mapping[str, tuple[int, ...]]
ANCHORS = {
    "icetk-image": "quantize.embed.weight",
    "coglm": "transformer.word_embeddings.weight",
    "direct-sr": "transformer.word_embeddings.weight",
    "iterative-sr": "transformer.word_embeddings.weight",
}
"""Kind -> a tensor that every model of it has: what stands before this name is a prefix of all names."""
OURS = "cogview2"
"""Key of our own facts in the model_config.json of an export."""
_WORDS = "transformer.word_embeddings.weight"
_POSITIONS = "transformer.position_embeddings.weight"
_CELLS = "mixins.extra_position_embedding.position_embeddings.weight"
_UP = "transformer.layers.0.mlp.dense_h_to_4h.weight"
_PUBLISHED_HEADS = {(48, 3072): 48}


@dataclass(frozen=True)
class Wishes:
    """What the operator says of the sizes; it counts before what the files say."""

    heads: int | None = None
    rows: int | None = None


@dataclass
class Sizes:
    """The sizes of a model, and what was assumed for want of knowledge."""

    facts: NetworkFacts
    notes: list[str] = field(default_factory=list)


def kind_of(names: Mapping[str, Any] | set[str]) -> str | None:
    """Return the kind of model that has these tensors, by telling names anywhere in them."""
    if any(name.endswith(ANCHORS["icetk-image"]) for name in names):
        return "icetk-image"
    if not any(name.endswith(_WORDS) for name in names):
        return None
    if any("attention_plus." in name for name in names):
        return "direct-sr"
    return "iterative-sr" if any(name.endswith(_CELLS) for name in names) else "coglm"


def sizes_of(kind: str, shapes: Shapes, known: Mapping[str, Any], wishes: Wishes, where: str) -> Sizes:
    """Work the sizes of a model out.

    Args:
        kind: one of facts.NETWORKS.
        shapes: published name -> shape.
        known: the JSON beside the weights, in the published key names, or with our facts under `cogview2`.
        wishes: the operator's words.
        where: the source, for messages.

    Raises:
        CheckpointError: a telling tensor is missing, sizes contradict each other, or the heads are unknown.
    """
    own = known.get(OURS, known if "config" in known else None)
    try:
        if own is not None:
            if not isinstance(own, dict):
                raise CheckpointError(f"{where}: {OURS} of its JSON is no table; pass --config")
            return _own(kind, own, wishes, where)
        if kind == "icetk-image":
            return Sizes(ImageFacts(config=_vqvae(shapes, known, where)))
        return _transformer(kind, shapes, known, wishes, where)
    except ValidationError as error:
        detail = error.errors()[0]
        place = ".".join(str(part) for part in detail["loc"])
        text = detail["msg"].removeprefix("Value error, ")
        raise CheckpointError(f"{where} has no sizes of a {kind}: {place} {text}; pass --config") from error


def _own(kind: str, own: dict[str, Any], wishes: Wishes, where: str) -> Sizes:
    """Return sizes from our own facts, as `weights export` writes them; the operator must not say otherwise."""
    facts = NETWORKS[kind].model_validate(own)
    if not isinstance(facts, ImageFacts):
        coglm = facts.config if isinstance(facts, CogLMFacts) else facts.coglm
        _agree("heads", coglm.heads, wishes.heads, where)
        _agree("rows", facts.rows, wishes.rows, where)
    return Sizes(facts)


def _shape(shapes: Shapes, name: str, dims: int, where: str) -> tuple[int, ...]:
    if name not in shapes:
        raise CheckpointError(f"{where} lacks {name}, which tells the sizes; is it another --kind?")
    if len(shapes[name]) != dims or 0 in shapes[name]:
        raise CheckpointError(f"{where}: {name} has the shape {shapes[name]}; {dims} dims are needed")
    return shapes[name]


def _number(known: Mapping[str, Any], names: tuple[str, ...], where: str) -> int | None:
    for name in names:
        value = known.get(name)
        if value is None:
            continue
        if type(value) is not int or value < 1:
            raise CheckpointError(f"{where}: {name} is {value!r} in its JSON, not a number; pass --config")
        return value
    return None


def _agree(what: str, found: int, claimed: int | None, where: str) -> None:
    if claimed is not None and claimed != found:
        raise CheckpointError(
            f"{where}: its JSON says {what} {claimed}, but its tensors have {found}; name the right JSON with --config"
        )


def count_layers(shapes: Shapes) -> int:
    """Return how many transformer layers have tensors."""
    return len({name.split(".")[2] for name in shapes if re.match(r"transformer\.layers\.\d+\.", name)})


def _check_form(known: Mapping[str, Any], hidden: int, heads: int, where: str) -> None:
    """Refuse transformers that compute something else with the same tensors (spec 10.1)."""
    order = known.get("layernorm_order")
    if order not in (None, "sandwich") or (order is None and known.get("sandwich_ln") is False):
        raise CheckpointError(
            f"{where}: its layer norms are {order or 'not sandwich'}, not sandwich, as CogView2's"
        )
    size = _number(known, ("hidden_size_per_attention_head",), where)
    if size is not None and size * heads != hidden:
        raise CheckpointError(f"{where}: {heads} heads of {size} are not the hidden size {hidden}")


def _heads(known: Mapping[str, Any], wishes: Wishes, layers: int, hidden: int, where: str) -> int:
    heads = wishes.heads or _number(known, ("num_attention_heads",), where)
    heads = heads or _PUBLISHED_HEADS.get((layers, hidden))
    if heads is None:
        raise CheckpointError(
            f"{where}: the number of attention heads is in no tensor, and no JSON beside it tells; pass --heads N"
        )
    return heads


def _transformer(kind: str, shapes: Shapes, known: Mapping[str, Any], wishes: Wishes, where: str) -> Sizes:
    rows, hidden = _shape(shapes, _WORDS, 2, where)
    positions = _shape(shapes, _POSITIONS, 2, where)[0]
    inner = _shape(shapes, _UP, 2, where)[0]
    layers = count_layers(shapes)
    claimed_rows = wishes.rows or _number(known, ("vocab_size_without_padding", "vocab_size"), where)
    _agree("num_layers", layers, _number(known, ("num_layers",), where), where)
    _agree("hidden_size", hidden, _number(known, ("hidden_size",), where), where)
    _agree("inner_hidden_size", inner, _number(known, ("inner_hidden_size",), where), where)
    if inner % hidden:
        raise CheckpointError(f"{where}: the inner size {inner} is no multiple of the hidden size {hidden}")
    if claimed_rows is not None and claimed_rows > rows:
        raise CheckpointError(
            f"{where}: {claimed_rows:,} ids are claimed, but the embeddings have {rows:,} rows"
        )
    heads = _heads(known, wishes, layers, hidden, where)
    _check_form(known, hidden, heads, where)
    coglm = CogLMConfig(
        layers=layers,
        hidden=hidden,
        heads=heads,
        feed_forward_multiplier=inner // hidden,
        max_positions=positions,
    )
    notes = []
    told = _number(known, ("num_attention_heads",), where)
    if told is not None and told != heads:
        notes.append(f"--heads {heads} counts, though the JSON says {told}")
    if claimed_rows is not None and claimed_rows < rows:
        notes.append(f"{rows - claimed_rows:,} padded rows of the vocabulary are cut off")
        rows = claimed_rows
    coglm = coglm.model_copy(update={"vocabulary": VocabularyConfig(rows=rows)})
    if kind == "coglm":
        return Sizes(CogLMFacts(config=coglm, rows=rows), notes)
    cells = _shape(shapes, _CELLS, 2, where)[0]
    build = _direct if kind == "direct-sr" else _iterative
    sizes = build(known, coglm, rows, cells, where)
    return Sizes(sizes.facts, notes + sizes.notes)


def _layout(known: Mapping[str, Any], parts: int, where: str) -> list[int] | None:
    """Return the ends of the sequence's parts, where the JSON tells."""
    layout = known.get("layout")
    if isinstance(layout, str):
        layout = [int(part) for part in layout.split(",") if part.strip().isdigit()]
    if layout is None:
        return None
    whole = isinstance(layout, list) and len(layout) == parts and all(type(end) is int for end in layout)
    if not whole or sorted(set(layout)) != layout or layout[0] < 1:
        raise CheckpointError(f"{where}: the layout {layout!r} is not {parts} rising numbers; pass --config")
    return layout


def _kernels(known: Mapping[str, Any], where: str) -> dict[str, tuple[int, int]]:
    """Return windows: kernel_size k is (2k - 1) x k on the cells' own grid, kernel_size2 k is k x k (spec 4.3)."""
    found = {}
    size, cross = _number(known, ("kernel_size",), where), _number(known, ("kernel_size2",), where)
    if size is not None:
        found["local_kernel"] = (2 * size - 1, size)
    if cross is not None:
        found["cross_kernel"] = (cross, cross)
    return found


def _square(cells: int, what: str, where: str) -> int:
    side = isqrt(max(0, cells))
    if side < 1 or side**2 != cells:
        raise CheckpointError(f"{where}: {cells} {what} are no square grid")
    return side


def _direct(known: Mapping[str, Any], coglm: CogLMConfig, rows: int, cells: int, where: str) -> Sizes:
    grid = _square(cells, "high-resolution positions", where)
    layout, notes = _layout(known, 3, where), []
    options: dict[str, Any] = _kernels(known, where)
    if layout is None:
        base_grid = grid // PUBLISHED_RATIO
        notes.append(
            f"no layout is given; assumed: {DirectSRConfig().text_length} text slots (as published) and a "
            f"base grid of {base_grid}"
        )
    else:
        options["text_length"] = layout[0]
        base_grid = _square(layout[1] - layout[0], "base codes", where)
        _agree("layout with high-resolution cells", cells, layout[2] - layout[1], where)
    if base_grid < 1 or grid % base_grid:
        raise CheckpointError(f"{where}: a grid of {grid} is no multiple of the base grid {base_grid}")
    facts = DirectFacts(
        config=DirectSRConfig(**options), coglm=coglm, rows=rows, base_grid=base_grid, ratio=grid // base_grid
    )
    return Sizes(facts, notes)


def _iterative(known: Mapping[str, Any], coglm: CogLMConfig, rows: int, cells: int, where: str) -> Sizes:
    grid = _square(cells, "high-resolution positions", where)
    layout, notes = _layout(known, 2, where), []
    options: dict[str, Any] = _kernels(known, where)
    options.pop("cross_kernel", None)
    if layout is None:
        notes.append(
            f"no layout is given; assumed: {IterativeSRConfig().text_length} text slots (as published)"
        )
    else:
        options["text_length"] = layout[0]
        _agree("layout with high-resolution cells", cells, layout[1] - layout[0], where)
    facts = IterativeFacts(config=IterativeSRConfig(**options), coglm=coglm, rows=rows, grid=grid)
    return Sizes(facts, notes)


def _levels(shapes: Shapes, before: str, base: int, where: str) -> tuple[int, ...]:
    """Return the channel multipliers of the levels below `before`."""
    found: list[int] = []
    while (name := f"{before}.{len(found)}.block.0.conv1.weight") in shapes:
        width = _shape(shapes, name, 4, where)[0]
        if width % base:
            raise CheckpointError(f"{where}: {name} has {width} channels, no multiple of {base}")
        found.append(width // base)
    return tuple(found)


def _vqvae(shapes: Shapes, known: Mapping[str, Any], where: str) -> VQVAEConfig:
    base = _shape(shapes, "enc.conv_in.weight", 4, where)[0]
    codes, latent = _shape(shapes, "quantize.embed.weight", 2, where)
    _agree("base_channels", base, _number(known, ("base_channels",), where), where)
    _agree("z_channels", latent, _number(known, ("z_channels",), where), where)
    _agree("codebook_size", codes, _number(known, ("codebook_size",), where), where)
    blocks = 0
    while f"enc.down.0.block.{blocks}.conv1.weight" in shapes:
        blocks += 1
    published = VQVAEConfig()
    return VQVAEConfig(
        base_channels=base,
        encoder_multipliers=_levels(shapes, "enc.down", base, where),
        encoder_res_blocks=blocks,
        decoder_multipliers=tuple(_levels(shapes, f"decs.{index}.up", base, where) for index in range(3)),  # type: ignore[arg-type]
        latent_channels=latent,
        codebook_size=codes,
        norm_groups=_number(known, ("norm_groups", "num_groups"), where) or published.norm_groups,
    )
