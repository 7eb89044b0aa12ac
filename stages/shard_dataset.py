"""Stage shard_dataset: text ids and image codes into webdataset tars. Ranks share the shards; a rerun goes on."""

import json
import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cogview2.pipeline import fsops
from cogview2.pipeline.data.records import TokenPair
from cogview2.pipeline.data.shard_index import write_manifest
from cogview2.pipeline.data.shard_writer import ShardEntry, index_name, write_text_shard
from cogview2.pipeline.data.sources import Source, open_source
from cogview2.pipeline.data.text_corpus import TextRows, check_readable
from cogview2.pipeline.data.tokenize import PairTokenizer, Refused, shard_ranges, write_range
from cogview2.pipeline.distributed import watchdog
from cogview2.pipeline.errors import DataError
from cogview2.pipeline.training.preemption import StopFlag
from cogview2.stages._loading import load_image_tokenizer, load_text_tokenizer
from cogview2.stages._runner import StageContext, run_stage
from cogview2.stages._stopping import heeding, look, meet

logger = logging.getLogger(__name__)


def _finished(path: Path, folder: Path, identity: str) -> dict[str, Any] | None:
    """Return the record of a shard that an earlier attempt finished, when its files are what it says."""
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        entry = ShardEntry(**record["entry"])
        whole = (
            record["identity"] == identity
            and fsops.sha256_file(folder / entry.name) == entry.sha256
            and fsops.sha256_file(folder / index_name(entry.name)) == entry.index_sha256
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if whole else None


class _Mindful(PairTokenizer):
    """Heeds a stop at every pair: a shard of thousands takes longer than a stop may."""

    def __init__(self, stop: StopFlag, *what: Any) -> None:
        super().__init__(*what)
        self.stop = stop

    def tokenize(self, source: Source, indices: list[int], refused: Refused) -> Iterator[TokenPair]:
        for pair in super().tokenize(source, indices, refused):
            look(self.stop)
            yield pair


def _write_split(
    context: StageContext, split: str, source: Source, tokenizer: PairTokenizer, identity: str
) -> None:
    """Write this rank's shards of one split, then the manifest; collective."""
    stage, recipe = context.stage, context.recipe
    folder, records = stage.output / split, stage.path / "progress" / split
    if context.world.is_first:
        fsops.make_dirs(folder)
        fsops.make_dirs(records)
    words = "while writing shards; the same command goes on with those that are not finished"
    meet(context.stop, words)
    ranges = shard_ranges(len(source.splits[split]), recipe.shards.samples_per_shard)
    with heeding(context.stop):
        _write_shards(context, split, source, tokenizer, identity, ranges)
    meet(context.stop, words)
    if context.world.is_first:
        _conclude(context, split, source, identity, len(ranges))


def _write_shards(
    context: StageContext,
    split: str,
    source: Source,
    tokenizer: PairTokenizer,
    identity: str,
    ranges: list[range],
) -> None:
    stage, indices = context.stage, source.splits[split]
    folder, records = stage.output / split, stage.path / "progress" / split
    started = time.monotonic()
    for number in range(context.world.rank, len(ranges), context.world.size):
        look(context.stop)
        path = records / f"{number:06d}.json"
        if _finished(path, folder, identity) is None:
            refused: list[Refused] = []
            chosen = [indices[i] for i in ranges[number]]
            entry = write_range(folder, f"{split}-{number:06d}", tokenizer, source, chosen, refused.append)
            fsops.write_json(
                path, {"identity": identity, "entry": asdict(entry), "refused": refused[0].to_dict()}
            )
        if context.world.is_first:
            written = ranges[number].stop
            rate = written / max(time.monotonic() - started, 1e-9)
            left = (len(indices) - written) / rate
            stage.write_heartbeat(
                written, len(indices), throughput=rate, unit="pictures/s", eta_seconds=left, message=split
            )


def _conclude(context: StageContext, split: str, source: Source, identity: str, count: int) -> None:
    """Write the manifest of a split whose shards are all there."""
    folder, records = context.stage.output / split, context.stage.path / "progress" / split
    found = []
    for number in range(count):
        watchdog.progress()  # it reads every shard once more
        found.append(_finished(records / f"{number:06d}.json", folder, identity))
    lost = [number for number, record in enumerate(found) if record is None]
    if lost:
        raise DataError(f"shards {lost[:5]} of {split} vanished while being written; start the stage again")
    done = [record for record in found if record is not None]
    entries = [ShardEntry(**record["entry"]) for record in done]
    fingerprint = write_manifest(
        folder,
        entries,
        {"split": split, "source": source.description, "source_sha256": source.fingerprint},
    )
    logger.info(
        "%s: %d samples in %d shards, fingerprint %s",
        split,
        sum(e.samples for e in entries),
        len(entries),
        fingerprint,
    )


def _write_text(context: StageContext, text: Any) -> None:
    """Pack the plain-text corpora; one rank does, packing runs over shard borders."""
    recipe, stage = context.recipe, context.stage
    paths = [Path(corpus.path) for corpus in recipe.data.text if corpus.for_objective]
    if not paths or not context.world.is_first:
        return
    check_readable(paths)
    length = recipe.coglm.model.text_length + recipe.data.base_grid**2
    rows = TextRows(paths, text.encode, length, separator=text.vocabulary.newline)
    folder = stage.output / "text"
    fsops.make_dirs(folder)
    entries: list[ShardEntry] = []
    chunk: list[tuple[str, np.ndarray]] = []

    def flush() -> None:
        if chunk:
            entries.append(write_text_shard(folder, f"text-{len(entries):06d}", list(chunk)))
            chunk.clear()

    for number, row in enumerate(rows):
        look(context.stop)
        chunk.append((f"{number:09d}", row))
        if len(chunk) == recipe.shards.samples_per_shard:
            flush()
            stage.write_heartbeat(number, 0, message="text")
    flush()
    write_manifest(folder, entries, {"split": "text", "counts": dict(rows.counts)})


def _summary(context: StageContext, source: Source) -> dict[str, Any]:
    """Add up what was left out, over listing and decoding."""
    refused = Refused()
    for refusal in source.refused:
        refused.add(refusal)
    for path in sorted((context.stage.path / "progress").glob("*/*.json")):
        part = json.loads(path.read_text(encoding="utf-8"))["refused"]
        refused.counts += Counter(part["counts"])
        for reason, examples in part["examples"].items():
            refused.examples.setdefault(reason, []).extend(examples)
    examples = {reason: found[:3] for reason, found in refused.examples.items()}
    return {"source": source.description, "refused": dict(refused.counts), "examples": examples}


def job(context: StageContext) -> None:
    """Write the shards of every split, then the text shards, then the record."""
    recipe, stage, world = context.recipe, context.stage, context.world
    source = open_source(recipe.data, recipe.seed)
    text = load_text_tokenizer(context.run)
    image = load_image_tokenizer(context.run, recipe, world.device)
    tokenizer = _Mindful(context.stop, text, image, recipe.data, recipe.shards.vqvae_batch)
    identity = f"{context.run.fingerprint(recipe, stage.name)}:{source.fingerprint}"
    with torch.no_grad():
        for split in source.splits:
            _write_split(context, split, source, tokenizer, identity)
    with heeding(context.stop):
        _write_text(context, text)
    meet(context.stop, "while packing text; the pictures' shards are kept, packing begins again")
    if world.is_first:
        summary = _summary(context, source)
        for reason, count in summary["refused"].items():
            logger.warning("left out %d: %s, for example %s", count, reason, summary["examples"][reason][0])
        fsops.write_json(stage.output / "refused.json", summary)
        context.finish(stage, summary)


if __name__ == "__main__":
    run_stage("shard_dataset", job)
