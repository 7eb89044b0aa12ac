"""The picture of an evaluation: drawn beside original, held-out captions beside those of training."""

import logging
from typing import Any

import numpy as np

from cogview2.pipeline.data.records import RefusedError, TokenPair
from cogview2.pipeline.data.shard_index import ShardIndex
from cogview2.pipeline.data.sources import Source
from cogview2.pipeline.sampling.text_to_image import TextToImage
from cogview2.stages import _evaluation_work as work
from cogview2.stages._evaluation_work import originals_of
from cogview2.stages._pictures import grid
from cogview2.stages._runner import StageContext

logger = logging.getLogger(__name__)
SHOWN = 12
"""Columns."""


def showcase(
    context: StageContext,
    pairs: list[TokenPair],
    drawn: dict[str, dict[str, np.ndarray]],
    cascade: TextToImage,
    source: Source,
) -> tuple[np.ndarray | None, dict[str, Any]]:
    """Return one picture of drawn and original pictures, and what its rows and columns show.

    Held-out captions in each language and pass, their originals, then captions of training and their
    originals: what was learned beside what was learned by heart.

    Args:
        context: recipe and run.
        pairs: the held-out pairs.
        drawn: by language, the arrays of the first unit (`_evaluation_work.draw_unit`).
        cascade: draws the captions of training.
        source: of the original pictures.
    """
    rows: list[np.ndarray] = []
    names: list[str] = []
    captions: dict[str, list[str]] = {}

    def add(name: str, pictures_BCHW: np.ndarray) -> None:
        names.append(name)
        rows.append(pictures_BCHW.transpose(0, 2, 3, 1))

    # Pairs with a caption in every language, so that a column is one pair.
    recipe = context.recipe
    shown = sorted(set.intersection(*(set(arrays["kept"].tolist()) for arrays in drawn.values())))[:SHOWN]
    if shown:
        chosen = [pairs[k] for k in shown]
        for language, arrays in drawn.items():
            places = [arrays["kept"].tolist().index(k) for k in shown]
            for name in work.PASSES:
                if name in arrays:
                    add(f"{language} {name}", arrays[name][places])
            captions[language] = [pair.captions[language] for pair in chosen]
        add("original", originals_of(source, recipe, chosen))
    trained, originals = _trained_pairs(context, source)
    if trained:
        captions["training"] = trained
        by_heart = cascade.draw(trained, recipe.seed)
        add("training base", work.uint8_bchw(by_heart.pixels("base")))
        add("training final", work.uint8_bchw(by_heart.pixels("final")))
        add("training original", originals)
    return grid(rows) if rows else None, {"rows": names, "captions": captions}


def _trained_pairs(context: StageContext, source: Source) -> tuple[list[str], np.ndarray]:
    """Return captions of training and their original pictures; those that cannot be read any more are left out."""
    shards = ShardIndex.load(context.run.stage("shard_dataset").output / "train")
    language = context.recipe.data.languages[0]
    captions: list[str] = []
    originals: list[np.ndarray] = []
    # Spread over the set: neighbours in a source are often alike.
    numbers = np.linspace(0, len(shards) - 1, min(len(shards), SHOWN)).round().astype(int).tolist()
    for pair in map(shards.read, numbers):
        if pair.captions.get(language):
            try:
                originals.append(originals_of(source, context.recipe, [pair])[0])
            except (RefusedError, KeyError) as error:
                logger.warning("training picture %s is not shown: %s", pair.key, error)
            else:
                captions.append(pair.captions[language])
    return captions, np.array(originals)
