"""What CogLM can do besides drawing, measured on held-out pictures: describing, ranking, editing (spec 3.5, 7).

The work comes in units of `evaluate.chunk` pictures of one language, each written to a file of its own, as in drawing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cogview2.pipeline.config.data import Language
from cogview2.pipeline.config.stages import Recipe
from cogview2.pipeline.data.drawing_captions import describe, names_objects
from cogview2.pipeline.data.drawings import DrawingsSource, object_box, render, replace_object
from cogview2.pipeline.data.oracle import check, read_picture
from cogview2.pipeline.data.records import TokenPair
from cogview2.pipeline.data.sources import Source
from cogview2.pipeline.sampling.captioning import caption
from cogview2.pipeline.sampling.editing import edit
from cogview2.pipeline.sampling.regions import Box
from cogview2.pipeline.sampling.reranking import caption_log_likelihood
from cogview2.pipeline.sampling.text_to_image import TextToImage
from cogview2.pipeline.tokenizers.image import to_pixels
from cogview2.stages._evaluation_work import Store, uint8_bchw

_EXAMPLES = 8
_RANKED_FROM, _EDITED_FROM = 800_000_000, 900_000_000
"""Numbers of the first pictures: other noise than that of the pictures for FID."""
_PER_LANGUAGE = 10_000_000
_MARGIN = 0.5
"""Codes by which an edited box is larger than the object, each way: nobody draws a box to the pixel."""

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class SkillUnit:
    """Held-out pictures [start, stop), in one language, of one kind of work."""

    skill: str
    language: Language
    start: int
    stop: int

    @property
    def name(self) -> str:
        """File name without ending."""
        return f"{self.skill}-{self.language}-{self.start:06d}"


class Skills:
    """The three measurements over one set of held-out pairs."""

    def __init__(
        self, recipe: Recipe, pairs: list[TokenPair], cascade: TextToImage, source: Source, store: Store
    ) -> None:
        self.recipe, self.pairs, self.cascade, self.source, self.store = recipe, pairs, cascade, source, store
        self._sketcher = TextToImage(  # draws base pictures alone
            cascade.tokenizer,
            cascade.coglm,
            None,
            None,
            cascade.image_tokenizer,
            base_grid=cascade.base_grid,
            sampling=cascade.sampling,
            labels=cascade.labels,
        )
        config = recipe.evaluate
        self._work: dict[str, tuple[int, Callable[[SkillUnit], Arrays]]] = {
            "describe": (config.described, self._describe),
            "rank": (config.ranked, self._rank),
            "edit": (config.edited if isinstance(source, DrawingsSource) else 0, self._edit),
        }
        self.units = [
            SkillUnit(skill, language, start, min(start + config.chunk, wanted, len(pairs)))
            for skill, (wanted, _) in self._work.items()
            for language in recipe.data.languages
            for start in range(0, min(wanted, len(pairs)), config.chunk)
        ]

    def do(self, unit: SkillUnit) -> None:
        """Do one unit, if it is not done."""
        if not self.store.has(unit.name):
            self.store.write(unit.name, self._work[unit.skill][1](unit))

    def _chosen(self, unit: SkillUnit) -> list[TokenPair]:
        return [pair for pair in self.pairs[unit.start : unit.stop] if unit.language in pair.captions]

    def _number(self, unit: SkillUnit, first: int) -> int:
        return first + self.recipe.data.languages.index(unit.language) * _PER_LANGUAGE

    def _describe(self, unit: SkillUnit) -> Arrays:
        chosen = self._chosen(unit)
        if not chosen:
            return {}
        codes_BM = torch.from_numpy(np.stack([pair.base_codes for pair in chosen])).long()
        captioning, numbers = self.cascade.sampling.captioning, range(unit.start, unit.start + len(chosen))
        found = caption(self.cascade, codes_BM, unit.language, captioning, self.recipe.seed, numbers=numbers)
        arrays = {
            "said": np.array([each.text for each in found], dtype=np.str_),
            "original": np.array([pair.captions[unit.language] for pair in chosen], dtype=np.str_),
            "ended": np.array([each.ended for each in found]),
        }
        if all("facts" in pair.metadata for pair in chosen):
            arrays["named"] = np.array(
                [
                    names_objects(each.text, unit.language, pair.metadata["objects"])
                    for each, pair in zip(found, chosen, strict=True)
                ]
            )
        return arrays

    def _rank(self, unit: SkillUnit) -> Arrays:
        chosen, count = self._chosen(unit), self.recipe.evaluate.ranking_candidates
        if not chosen:
            return {}
        prompts = [pair.captions[unit.language] for pair in chosen for _ in range(count)]
        drawn = self._sketcher.draw(
            prompts, self.recipe.seed, self._number(unit, _RANKED_FROM) + unit.start * count
        )
        ids, ranking = self.cascade.encode(prompts), self.cascade.sampling.ranking
        scores = torch.cat(
            [
                caption_log_likelihood(
                    self.cascade.coglm,
                    ids[start : start + len(codes)],
                    codes,
                    self.cascade.vocabulary,
                    start=ranking.start,
                    softmax=ranking.softmax,
                    reduce=ranking.reduce,
                )
                for start, codes in zip(
                    range(0, len(ids), self.cascade.sampling.batch),
                    drawn.base_codes.split(self.cascade.sampling.batch),
                    strict=True,
                )
            ]
        )
        arrays = {"scores": scores.view(-1, count).numpy()}
        if all("facts" in pair.metadata for pair in chosen):
            facts = [pair.metadata["facts"][unit.language] for pair in chosen for _ in range(count)]
            pictures = uint8_bchw(drawn.pixels("base")).transpose(0, 2, 3, 1)
            obeyed = [
                check(read_picture(picture), fact)["all"]
                for picture, fact in zip(pictures, facts, strict=True)
            ]
            arrays["obeyed"] = np.array(obeyed).reshape(-1, count)
        return arrays

    def _edit(self, unit: SkillUnit) -> Arrays:
        """Replace one object of each drawing by another, with the caption of the new scene."""
        source, data, editing = self.source, self.recipe.data, self.cascade.sampling.editing
        assert isinstance(source, DrawingsSource)
        indices = {key: index for index, key in enumerate(source.keys)}
        found: list[list[float]] = []
        pictures: list[np.ndarray] = []
        texts: list[str] = []
        for place, pair in enumerate(self._chosen(unit), start=unit.start):
            rng = np.random.default_rng([self.recipe.seed, place])
            scene = source.scene(indices[pair.key])
            number = int(rng.integers(len(scene.objects)))
            text, facts = describe(
                replace_object(scene, number, source.trained_pairs, rng), unit.language, rng
            )
            before = np.asarray(render(scene, data.superres_size))
            box = _widened(object_box(scene, number), _MARGIN / data.base_grid)
            region = Box(*(round(edge * data.superres_size) for edge in box))
            edited = edit(
                self.cascade,
                before,
                region,
                text,
                seed=self.recipe.seed,
                number=self._number(unit, _EDITED_FROM) + place * editing.candidates,
                candidates=editing.candidates,
            )
            after = edited.pictures[0]
            verdict = check(read_picture(after), facts)
            rebuilt = self._rebuilt(before)
            # What was not put back: outside the crop, or outside the region where that alone is pasted.
            outside = ~edited.mask
            if editing.paste == "crop":
                outside = np.ones(before.shape[:2], dtype=bool)
                outside[edited.crop.slices] = False
            errors = [float("nan")] * 2
            if outside.any():
                errors = [
                    float(np.abs(picture.astype(float) - before)[outside].mean()) / 255
                    for picture in (after, rebuilt)
                ]
            found.append([verdict["all"], verdict["colour"], verdict["shape"], *errors])
            if len(pictures) < _EXAMPLES:
                pictures += [np.stack([before, after])]
                texts.append(text)
        if not found:
            return {}
        return {
            "verdicts": np.array(found, dtype=np.float64),
            "pictures": np.stack(pictures),
            "texts": np.array(texts, dtype=np.str_),
        }

    def _rebuilt(self, picture: np.ndarray) -> np.ndarray:
        tokenizer = self.cascade.image_tokenizer
        pixels = tokenizer.decode(tokenizer.encode(to_pixels(picture[None])))
        return uint8_bchw(pixels)[0].transpose(1, 2, 0)

    def _parts(self, skill: str, language: str) -> list[Arrays]:
        units = [unit for unit in self.units if unit.skill == skill and unit.language == language]
        return [arrays for arrays in (self.store.read(unit.name) for unit in units) if arrays]

    def record(self) -> dict[str, Any]:
        """Return `captioning`, `ranking` and `editing` of the evaluation, by language; what was not measured is missing."""
        makers = {"captioning": _captioning, "ranking": _ranking, "editing": _editing}
        record: dict[str, Any] = {}
        for name, (skill, make) in zip(makers, zip(self._work, makers.values(), strict=True), strict=True):
            for language in self.recipe.data.languages:
                parts = self._parts(skill, language)
                if parts:
                    record.setdefault(name, {})[language] = make(parts)
        return record

    def edited(self) -> tuple[np.ndarray, list[str]] | None:
        """Return pictures before and after editing, uint8 [n, 2, H, W, 3], with their texts; None without any."""
        parts = [
            part for language in self.recipe.data.languages for part in self._parts("edit", language)[:1]
        ]
        if not parts:
            return None
        texts = [str(text) for part in parts for text in part["texts"]]
        return np.concatenate([part["pictures"] for part in parts]), texts


def _widened(box: tuple[float, float, float, float], margin: float) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = box
    return max(0.0, x0 - margin), max(0.0, y0 - margin), min(1.0, x1 + margin), min(1.0, y1 + margin)


def _joined(parts: list[Arrays], key: str) -> np.ndarray:
    return np.concatenate([part[key] for part in parts])


def _captioning(parts: list[Arrays]) -> dict[str, Any]:
    said, original = _joined(parts, "said"), _joined(parts, "original")
    pairs = zip(original[:_EXAMPLES].tolist(), said[:_EXAMPLES].tolist(), strict=True)
    record: dict[str, Any] = {"pictures": len(said), "ended": float(_joined(parts, "ended").mean())}
    if all("named" in part for part in parts):
        record["objects_named"] = float(_joined(parts, "named").mean())
    return record | {"examples": [{"original": old, "said": new} for old, new in pairs]}


def _ranking(parts: list[Arrays]) -> dict[str, Any]:
    scores = _joined(parts, "scores")
    best = scores.argmax(1)
    record: dict[str, Any] = {
        "captions": len(scores),
        "candidates": scores.shape[1],
        "score_first": float(scores[:, 0].mean()),
        "score_best": float(scores.max(1).mean()),
    }
    if all("obeyed" in part for part in parts):
        obeyed = _joined(parts, "obeyed")
        record |= {
            "obeyed_on_average": float(obeyed.mean()),
            "obeyed_best_ranked": float(obeyed[np.arange(len(best)), best].mean()),
            "obeyed_by_any": float(obeyed.any(1).mean()),
        }
    return record


def _editing(parts: list[Arrays]) -> dict[str, Any]:
    verdicts = _joined(parts, "verdicts")
    names = ("obeyed", "colour", "shape")
    record: dict[str, Any] = {"edits": len(verdicts)}
    record |= {name: float(verdicts[:, column].mean()) for column, name in enumerate(names)}
    measured = verdicts[~np.isnan(verdicts[:, 3])]
    if len(measured):
        record |= {
            "edits_with_outside": len(measured),
            "outside_l1": float(measured[:, 3].mean()),
            "vqvae_outside_l1": float(measured[:, 4].mean()),
        }
    return record
