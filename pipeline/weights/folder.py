"""A weights folder: imported weights or a bundle, on disk and as models (docs/weights.md)."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import numpy as np
import torch
from pydantic import ValidationError

from cogview2.pipeline import fsops
from cogview2.pipeline.config.sampling import SamplingConfig
from cogview2.pipeline.errors import CheckpointError
from cogview2.pipeline.models.coglm.model import CogLM
from cogview2.pipeline.models.sr.direct import DirectSR
from cogview2.pipeline.models.sr.iterative import IterativeSR
from cogview2.pipeline.models.vqvae.model import VQVAE
from cogview2.pipeline.tokenizers.text import TextTokenizer
from cogview2.pipeline.tokenizers.vocabulary import Vocabulary
from cogview2.pipeline.weights.facts import DataSizes, Facts, TextFacts, contradictions
from cogview2.pipeline.weights.files import load_model
from cogview2.pipeline.weights_manifest import KINDS, MANIFEST, checked_file, is_weights_folder, read_manifest

__all__ = ["CLUSTERS", "WeightsFolder", "alone", "is_weights_folder", "read_labels", "update_facts"]

CLUSTERS = "clusters.npy"


class WeightsFolder:
    """Serves wherever a run does: `models` are built by the very classes that the stages use."""

    def __init__(self, path: Path) -> None:
        """Name a folder; nothing is read yet."""
        self.path = Path(path)

    def exists(self) -> bool:
        """Return whether this is a weights folder."""
        return is_weights_folder(self.path)

    @property
    def facts(self) -> Facts:
        """weights.json, parsed.

        Raises:
            CheckpointError: there is none, or it is not valid.
        """
        found = read_manifest(self.path)
        try:
            return Facts.model_validate(found)
        except ValidationError as error:
            detail = error.errors()[0]
            place = ".".join(str(part) for part in detail["loc"])
            raise CheckpointError(
                f"{self.path / MANIFEST} is not valid: {place}: {detail['msg']}; import the weights again"
            ) from error

    def kinds(self) -> tuple[str, ...]:
        """Return which models the folder holds, in the order of the cascade."""
        models = self.facts.models
        return tuple(kind for kind in KINDS if models.get(kind) is not None)

    @property
    def data(self) -> DataSizes:
        """Sizes of pictures."""
        return self.facts.data

    @property
    def sampling(self) -> SamplingConfig:
        """How to draw; with imported weights the published way."""
        return self.facts.sampling

    @property
    def seed(self) -> int:
        """Seed of the clusters, where the folder has no file of them."""
        return self.facts.seed

    def check(self) -> None:
        """Refuse a folder whose models do not fit each other.

        Raises:
            CheckpointError: naming the first contradiction.
        """
        for problem in contradictions(self.facts.models):
            raise CheckpointError(
                f"{self.path} cannot draw: {problem}; import the matching one with --replace"
            )

    def file(self, kind: str) -> Path:
        """Return the file of a model, after a look at its size.

        Raises:
            CheckpointError: the folder lacks it, or the file is gone or another.
        """
        facts = self.facts.models.get(kind)
        if facts is None:
            have = ", ".join(self.kinds()) or "nothing"
            raise CheckpointError(
                f"{self.path} holds no {kind} (it holds {have}); add it: "
                f"cogview2 weights import --kind {kind} SRC {self.path}"
            )
        return checked_file(self.path, kind, {"file": facts.file, "bytes": facts.bytes})

    def vocabulary(self) -> Vocabulary:
        """Return the id layout, with as many rows as CogLM has embeddings."""
        self.file("icetk-text")
        models = self.facts.models
        layout = cast(TextFacts, models.icetk_text).vocabulary
        if models.coglm is None or models.coglm.rows == layout.rows:
            return layout
        try:
            return Vocabulary.model_validate(layout.model_dump() | {"rows": models.coglm.rows})
        except ValidationError as error:
            raise CheckpointError(
                f"{self.path}: coglm has embeddings for {models.coglm.rows:,} ids, too few for the id layout of "
                "icetk-text; import the matching one with --replace"
            ) from error

    def text_tokenizer(self) -> TextTokenizer:
        """Return the text tokenizer."""
        return TextTokenizer(self.file("icetk-text"), self.vocabulary())

    def vqvae(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> VQVAE:
        """Return the VQVAE in evaluation mode; see `load_model`."""
        return cast(VQVAE, self._model("icetk-image", device, dtype))

    def coglm(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> CogLM:
        """Return CogLM in evaluation mode; see `load_model`."""
        return cast(CogLM, self._model("coglm", device, dtype))

    def direct(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> DirectSR:
        """Return direct super-resolution in evaluation mode; see `load_model`."""
        return cast(DirectSR, self._model("direct-sr", device, dtype))

    def iterative(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> IterativeSR:
        """Return iterative super-resolution in evaluation mode; see `load_model`."""
        return cast(IterativeSR, self._model("iterative-sr", device, dtype))

    def _model(self, kind: str, device: torch.device | str, dtype: torch.dtype | None) -> torch.nn.Module:
        path, facts = self.file(kind), self.facts.models.get(kind)
        assert facts is not None and not isinstance(facts, TextFacts)
        return load_model(facts.build, path, device=device, dtype=dtype)

    def labels(self) -> torch.Tensor | None:
        """Return the cluster of each image code, int64 [codes]; None where the folder has no such file.

        Raises:
            CheckpointError: the file is gone or damaged, or is not for this codebook.
        """
        facts = self.facts
        if facts.clusters is None:
            return None
        codes = None if facts.models.icetk_image is None else facts.models.icetk_image.config.codebook_size
        return torch.from_numpy(read_labels(self.path / facts.clusters, codes))


def read_labels(path: Path, codes: int | None) -> np.ndarray:
    """Read the cluster of each image code from a .npy file; nothing in it is executed.

    Args:
        path: the published cluster_label.npy, or one of ours.
        codes: codebook size, None where it is not known.

    Returns:
        int64 [codes].

    Raises:
        CheckpointError: not such a file.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is no plain file; name the .npy with the cluster of each image code")
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(found, np.ndarray):
            raise ValueError("several arrays")
        if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer) or not found.size:
            raise ValueError(f"{found.dtype} {list(found.shape)} instead of integers [codes]")
        labels = np.array(found, dtype=np.int64)
        if labels.min() < 0 or labels.max() >= labels.size:
            raise ValueError(f"clusters from {labels.min()} to {labels.max()} for {labels.size} codes")
    except (ValueError, OSError, EOFError, SyntaxError, OverflowError, TypeError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        if "pickle" in reason:  # NumPy's text advises to load without protection
            reason = "no plain array of numbers"
        raise CheckpointError(
            f"{path} is no file of clusters ({reason}); nothing in it was executed"
        ) from error
    if codes is not None and labels.size != codes:
        raise CheckpointError(f"{path} has clusters of {labels.size:,} codes, but the codebook has {codes:,}")
    return labels


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Make the folder if need be and hold it; other writers wait, so that they lose none of each other's entries."""
    while True:
        fsops.make_dirs(folder)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # Who held it may have failed and removed it; then it is made again.
            if folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat()):
                yield
                return
        finally:
            os.close(descriptor)


def update_facts(folder: Path, change: Callable[[Facts], Facts]) -> Facts:
    """Rewrite weights.json, or write the first one, atomically; the caller holds the folder, see `alone`.

    Args:
        folder: exists.
        change: makes the new content of the old; what it raises leaves all as it was.
    """
    new = change(WeightsFolder(folder).facts if is_weights_folder(folder) else Facts())
    fsops.write_json(folder / MANIFEST, dump(new))
    return new


def dump(facts: Facts) -> dict[str, object]:
    """Return facts as weights.json holds them; models that are not there are left out."""
    found = facts.model_dump(mode="json", by_alias=True)
    found["models"] = {kind: entry for kind, entry in found["models"].items() if entry is not None}
    return {key: value for key, value in found.items() if value is not None}
