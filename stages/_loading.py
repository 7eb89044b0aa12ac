"""From a run directory to tokenizers and models: the one place that knows which stage made which file."""

from pathlib import Path

import torch

from cogview2.pipeline.config.stages import Recipe
from cogview2.pipeline.errors import CheckpointError
from cogview2.pipeline.models.coglm.model import CogLM
from cogview2.pipeline.models.sr.direct import DirectSR
from cogview2.pipeline.models.sr.iterative import IterativeSR
from cogview2.pipeline.models.vqvae.model import VQVAE
from cogview2.pipeline.run_dir import RunDirectory
from cogview2.pipeline.sampling.clusters import fit_clusters
from cogview2.pipeline.sampling.text_to_image import TextToImage
from cogview2.pipeline.tokenizers.image import ImageTokenizer
from cogview2.pipeline.tokenizers.text import TextTokenizer
from cogview2.pipeline.tokenizers.vocabulary import Vocabulary
from cogview2.pipeline.weights import WEIGHTS, load_into


def _output(run: RunDirectory, unit: str, name: str) -> Path:
    path = run.stage(unit).output / name
    if run.stage(unit).done() is None or not path.is_file():
        raise CheckpointError(
            f"{run.path} has no finished stage {unit}; run it first: cogview2 run RECIPE --stages {unit.partition('/')[0]}"
        )
    return path


def load_vocabulary(run: RunDirectory) -> Vocabulary:
    """Return the id layout of a run."""
    return Vocabulary.load(_output(run, "train_tokenizer", "vocabulary.json"))


def load_text_tokenizer(run: RunDirectory) -> TextTokenizer:
    """Return the text tokenizer of a run."""
    return TextTokenizer(_output(run, "train_tokenizer", "tokenizer.model"), load_vocabulary(run))


def load_image_tokenizer(run: RunDirectory, recipe: Recipe, device: torch.device) -> ImageTokenizer:
    """Return the frozen VQVAE of a run as a tokenizer of the recipe's rate."""
    vqvae = VQVAE(recipe.vqvae.model)
    load_into(vqvae, _output(run, "train_vqvae", WEIGHTS))
    return ImageTokenizer(vqvae.to(device).eval(), recipe.data.compression_rate)


def load_coglm(run: RunDirectory, recipe: Recipe, device: torch.device, weights: Path | None = None) -> CogLM:
    """Return CogLM with the run's final weights, or with those of the file `weights`."""
    model = CogLM(recipe.coglm.model, load_vocabulary(run).rows)
    load_into(model, weights or _output(run, "pretrain_coglm", WEIGHTS))
    return model.to(device).eval()


def build_direct(recipe: Recipe, rows: int) -> DirectSR:
    """Return direct SR of the recipe's sizes, fresh weights."""
    return DirectSR(
        recipe.coglm.model, recipe.direct_sr.model, recipe.data.base_grid, recipe.data.superres_ratio, rows
    )


def build_iterative(recipe: Recipe, rows: int) -> IterativeSR:
    """Return iterative SR of the recipe's sizes, fresh weights."""
    return IterativeSR(recipe.coglm.model, recipe.iterative_sr.model, recipe.data.superres_grid, rows)


def load_text_to_image(
    run: RunDirectory | Path,
    *,
    device: torch.device | None = None,
    coglm: CogLM | None = None,
    coglm_weights: Path | None = None,
    superres: bool = True,
    protocol: Recipe | None = None,
) -> TextToImage:
    """Return the whole sampling cascade of a run.

    Args:
        run: a run directory whose stages up to finetune_superres are done.
        device: where the models live; the first GPU, or the CPU.
        coglm: a model to use as it is, for example one in training.
        coglm_weights: other weights of CogLM.
        superres: load the super-resolution models too.
        protocol: recipe whose `sampling` and `seed` count; by default the run's own.
    """
    run = run if isinstance(run, RunDirectory) else RunDirectory(run)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = run.load_recipe()
    text = load_text_tokenizer(run)
    image = load_image_tokenizer(run, recipe, device)
    direct = iterative = None
    if superres:
        direct, iterative = (
            build_direct(recipe, text.vocabulary.rows),
            build_iterative(recipe, text.vocabulary.rows),
        )
        load_into(direct, _output(run, "finetune_superres/direct", WEIGHTS))
        load_into(iterative, _output(run, "finetune_superres/iterative", WEIGHTS))
        direct, iterative = direct.to(device).eval(), iterative.to(device).eval()
    protocol = protocol or recipe
    labels = fit_clusters(image.codebook.cpu(), protocol.sampling.clusters, protocol.seed)
    return TextToImage(
        tokenizer=text,
        coglm=coglm or load_coglm(run, recipe, device, coglm_weights),
        direct=direct,
        iterative=iterative,
        image_tokenizer=image,
        base_grid=recipe.data.base_grid,
        sampling=protocol.sampling,
        labels=labels,
    )
