"""A self-contained folder with all models of a run or weights folder, which plain torch opens (docs/weights.md)."""

from pathlib import Path

import numpy as np

from cogview2.pipeline import fsops
from cogview2.pipeline.errors import CheckpointError
from cogview2.pipeline.weights.card import model_card
from cogview2.pipeline.weights.collection import Collection, Member
from cogview2.pipeline.weights.exporting import save_torch, staged_folder
from cogview2.pipeline.weights.facts import Facts, Models, TextFacts
from cogview2.pipeline.weights.files import load_weights
from cogview2.pipeline.weights.folder import CLUSTERS, dump
from cogview2.pipeline.weights_manifest import KINDS, MANIFEST

CARD = "README.md"


def write_bundle(collection: Collection, target: Path, labels: np.ndarray | None) -> list[str]:
    """Write a bundle.

    Args:
        collection: what goes in.
        target: a new folder.
        labels: cluster of each image code, int64 [codes]; None leaves them to be fitted anew.

    Returns:
        What was written and what is not there, in words.

    Raises:
        CheckpointError: there is no model, or the target exists.
        RunDirectoryError: full disk and the like.
    """
    if not collection.members:
        raise CheckpointError(f"{collection.path} holds no models; train or import some first")
    lines = []
    with staged_folder(Path(target)) as folder:
        entries = {}
        for kind, member in collection.members.items():
            entries[kind] = _write_member(kind, member, folder)
            lines.append(f"{kind}: {entries[kind].bytes:,} bytes")
        if labels is not None:
            with fsops.staged(folder / CLUSTERS) as temporary, open(temporary, "xb") as file:
                np.save(file, labels.astype(np.int64), allow_pickle=False)
        facts = Facts(
            models=Models.model_validate(entries),
            data=collection.data,
            # A path of this machine means nothing elsewhere; the labels are in the bundle.
            sampling=collection.sampling.model_copy(update={"cluster_labels": None}),
            seed=collection.seed,
            clusters=None if labels is None else CLUSTERS,
        )
        fsops.write_text(folder / CARD, model_card(Path(target).name, facts))
        fsops.write_json(folder / MANIFEST, dump(facts))
    missing = [kind for kind in KINDS if kind not in entries]
    if missing:
        lines.append(f"not in it, because {collection.path} has none: {', '.join(missing)}")
    return lines


def _write_member(kind: str, member: Member, folder: Path) -> "TextFacts":
    text = isinstance(member.facts, TextFacts)
    path = folder / f"{kind}{'.model' if text else '.pt'}"
    if text:
        fsops.write_bytes(path, member.path.read_bytes())
    else:
        save_torch(path, load_weights(member.path))
    stored = {"file": path.name, "sha256": fsops.sha256_file(path), "bytes": path.stat().st_size}
    return member.facts.model_copy(update=stored)  # type: ignore[return-value]
