"""The resumable work of stage evaluate: units of captions drawn and scored, each in a file of its own."""

import io
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cogview2.pipeline import fsops
from cogview2.pipeline.config.stages import Recipe
from cogview2.pipeline.data.oracle import check, read_picture
from cogview2.pipeline.data.pixels import load_pixels
from cogview2.pipeline.data.records import TokenPair
from cogview2.pipeline.data.shard_index import ShardIndex
from cogview2.pipeline.data.sources import Source
from cogview2.pipeline.metrics.blur import gaussian_blur
from cogview2.pipeline.metrics.feature_network import FeatureNetwork
from cogview2.pipeline.run_dir import RunDirectory
from cogview2.pipeline.sampling.reranking import caption_log_likelihood
from cogview2.pipeline.sampling.text_to_image import TextToImage

logger = logging.getLogger(__name__)
PASSES = ("base", "direct", "final")
FID_SIDE = 256
"""Pictures larger than this are reduced to it before blurring (spec 9)."""


@dataclass(frozen=True)
class Unit:
    """Captions drawn together by one rank: records [start, stop) of a split, in one language."""

    split: str
    language: str
    start: int
    stop: int

    @property
    def name(self) -> str:
        """File name without ending."""
        return f"{self.split}-{self.language}-{self.start:06d}"


def plan_units(pairs: dict[str, list[TokenPair]], languages: tuple[str, ...], chunk: int) -> list[Unit]:
    """Cut the pairs of each split into units, the same whatever the number of ranks."""
    return [
        Unit(split, language, start, min(start + chunk, len(found)))
        for split, found in pairs.items()
        for language in languages
        for start in range(0, len(found), chunk)
    ]


def load_pairs(run: RunDirectory, recipe: Recipe) -> dict[str, list[TokenPair]]:
    """Return the held-out pairs, and those with unseen attribute pairs, that are evaluated."""
    folder = run.stage("shard_dataset").output
    pairs: dict[str, list[TokenPair]] = {}
    for split in ("held_out", "unseen"):
        if (folder / split).is_dir():
            index = ShardIndex.load(folder / split)
            found = [index.read(number) for number in range(min(len(index), recipe.evaluate.captions))]
            if found:
                pairs[split] = found
    return pairs


def number_of(unit: Unit, offset: int, languages: tuple[str, ...]) -> int:
    """Return the number of the unit's first picture among all: seeds the noise, unique over splits and languages."""
    return offset * len(languages) * 10_000_000 + languages.index(unit.language) * 10_000_000 + unit.start


class Store:
    """Arrays and numbers of finished units, written atomically: a killed evaluation loses at most one unit a rank."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        fsops.make_dirs(folder)

    def path(self, name: str) -> Path:
        """Return the file of a unit."""
        return self.folder / f"{name}.npz"

    def has(self, name: str) -> bool:
        """Return whether the unit is finished."""
        return self.path(name).is_file()

    def write(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        """Write the arrays of a unit."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # keyword arrays are what savez takes
        fsops.write_bytes(self.path(name), buffer.getvalue())

    def read(self, name: str) -> dict[str, np.ndarray]:
        """Read the arrays of a unit."""
        with np.load(self.path(name), allow_pickle=False) as content:
            return {key: content[key] for key in content.files}


def originals_of(source: Source, recipe: Recipe, pairs: list[TokenPair]) -> np.ndarray:
    """Return the pictures of pairs at full size, uint8 [B, 3, S, S]."""
    numbers = {key: index for index, key in enumerate(source.keys)}
    return np.stack([load_pixels(source, numbers[pair.key], recipe.data) for pair in pairs])


def uint8_bchw(pixels_BCHW: torch.Tensor) -> np.ndarray:
    """Return float pixels in [0, 1] as uint8 [B, 3, H, W], the layout in which pictures are stored."""
    return (pixels_BCHW.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def draw_unit(
    unit: Unit, pairs: list[TokenPair], first_number: int, cascade: TextToImage, seed: int
) -> dict[str, np.ndarray]:
    """Draw the unit's captions through the whole cascade; pictures uint8 [B, 3, H, W] and caption log likelihoods."""
    chosen = pairs[unit.start : unit.stop]
    prompts = [pair.captions.get(unit.language, "") for pair in chosen]
    kept = [k for k, prompt in enumerate(prompts) if prompt]
    if not kept:
        return {"kept": np.zeros(0, dtype=np.int64)}
    texts = [prompts[k] for k in kept]
    drawn = cascade.draw(texts, seed, first_number)
    arrays: dict[str, np.ndarray] = {
        name: uint8_bchw(drawn.pixels(name)) for name in PASSES if name in drawn.pictures
    }
    ids = cascade.encode(texts)
    arrays["caption_score"] = caption_log_likelihood(
        cascade.coglm, ids, drawn.base_codes, cascade.vocabulary
    ).numpy()
    real = torch.from_numpy(np.stack([chosen[k].base_codes for k in kept])).long()
    arrays["real_caption_score"] = caption_log_likelihood(
        cascade.coglm, ids, real, cascade.vocabulary
    ).numpy()
    return arrays | {"kept": np.array(kept, dtype=np.int64)}


def oracle_unit(
    arrays: dict[str, np.ndarray], unit: Unit, pairs: list[TokenPair]
) -> dict[str, list[dict[str, bool]]]:
    """Check every drawn picture against the facts of its caption, and the final ones against the next caption's."""
    facts = [pair.metadata["facts"][unit.language] for pair in pairs]
    numbers = [unit.start + int(k) for k in arrays["kept"]]
    verdicts = {
        name: [
            check(read_picture(picture.transpose(1, 2, 0)), facts[n])
            for picture, n in zip(arrays[name], numbers, strict=True)
        ]
        for name in PASSES
        if name in arrays
    }
    verdicts["shuffled"] = [
        check(read_picture(picture.transpose(1, 2, 0)), facts[(n + 1) % len(facts)])
        for picture, n in zip(arrays["final"], numbers, strict=True)
    ]
    return verdicts


def features_of(
    images_BCHW: np.ndarray, network: FeatureNetwork, radii: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """Return the features at every blur radius, and the class logits of the sharp pictures."""
    images = torch.from_numpy(images_BCHW)
    if images.shape[-1] > FID_SIDE:
        small = torch.nn.functional.interpolate(
            images.float(), size=(FID_SIDE, FID_SIDE), mode="bilinear", antialias=True
        )
        images = small.round().clamp(0, 255).to(torch.uint8)
    arrays: dict[str, np.ndarray] = {}
    for radius in radii:
        features, logits = network(gaussian_blur(images, radius))
        arrays[f"features_{radius}"] = features.float().cpu().numpy()
        if radius == 0 and logits is not None:
            arrays["logits"] = logits.float().cpu().numpy()
    return arrays


def share(verdicts: list[dict[str, bool]], key: str = "all") -> float:
    """Return the share of pictures that are right."""
    return float(np.mean([verdict[key] for verdict in verdicts])) if verdicts else float("nan")


def to_json(value: Any) -> Any:
    """Return `value` with NaN as None, for strict JSON."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)
