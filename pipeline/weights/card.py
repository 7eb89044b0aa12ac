"""The model card of a bundle: only what its files show; what a person must add is marked."""

from cogview2.pipeline.weights.facts import (
    CogLMFacts,
    DirectFacts,
    Facts,
    ImageFacts,
    IterativeFacts,
    NetworkFacts,
    TextFacts,
)
from cogview2.pipeline.weights_manifest import KINDS

_WHAT = {
    "icetk-text": "text tokenizer (SentencePiece)",
    "icetk-image": "image tokenizer (hierarchical VQVAE)",
    "coglm": "CogLM: text to base codes, captions, ranking",
    "direct-sr": "direct super-resolution",
    "iterative-sr": "iterative super-resolution",
}


def sizes_in_words(facts: NetworkFacts | TextFacts) -> str:
    """Return the sizes of a model in a line."""
    if isinstance(facts, TextFacts):
        return f"{facts.vocabulary.text_pieces:,} pieces, {facts.vocabulary.image_codes:,} image codes before them"
    if isinstance(facts, ImageFacts):
        config = facts.config
        return f"{config.codebook_size:,} codes of {config.latent_channels}, {config.base_channels} base channels"
    coglm = facts.config if isinstance(facts, CogLMFacts) else facts.coglm
    sizes = f"{coglm.layers} layers, {coglm.hidden} hidden, {coglm.heads} heads, {facts.rows:,} ids"
    if isinstance(facts, DirectFacts):
        base, fine = facts.base_grid, facts.base_grid * facts.ratio
        return f"{sizes}, {base}x{base} to {fine}x{fine} codes"
    if isinstance(facts, IterativeFacts):
        return f"{sizes}, {facts.grid}x{facts.grid} codes"
    return f"{sizes}, {coglm.max_positions} positions"


def model_card(name: str, facts: Facts) -> str:
    """Return README.md of a bundle."""
    models = [(kind, facts.models.get(kind)) for kind in KINDS]
    there = [(kind, model) for kind, model in models if model is not None]
    rows = "\n".join(
        f"| `{model.file}` | {_WHAT[kind]} | {sizes_in_words(model)} | "
        f"{f'{model.parameters:,}' if model.parameters else '-'} | {model.dtype or '-'} | {model.source or '-'} |"
        for kind, model in there
    )
    absent = ", ".join(kind for kind, model in models if model is None)
    total = sum(model.parameters for _, model in there)
    data = facts.data
    size = data.base_size
    example = next((model.file for kind, model in there if kind != "icetk-text"), "coglm.pt")
    return f"""# {name}

Models of the CogView2 architecture in one folder: text to pictures in steps.

| file | what | sizes | parameters | numbers | made by |
|---|---|---|---|---|---|
{rows}

{total:,} parameters in all.{f" Not in this folder: {absent}." if absent else ""} Base pictures are {size}x{size} pixels \
({data.base_grid}x{data.base_grid} codes of {data.compression_rate}x{data.compression_rate} pixels); after \
super-resolution {size * data.superres_ratio}x{size * data.superres_ratio}.

## Use

With the cogview2 package this folder stands wherever a run may stand:

    cogview2 generate ./{name} "a text"

With plain torch, without that package:

    import json, torch
    facts = json.load(open("weights.json"))
    state = torch.load("{example}", weights_only=True, mmap=True)

`state` is a flat table of tensors under the published names. `weights.json` has the sizes of every model, its sha256,
the sizes of pictures, and how to draw.{" `clusters.npy` has the cluster of every image code (int64)." if facts.clusters else ""}

## Training data, licence, limits

Not known to the program that wrote this card. Whoever passes this folder on fills in:

- Training data: (to be filled in)
- Licence of the weights: (to be filled in; weights that were imported keep the terms under which they were published)
- Known limits and misuse: (to be filled in)
"""
