"""Stage evaluate: draw held-out captions through the whole cascade and measure the pictures (spec 9)."""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from cogview2.pipeline import fsops
from cogview2.pipeline.config.base import fingerprint
from cogview2.pipeline.data.oracle import check, read_picture
from cogview2.pipeline.data.pixels import downsample
from cogview2.pipeline.data.records import TokenPair
from cogview2.pipeline.data.sources import Source, open_source
from cogview2.pipeline.distributed import watchdog
from cogview2.pipeline.distributed.process import barrier, broadcast_object
from cogview2.pipeline.errors import ConfigError, DataError, Preempted
from cogview2.pipeline.metrics.feature_network import FeatureNetwork
from cogview2.pipeline.metrics.frechet import frechet_distance
from cogview2.pipeline.metrics.inception_score import inception_score
from cogview2.pipeline.metrics.reconstruction import l1, psnr, ssim
from cogview2.pipeline.metrics.statistics import FeatureStatistics
from cogview2.pipeline.sampling.text_to_image import TextToImage
from cogview2.stages import _evaluation_work as work
from cogview2.stages._evaluation_networks import choose_network
from cogview2.stages._evaluation_showcase import showcase
from cogview2.stages._evaluation_skills import Skills
from cogview2.stages._evaluation_summary import summary
from cogview2.stages._loading import load_text_to_image
from cogview2.stages._pictures import grid, save_png
from cogview2.stages._runner import StageContext, run_stage
from cogview2.stages._selected_weights import Selected, select_weights
from cogview2.stages._stopping import heeding, look, meet

T = TypeVar("T")
logger = logging.getLogger(__name__)
FORMAT = 3
"""Of the record and of what is measured; part of the digest."""
_RECONSTRUCTED = 200
"""Held-out pictures at most that are encoded and decoded again."""


def _digest(
    context: StageContext, selected: Selected, network: FeatureNetwork, pairs: dict[str, list[TokenPair]]
) -> str:
    """Return the identity of an evaluation: weights, captions and protocol."""
    recipe = context.recipe
    captions = hashlib.sha256(
        json.dumps(
            [[split, pair.key, pair.captions] for split, found in pairs.items() for pair in found]
        ).encode()
    ).hexdigest()
    protocol = recipe.evaluate.model_dump(mode="json", exclude={"weights", "feature_network"})
    return fingerprint(
        {"format": FORMAT, "weights": selected.digests, "captions": captions, "protocol": protocol},
        {"network": network.sha256, "sampling": recipe.sampling.model_dump(mode="json"), "seed": recipe.seed},
    )


def _has_facts(pairs: list[TokenPair]) -> bool:
    return all("facts" in pair.metadata for pair in pairs)


class Evaluation:
    """One evaluation of one set of weights under one protocol, in a folder of its own."""

    def __init__(
        self,
        context: StageContext,
        folder: Path,
        pairs: dict[str, list[TokenPair]],
        cascade: TextToImage,
        network: FeatureNetwork,
        source: Source,
    ) -> None:
        self.context, self.recipe, self.pairs = context, context.recipe, pairs
        self.cascade, self.network, self.source = cascade, network, source
        self.languages = tuple(self.recipe.data.languages)
        self.units = work.plan_units(pairs, self.languages, self.recipe.evaluate.chunk)
        self.pictures, self.features = work.Store(folder / "pictures"), work.Store(folder / "features")
        self.skills = Skills(self.recipe, pairs["held_out"], cascade, source, work.Store(folder / "skills"))
        self._started = time.monotonic()

    def _share(self, jobs: Sequence[T], message: str, do: Callable[[T], None]) -> None:
        """Do this rank's share of `jobs`, then wait for all; all leave together soon after a stop. Collective."""
        context = self.context
        with heeding(context.stop, self.cascade.coglm, self.cascade.direct, self.cascade.iterative):
            for k in range(context.world.rank, len(jobs), context.world.size):
                look(context.stop)
                if context.world.is_first:
                    self._beat(k, len(jobs), message)
                do(jobs[k])
        meet(context.stop, f"while {message}; the same command goes on from there")
        if context.world.is_first:
            self._beat(len(jobs), len(jobs), message)

    def _beat(self, done: int, total: int, message: str) -> None:
        rate = done / max(time.monotonic() - self._started, 1e-9)
        left = (total - done) / rate if done else None
        self.context.stage.write_heartbeat(
            done, total, throughput=rate, unit="units/s", eta_seconds=left, message=message
        )

    def draw(self) -> None:
        """Draw this rank's units that are not drawn yet."""
        splits = list(self.pairs)

        def do(unit: work.Unit) -> None:
            if not self.pictures.has(unit.name):
                number = work.number_of(unit, splits.index(unit.split), self.languages)
                arrays = work.draw_unit(unit, self.pairs[unit.split], number, self.cascade, self.recipe.seed)
                self.pictures.write(unit.name, arrays)

        self._share(self.units, "drawing", do)

    def exercise(self) -> None:
        """Describe, rank and edit: this rank's units that are not done yet."""
        self._share(self.skills.units, "describing, ranking, editing", self.skills.do)

    def extract(self) -> None:
        """Extract the features of drawn and of original held-out pictures."""
        drawn = [unit for unit in self.units if unit.split == "held_out"]
        chunk, held_out = self.recipe.evaluate.chunk, self.pairs.get("held_out", [])
        real = range(0, len(held_out), chunk)
        jobs: list[tuple[str, Any]] = [(unit.name, unit) for unit in drawn] + [
            (f"real-{start:06d}", start) for start in real
        ]

        def do(job: tuple[str, Any]) -> None:
            name, what = job
            if self.features.has(name):
                return
            if isinstance(what, work.Unit):
                images = self.pictures.read(name).get("final")
            else:
                images = work.originals_of(self.source, self.recipe, held_out[what : what + chunk])
            radii = self.recipe.evaluate.blur_radii
            self.features.write(name, {} if images is None else work.features_of(images, self.network, radii))

        self._share(jobs, "extracting features", do)
        self._drawn_names, self._real_names = [u.name for u in drawn], [f"real-{start:06d}" for start in real]

    def _statistics(self, names: list[str], radius: int) -> FeatureStatistics:
        # In the order of the units, so that the sums do not depend on which rank did which.
        total = FeatureStatistics(self.network.dim)
        for name in names:
            arrays = self.features.read(name)
            if arrays:
                total.update(torch.from_numpy(arrays[f"features_{radius}"]))
        return total

    def frechet(self) -> dict[str, Any]:
        """Return FID at each blur radius, or why there is none."""
        result: dict[str, Any] = {
            "network": self.network.name,
            "network_sha256": self.network.sha256,
            "comparable_to_papers": self.network.comparable,
            "reference": "held-out originals",
        }
        for radius in self.recipe.evaluate.blur_radii:
            drawn, real = (
                self._statistics(self._drawn_names, radius),
                self._statistics(self._real_names, radius),
            )
            few = min(drawn.count, real.count) <= self.network.dim
            result |= {"drawn": drawn.count, "real": real.count}
            if few and not self.recipe.evaluate.allow_few:
                result["refused"] = (
                    f"{min(drawn.count, real.count)} pictures are too few for {self.network.dim} feature dimensions; "
                    "raise evaluate.captions and data.held_out, or set evaluate.allow_few"
                )
                break
            result["too_few_pictures"] = few
            result[f"fid_{radius}"] = frechet_distance(*drawn.mean_cov(), *real.mean_cov())
        return result

    def scores(self) -> dict[str, Any]:
        """Return the inception score and the caption losses."""
        logits = [
            self.features.read(name)["logits"]
            for name in self._drawn_names
            if "logits" in self.features.read(name)
        ]
        result: dict[str, Any] = {"inception_score": None}
        if logits:
            every = np.concatenate(logits)
            order = np.random.default_rng(self.recipe.seed).permutation(len(every))
            mean, deviation = inception_score(torch.from_numpy(every[order]), splits=min(10, len(every)))
            result["inception_score"] = {"mean": mean, "deviation": deviation, "network": self.network.name}
        else:
            result["inception_score_missing"] = f"{self.network.name} has no classes"
        losses: dict[str, Any] = {}
        for language in self.languages:
            parts = [
                self.pictures.read(u.name)
                for u in self.units
                if u.split == "held_out" and u.language == language
            ]
            for kind in ("caption_score", "real_caption_score"):
                values = np.concatenate([part[kind] for part in parts if kind in part] or [np.zeros(0)])
                if len(values):
                    losses.setdefault(language, {})[kind.replace("score", "loss")] = float(-values.mean())
        result["caption_loss"] = losses
        return result

    def reconstruction(self) -> dict[str, Any]:
        """Return how well the VQVAE alone brings back the held-out originals, at both sizes.

        Where the source knows its facts, the oracle reads these pictures too: what is lost here, drawn pictures
        can hardly have.
        """
        chosen = self.pairs.get("held_out", [])[:_RECONSTRUCTED]
        if not chosen:
            return {}
        full = torch.from_numpy(work.originals_of(self.source, self.recipe, chosen)).float() / 255
        result = {}
        for name, pixels in (("base", downsample(full, self.recipe.data.base_size)), ("full", full)):
            tokenizer = self.cascade.image_tokenizer
            rebuilt = torch.cat(
                [
                    tokenizer.decode(tokenizer.encode(part.to(tokenizer.device))).clamp(0, 1).cpu()
                    for part in pixels.split(16)
                ]
            )
            metrics = {"l1": l1, "psnr": psnr, "ssim": ssim}
            result[name] = {key: float(metric(rebuilt, pixels).mean()) for key, metric in metrics.items()}
            if _has_facts(chosen):
                result[name]["caption_accuracy"] = self._obeyed(work.uint8_bchw(rebuilt), chosen)
        return result

    def accuracy(self) -> dict[str, Any] | None:
        """Return how often the oracle finds what the caption states, where the source knows its facts."""
        if not all(_has_facts(found) for found in self.pairs.values()):
            return None
        table: dict[str, Any] = {}
        details: dict[str, Any] = {}
        for language in self.languages:
            verdicts: dict[str, dict[str, list[dict[str, bool]]]] = {split: {} for split in self.pairs}
            for unit in self.units:
                if unit.language == language:
                    arrays = self.pictures.read(unit.name)
                    for name, found in work.oracle_unit(arrays, unit, self.pairs[unit.split]).items():
                        verdicts[unit.split].setdefault(name, []).extend(found)
            held_out = verdicts["held_out"]
            table[language] = {name: work.share(found) for name, found in held_out.items()}
            if "unseen" in verdicts:
                table[language]["unseen_pairs"] = work.share(verdicts["unseen"]["final"])
            details[language] = {
                name: {
                    key: work.share(found, key) for key in ("colour", "shape", "side", "size", "background")
                }
                for name, found in held_out.items()
            }
        originals = work.originals_of(self.source, self.recipe, self.pairs["held_out"])
        obeyed = self._obeyed(originals, self.pairs["held_out"])
        return {"table": table, "details": details, "oracle_on_originals": obeyed}

    def first_drawn(self) -> dict[str, dict[str, np.ndarray]]:
        """Return, by language, what the first unit of held-out captions drew."""
        first = {u.language: u for u in reversed(self.units) if u.split == "held_out"}
        return {language: self.pictures.read(first[language].name) for language in self.languages}

    def _obeyed(self, pictures: np.ndarray, pairs: list[TokenPair]) -> float:
        """Return the share of pictures, uint8 [B, 3, H, W], in which the oracle finds what the caption states."""
        language = self.languages[0]
        return work.share(
            [
                check(read_picture(picture.transpose(1, 2, 0)), pair.metadata["facts"][language])
                for picture, pair in zip(pictures, pairs, strict=True)
            ]
        )


def _record(evaluation: Evaluation, digest: str, selected: Selected) -> dict[str, Any]:
    recipe = evaluation.recipe
    accuracy = evaluation.accuracy()
    record: dict[str, Any] = {
        "format": FORMAT,
        "digest": digest,
        "weights": {"of": selected.name, "digests": selected.digests},
        "protocol": recipe.evaluate.model_dump(mode="json") | {"seed": recipe.seed},
        "captions": {split: len(found) for split, found in evaluation.pairs.items()},
        "fid": evaluation.frechet(),
        "reconstruction": evaluation.reconstruction(),
    } | evaluation.scores()
    record |= evaluation.skills.record()
    if accuracy is not None:
        record["caption_accuracy"] = accuracy["table"]
        record["caption_accuracy_details"] = accuracy["details"]
        record["oracle_on_originals"] = accuracy["oracle_on_originals"]
    return dict(work.to_json(record))


def _conclude(
    evaluation: Evaluation, digest: str, selected: Selected, folder: Path, result_path: Path
) -> None:
    """Write the result and its pictures, once all units are done; rank 0 only."""
    context = evaluation.context
    picture, shown = showcase(
        context, evaluation.pairs["held_out"], evaluation.first_drawn(), evaluation.cascade, evaluation.source
    )
    record = _record(evaluation, digest, selected) | {"picture": shown}
    if picture is not None:
        save_png(folder / "samples.png", picture)
    edited = evaluation.skills.edited()
    if edited is not None:
        pairs_BHWC, texts = edited
        save_png(folder / "edits.png", grid([pairs_BHWC[:, 0], pairs_BHWC[:, 1]]))
        record["edited_picture"] = {"rows": ["before", "after"], "texts": texts}
    fsops.write_json(result_path, record)


def job(context: StageContext) -> None:
    """Evaluate the recipe's weights; an evaluation that exists already is taken as it is."""
    recipe, stage, run, world = context.recipe, context.stage, context.run, context.world
    selected = select_weights(context)
    pairs = work.load_pairs(run, recipe)
    if not pairs.get("held_out"):
        raise DataError(
            "nothing is held out for evaluation: the source has too few distinct pictures; add some"
        )
    source = open_source(recipe.data, recipe.seed)
    network = choose_network(context, source)
    digest = _digest(context, selected, network, pairs)
    result_path = run.path / "evaluation" / f"{digest}.json"
    folder = stage.path / "work" / digest
    if not broadcast_object(result_path.is_file() if world.is_first else None):
        if world.is_first:
            fsops.make_dirs(folder)
            fsops.make_dirs(result_path.parent)
        barrier()
        # Weights of another run are measured under this recipe's protocol: that is what the digest names.
        cascade = load_text_to_image(
            selected.models, device=world.device, coglm_weights=selected.coglm, protocol=recipe
        )
        if cascade.image_tokenizer.rate * cascade.base_grid != recipe.data.base_size:
            raise ConfigError(
                f"evaluate.weights {selected.name} draws pictures of another size than data.base_size {recipe.data.base_size}"
            )
        evaluation = Evaluation(context, folder, pairs, cascade, network, source)
        with torch.no_grad():
            evaluation.draw()
            evaluation.exercise()
            evaluation.extract()
            if world.is_first:
                with heeding(context.stop, cascade.coglm, cascade.direct, cascade.iterative):
                    _conclude(evaluation, digest, selected, folder, result_path)
    if world.is_first and result_path.is_file():
        record = json.loads(result_path.read_text(encoding="utf-8"))
        fsops.write_json(stage.output / "evaluation.json", record)
        for name in ("samples.png", "edits.png"):
            if (folder / name).is_file():
                fsops.write_bytes(stage.output / name, (folder / name).read_bytes())
        context.finish(stage, {"digest": digest, "summary": summary(record)})
    watchdog.enter(watchdog.WAIT)
    if not broadcast_object(stage.done() is not None if world.is_first else None):
        raise Preempted(
            f"stopped by {context.stop.reason} while measuring; the same command goes on from there"
        )


if __name__ == "__main__":
    run_stage("evaluate", job)
