"""From a run directory or a weights folder to tokenizers and models: the one place that knows which file holds what."""

import contextlib
import hashlib
import io
from pathlib import Path

import numpy as np
import torch

from cogview2.pipeline import fsops
from cogview2.pipeline.config.data import DataConfig
from cogview2.pipeline.config.sampling import SamplingConfig
from cogview2.pipeline.config.stages import Recipe
from cogview2.pipeline.errors import CheckpointError, ConfigError, RunDirectoryError
from cogview2.pipeline.models.coglm.model import CogLM
from cogview2.pipeline.models.sr.direct import DirectSR
from cogview2.pipeline.models.sr.iterative import IterativeSR
from cogview2.pipeline.models.vqvae.model import VQVAE
from cogview2.pipeline.run_dir import MODEL_FILES, RunDirectory
from cogview2.pipeline.sampling.clusters import fit_clusters
from cogview2.pipeline.sampling.inference import device_of, let_visit
from cogview2.pipeline.sampling.text_to_image import TextToImage
from cogview2.pipeline.tokenizers.image import ImageTokenizer
from cogview2.pipeline.tokenizers.text import TextTokenizer
from cogview2.pipeline.tokenizers.vocabulary import Vocabulary
from cogview2.pipeline.weights.files import load_model
from cogview2.pipeline.weights.folder import WeightsFolder, read_labels
from cogview2.pipeline.weights_manifest import is_weights_folder

CLUSTERS = "clusters.npy"
"""In the output of train_vqvae, where the VQVAE was taken from a place that has clusters."""


_KEPT_FROM = 4096
"""Codes from which on fitted clusters are kept."""


def _labels(path: Path, codes: int) -> torch.Tensor:
    return torch.from_numpy(read_labels(path, codes))


def save_labels(path: Path, labels: torch.Tensor) -> None:
    """Write clusters, int64 [n], as .npy, atomically."""
    buffer = io.BytesIO()
    np.save(buffer, labels.numpy(), allow_pickle=False)
    fsops.write_bytes(path, buffer.getvalue())


def output_file(run: RunDirectory, kind: str, name: str | None = None) -> Path:
    """Return a file of the model `kind` (run_dir.MODEL_FILES) in a run; the first one by default.

    Raises:
        CheckpointError: its stage is not done.
    """
    unit, names = MODEL_FILES[kind]
    path = run.stage(unit).output / (name or names[0])
    if run.stage(unit).done() is None or not path.is_file():
        raise CheckpointError(
            f"{run.path} has no finished stage {unit}; run it first: cogview2 run RECIPE --stages {unit.partition('/')[0]}"
        )
    return path


def load_vocabulary(run: RunDirectory) -> Vocabulary:
    """Return the id layout of a run."""
    return Vocabulary.load(output_file(run, "icetk-text", "vocabulary.json"))


def load_text_tokenizer(run: RunDirectory) -> TextTokenizer:
    """Return the text tokenizer of a run."""
    return TextTokenizer(output_file(run, "icetk-text"), load_vocabulary(run))


def load_image_tokenizer(run: RunDirectory, recipe: Recipe, device: torch.device) -> ImageTokenizer:
    """Return the frozen VQVAE of a run as a tokenizer of the recipe's rate."""
    vqvae = load_model(lambda: VQVAE(recipe.vqvae.model), output_file(run, "icetk-image"), device=device)
    return ImageTokenizer(vqvae, recipe.data.compression_rate)


def build_direct(recipe: Recipe, rows: int) -> DirectSR:
    """Return direct SR of the recipe's sizes, fresh weights."""
    return DirectSR(
        recipe.coglm.model, recipe.direct_sr.model, recipe.data.base_grid, recipe.data.superres_ratio, rows
    )


def build_iterative(recipe: Recipe, rows: int) -> IterativeSR:
    """Return iterative SR of the recipe's sizes, fresh weights."""
    return IterativeSR(recipe.coglm.model, recipe.iterative_sr.model, recipe.data.superres_grid, rows)


class RunModels:
    """The models of a run, with the interface of a WeightsFolder."""

    def __init__(self, run: RunDirectory) -> None:
        self.run, self.path = run, run.path
        self.recipe = run.load_recipe()
        self.data: DataConfig = self.recipe.data
        self.sampling, self.seed = self.recipe.sampling, self.recipe.seed

    def vocabulary(self) -> Vocabulary:
        """Return the id layout."""
        return load_vocabulary(self.run)

    def text_tokenizer(self) -> TextTokenizer:
        """Return the text tokenizer."""
        return load_text_tokenizer(self.run)

    def file(self, kind: str) -> Path:
        """Return the weights file of a model, or the .model file of the text tokenizer."""
        return output_file(self.run, kind)

    def vqvae(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> VQVAE:
        """Return the VQVAE."""
        config = self.recipe.vqvae.model
        return load_model(lambda: VQVAE(config), self.file("icetk-image"), device=device, dtype=dtype)

    def coglm(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> CogLM:
        """Return CogLM with the run's final weights."""
        return self.coglm_of(self.file("coglm"), device, dtype)

    def coglm_of(
        self, file: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> CogLM:
        """Return CogLM with the weights of a file."""
        rows = self.vocabulary().rows
        return load_model(lambda: CogLM(self.recipe.coglm.model, rows), file, device=device, dtype=dtype)

    def direct(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> DirectSR:
        """Return direct SR."""
        rows = self.vocabulary().rows
        return load_model(
            lambda: build_direct(self.recipe, rows), self.file("direct-sr"), device=device, dtype=dtype
        )

    def iterative(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> IterativeSR:
        """Return iterative SR."""
        rows = self.vocabulary().rows
        return load_model(
            lambda: build_iterative(self.recipe, rows), self.file("iterative-sr"), device=device, dtype=dtype
        )

    def labels(self) -> torch.Tensor | None:
        """Return the clusters that came with a VQVAE taken from elsewhere, int64 [codebook size]; else None."""
        path = output_file(self.run, "icetk-image").with_name(CLUSTERS)
        return _labels(path, self.recipe.vqvae.model.codebook_size) if path.is_file() else None


Models = RunModels | WeightsFolder


def open_models(path: RunDirectory | Path | str) -> Models:
    """Return the models of a run or of a weights folder.

    Raises:
        RunDirectoryError: the path is neither.
        CheckpointError: a weights folder that is damaged.
    """
    if isinstance(path, RunDirectory):
        return RunModels(path)
    return WeightsFolder(Path(path)) if is_weights_folder(Path(path)) else RunModels(RunDirectory(Path(path)))


def cluster_labels(
    models: Models, codebook_nE: torch.Tensor, sampling: SamplingConfig, seed: int
) -> torch.Tensor:
    """Return the cluster of every code, int64 [n]: of a file, as they came with the models, or fitted to the codebook.

    Those of a large codebook are kept in the run, because fitting them takes many seconds; where it cannot be written
    they are fitted every time.
    """
    if sampling.cluster_labels is not None:
        return _labels(Path(sampling.cluster_labels), len(codebook_nE))
    given = models.labels()
    if given is not None:
        return given
    codebook_nE = codebook_nE.detach().float().cpu()
    if len(codebook_nE) < _KEPT_FROM or not isinstance(models, RunModels):
        return fit_clusters(codebook_nE, sampling.clusters, seed)
    identity = f"{sampling.clusters}/{seed}/".encode() + codebook_nE.numpy().tobytes()
    path = models.path / "cache" / f"clusters-{hashlib.sha256(identity).hexdigest()[:16]}.npy"
    if path.is_file():
        return _labels(path, len(codebook_nE))
    labels = fit_clusters(codebook_nE, sampling.clusters, seed)
    with contextlib.suppress(RunDirectoryError):
        fsops.make_dirs(path.parent)
        save_labels(path, labels)
    return labels


def load_text_to_image(
    source: RunDirectory | Path | str | Models,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    coglm: CogLM | None = None,
    coglm_weights: Path | None = None,
    superres: bool = True,
    protocol: Recipe | None = None,
    sampling: SamplingConfig | None = None,
) -> TextToImage:
    """Return the whole sampling cascade of a run or of a weights folder.

    Args:
        source: a run whose stages up to finetune_superres are done, or a weights folder with all five models.
        device: where the models live; the first GPU, or the CPU.
        dtype: of the weights of the three transformers; as stored by default, on a CPU float32.
        coglm: a model to use as it is, for example one in training.
        coglm_weights: other weights of CogLM.
        superres: load the super-resolution models too.
        protocol: recipe whose `sampling` and `seed` count; by default the source's own.
        sampling: counts instead of both.
    """
    models = source if isinstance(source, RunModels | WeightsFolder) else open_models(source)
    if isinstance(models, WeightsFolder):
        models.check()
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if dtype is None and device.type == "cpu":
        dtype = torch.float32  # half precision has few fast kernels there
    chosen = sampling or (protocol or models).sampling
    seed = (protocol or models).seed
    home = torch.device("cpu") if chosen.offload else device
    text = models.text_tokenizer()
    image = ImageTokenizer(models.vqvae(device, torch.float32), models.data.compression_rate)
    if coglm is None:
        if coglm_weights is not None and not isinstance(models, RunModels):
            raise ConfigError(
                f"{models.path} is a weights folder, which has no other weights of CogLM; name the run they belong to"
            )
        coglm = (
            models.coglm_of(coglm_weights, home, dtype)
            if coglm_weights is not None and isinstance(models, RunModels)
            else models.coglm(home, dtype)
        )
    direct = models.direct(home, dtype) if superres else None
    iterative = models.iterative(home, dtype) if superres else None
    for model in (coglm, direct, iterative):
        if model is not None and device_of(model) != device:
            let_visit(model, device)
    return TextToImage(
        tokenizer=text,
        coglm=coglm,
        direct=direct,
        iterative=iterative,
        image_tokenizer=image,
        base_grid=models.data.base_grid,
        sampling=chosen,
        labels=cluster_labels(models, image.codebook, chosen, seed),
    )
