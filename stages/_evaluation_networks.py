"""Which feature network an evaluation uses: Inception by path, the drawings' classifier, or a small random one."""

import logging
from pathlib import Path

import numpy as np
import torch

from cogview2.pipeline import fsops
from cogview2.pipeline.data.drawings import BACKGROUNDS, COLOURS, SHAPES
from cogview2.pipeline.data.pixels import load_pixels
from cogview2.pipeline.data.sources import Source
from cogview2.pipeline.metrics.attribute_classifier import AttributeClassifier, train
from cogview2.pipeline.metrics.feature_network import FeatureNetwork, build_feature_network
from cogview2.pipeline.weights.files import load_weights, save_weights
from cogview2.stages._runner import StageContext
from cogview2.stages._stopping import heeding, look, meet

logger = logging.getLogger(__name__)
_PICTURES = 2000
_BATCH = 64
_CLASSES = {"colour": len(COLOURS), "shape": len(SHAPES), "background": len(BACKGROUNDS), "objects": 3}


def choose_network(context: StageContext, source: Source) -> FeatureNetwork:
    """Return the network; says aloud when its figures are not comparable to papers."""
    recipe = context.recipe
    if recipe.evaluate.feature_network is not None:
        return build_feature_network(
            recipe.evaluate.feature_network, recipe.evaluate.resize, device=context.world.device
        )
    if recipe.data.source == "drawings":
        network: FeatureNetwork = _classifier(context, source)
    else:
        network = build_feature_network(None, seed=recipe.seed, device=context.world.device)
    logger.warning("no evaluate.feature_network is given: %s", network.name)
    return network


def _classifier(context: StageContext, source: Source) -> AttributeClassifier:
    """Train the classifier on training drawings, on rank 0, once; the others and later attempts read its weights."""
    recipe = context.recipe
    path = (
        context.stage.path
        / "work"
        / f"classifier-{recipe.evaluate.classifier_steps}-{recipe.seed}.safetensors"
    )
    if context.world.is_first and not path.is_file():
        with heeding(context.stop):
            _train(context, source, path)
    meet(context.stop, "while training the attribute classifier; the same command starts it again")
    classifier = AttributeClassifier(_CLASSES, recipe.seed, device=context.world.device)
    classifier.network.load_state_dict(load_weights(path))
    classifier.network.eval()
    return classifier


def _train(context: StageContext, source: Source, path: Path) -> None:
    recipe = context.recipe
    context.stage.write_heartbeat(0, 1, message="training the attribute classifier")
    indices = source.splits["train"][:_PICTURES]
    images = torch.from_numpy(np.stack([load_pixels(source, index, recipe.data) for index in indices]))
    objects = [source.read(index).metadata for index in indices]
    labels = {
        "colour": [list(COLOURS).index(found["objects"][0]["colour"]) for found in objects],
        "shape": [SHAPES.index(found["objects"][0]["shape"]) for found in objects],
        "background": [list(BACKGROUNDS).index(found["background"]) for found in objects],
        "objects": [len(found["objects"]) - 1 for found in objects],
    }
    classifier = train(
        images,
        {name: torch.tensor(values) for name, values in labels.items()},
        steps=recipe.evaluate.classifier_steps,
        batch=_BATCH,
        seed=recipe.seed,
        classes=_CLASSES,
        device=context.world.device,
        each_step=lambda: look(context.stop),
    )
    fsops.make_dirs(path.parent)
    save_weights(path, dict(classifier.network.state_dict()), {"seed": str(recipe.seed)})
