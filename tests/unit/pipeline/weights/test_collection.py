"""A run as a source of weights: what is done counts, sizes come from the recipe."""

from pathlib import Path

import pytest
import tiny_runs
import torch
from published_weights import transformer_state
from torch import nn

from cogview2.pipeline.config.loading import load_recipe
from cogview2.pipeline.errors import CheckpointError, RunDirectoryError
from cogview2.pipeline.models.coglm.model import CogLM
from cogview2.pipeline.models.sr.direct import DirectSR
from cogview2.pipeline.models.sr.iterative import IterativeSR
from cogview2.pipeline.models.vqvae.model import VQVAE
from cogview2.pipeline.run_dir import MODEL_FILES, RunDirectory
from cogview2.pipeline.tokenizers.vocabulary import Vocabulary
from cogview2.pipeline.weights.bundle import write_bundle
from cogview2.pipeline.weights.collection import open_collection
from cogview2.pipeline.weights.exporting import export_weights
from cogview2.pipeline.weights.files import save_weights
from cogview2.pipeline.weights.folder import WeightsFolder
from cogview2.pipeline.weights.importing import Wanted, import_weights


def _run(folder: Path, kinds: tuple[str, ...]) -> tuple[RunDirectory, dict[str, nn.Module]]:
    """Make a run whose stages for `kinds` are done, with random weights of the recipe's sizes."""
    recipe = load_recipe("quickstart", tiny_runs.OVERRIDES)
    run = RunDirectory(folder / "tiny").create(recipe)
    vocabulary = Vocabulary.uniform(recipe.vqvae.model.codebook_size, 40)
    base, data = recipe.coglm.model, recipe.data
    models = {
        "icetk-image": lambda: VQVAE(recipe.vqvae.model),
        "coglm": lambda: CogLM(base, vocabulary.rows),
        "direct-sr": lambda: DirectSR(
            base, recipe.direct_sr.model, data.base_grid, data.superres_ratio, vocabulary.rows
        ),
        "iterative-sr": lambda: IterativeSR(
            base, recipe.iterative_sr.model, data.superres_grid, vocabulary.rows
        ),
    }
    built = {}
    for kind in kinds:
        unit, names = MODEL_FILES[kind]
        stage = run.stage(unit).create()
        if kind == "icetk-text":
            (stage.output / names[0]).write_bytes(b"a tokenizer")
            vocabulary.save(stage.output / "vocabulary.json")
        else:
            built[kind] = models[kind]()
            save_weights(stage.output / names[0], dict(built[kind].state_dict()))
        stage.write_done({}, stage.output_files(), "fingerprint")
    return run, built


ALL = ("icetk-text", "icetk-image", "coglm", "direct-sr", "iterative-sr")


def test_a_run_becomes_a_bundle_with_equal_models(tmp_path: Path) -> None:
    run, built = _run(tmp_path, ALL)
    recipe = run.load_recipe()
    collection = open_collection(run.path)
    assert tuple(collection.members) == ALL
    write_bundle(collection, tmp_path / "out", None)
    folder = WeightsFolder(tmp_path / "out")
    folder.check()
    assert folder.kinds() == ALL
    loaded = {
        "icetk-image": folder.vqvae(),
        "coglm": folder.coglm(),
        "direct-sr": folder.direct(),
        "iterative-sr": folder.iterative(),
    }
    for kind, model in loaded.items():
        assert type(model) is type(built[kind])
        expected = built[kind].state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert (folder.data.base_grid, folder.data.superres_grid) == (
        recipe.data.base_grid,
        recipe.data.superres_grid,
    )
    assert (folder.seed, folder.sampling) == (recipe.seed, recipe.sampling)
    assert folder.vocabulary().rows == folder.coglm().transformer.word_embeddings.num_embeddings


def test_an_exported_model_of_a_run_comes_back(tmp_path: Path) -> None:
    run, built = _run(tmp_path, ("icetk-text", "direct-sr"))
    export_weights("direct-sr", open_collection(run.path), tmp_path / "out")
    import_weights("direct-sr", tmp_path / "out", tmp_path / "w", Wanted())
    model = WeightsFolder(tmp_path / "w").direct()
    assert model.config == run.load_recipe().direct_sr.model
    expected = built["direct-sr"].state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    with pytest.raises(CheckpointError, match="holds no coglm .it holds icetk-text, direct-sr."):
        export_weights("coglm", open_collection(run.path), tmp_path / "x")


def test_a_run_without_results_or_another_folder_is_refused(tmp_path: Path) -> None:
    run, _ = _run(tmp_path, ())
    with pytest.raises(CheckpointError, match="has not even a finished tokenizer"):
        open_collection(run.path)
    (tmp_path / "other").mkdir()
    torch.save(transformer_state(), tmp_path / "other" / "w.pt")
    with pytest.raises(RunDirectoryError, match="is no run directory"):
        open_collection(tmp_path / "other")
