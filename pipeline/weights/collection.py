"""All models of a run or of a weights folder with their facts: what an export or a bundle is made of."""

from dataclasses import dataclass
from math import prod
from pathlib import Path

from cogview2.pipeline.config.sampling import SamplingConfig
from cogview2.pipeline.config.stages import Recipe
from cogview2.pipeline.errors import CheckpointError
from cogview2.pipeline.run_dir import MODEL_FILES, RunDirectory
from cogview2.pipeline.tokenizers.vocabulary import Vocabulary
from cogview2.pipeline.weights.archives import open_archive
from cogview2.pipeline.weights.facts import (
    CogLMFacts,
    DataSizes,
    DirectFacts,
    ImageFacts,
    IterativeFacts,
    NetworkFacts,
    TextFacts,
)
from cogview2.pipeline.weights.folder import WeightsFolder
from cogview2.pipeline.weights.importing import AVERAGES
from cogview2.pipeline.weights_manifest import KINDS, is_weights_folder


@dataclass(frozen=True)
class Member:
    """One model."""

    facts: NetworkFacts | TextFacts
    path: Path


@dataclass(frozen=True)
class Collection:
    """The models that a place holds, and how to draw with them."""

    path: Path
    members: dict[str, Member]
    """By kind, in the order of the cascade."""
    data: DataSizes
    sampling: SamplingConfig
    seed: int

    def member(self, kind: str) -> Member:
        """Return a model.

        Raises:
            CheckpointError: there is none of this kind.
        """
        if kind not in self.members:
            have = ", ".join(self.members) or "nothing"
            raise CheckpointError(f"{self.path} holds no {kind} (it holds {have}); train or import it first")
        return self.members[kind]


def open_collection(path: Path) -> Collection:
    """Return what a run has finished, or what a weights folder holds.

    Raises:
        CheckpointError: a weights folder that is damaged, or a run without one finished model.
        RunDirectoryError: neither a run nor a weights folder.
    """
    path = Path(path)
    if is_weights_folder(path):
        folder = WeightsFolder(path)
        facts = folder.facts
        members = {}
        for kind in folder.kinds():
            entry = facts.models.get(kind)
            assert entry is not None
            members[kind] = Member(entry, folder.file(kind))
        return Collection(path, members, facts.data, facts.sampling, facts.seed)
    return _of_run(RunDirectory(path))


def _of_run(run: RunDirectory) -> Collection:
    recipe = run.load_recipe()
    files = {}
    for kind in KINDS:
        unit, names = MODEL_FILES[kind]
        file = run.stage(unit).output / names[0]
        if run.stage(unit).done() is not None and file.is_file():
            files[kind] = file
    if "icetk-text" not in files:
        raise CheckpointError(f"{run.path} has not even a finished tokenizer; run the recipe first")
    vocabulary = Vocabulary.load(files["icetk-text"].with_name("vocabulary.json"))
    data = DataSizes(
        base_size=recipe.data.base_size,
        compression_rate=recipe.data.compression_rate,
        superres_ratio=recipe.data.superres_ratio,
    )
    members = {kind: Member(_facts(kind, recipe, vocabulary, file), file) for kind, file in files.items()}
    return Collection(run.path, members, data, recipe.sampling, recipe.seed)


def _facts(kind: str, recipe: Recipe, vocabulary: Vocabulary, file: Path) -> NetworkFacts | TextFacts:
    source = f"run {recipe.name}"
    if kind == "icetk-text":
        return TextFacts(source=source, vocabulary=vocabulary)
    tensors = open_archive(file).tensors
    dtypes = [tensor.dtype for tensor in tensors.values()]
    common = {
        "source": source,
        "dtype": str(max(set(dtypes), key=dtypes.count)).removeprefix("torch."),
        "parameters": sum(prod(tensor.shape) for name, tensor in tensors.items() if name not in AVERAGES),
    }
    coglm, rows = recipe.coglm.model, vocabulary.rows
    if kind == "icetk-image":
        return ImageFacts.model_validate({"config": recipe.vqvae.model, **common})
    if kind == "coglm":
        return CogLMFacts.model_validate({"config": coglm, "rows": rows, **common})
    if kind == "direct-sr":
        grids = {"base_grid": recipe.data.base_grid, "ratio": recipe.data.superres_ratio}
        sizes = {"config": recipe.direct_sr.model, "coglm": coglm, "rows": rows, **grids}
        return DirectFacts.model_validate({**sizes, **common})
    grid = {"grid": recipe.data.superres_grid}
    return IterativeFacts.model_validate(
        {"config": recipe.iterative_sr.model, "coglm": coglm, "rows": rows, **grid, **common}
    )
