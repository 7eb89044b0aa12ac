"""Stage shard_dataset: text ids and image codes into webdataset tars. Ranks share the shards; a rerun goes on."""

import json
import logging
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cogview2.pipeline import fsops
from cogview2.pipeline.data.shard_index import write_manifest
from cogview2.pipeline.data.shard_writer import ShardEntry, index_name, write_text_shard
from cogview2.pipeline.data.sources import Source, open_source
from cogview2.pipeline.data.text_corpus import TextRows, check_readable
from cogview2.pipeline.data.tokenize import PairTokenizer, Refused, shard_ranges, write_range
from cogview2.pipeline.distributed.process import barrier, gather_objects
from cogview2.pipeline.errors import DataError, Preempted
from cogview2.stages._loading import load_image_tokenizer, load_text_tokenizer
from cogview2.stages._runner import StageContext, run_stage

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


def _check_stop(context: StageContext) -> None:
    if context.stop.is_set:
        raise Preempted(
            f"stopped by {context.stop.reason} between two shards; the same command goes on with the next"
        )


def _write_split(
    context: StageContext, split: str, source: Source, tokenizer: PairTokenizer, identity: str
) -> None:
    """Write this rank's shards of one split, then the manifest."""
    stage, recipe = context.stage, context.recipe
    folder, records = stage.output / split, stage.path / "progress" / split
    if context.world.is_first:
        fsops.make_dirs(folder)
        fsops.make_dirs(records)
    barrier()
    indices = source.splits[split]
    ranges = shard_ranges(len(indices), recipe.shards.samples_per_shard)
    started = time.monotonic()
    for number in range(context.world.rank, len(ranges), context.world.size):
        _check_stop(context)
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
    barrier()
    if context.world.is_first:
        found = [_finished(records / f"{number:06d}.json", folder, identity) for number in range(len(ranges))]
        lost = [number for number, record in enumerate(found) if record is None]
        if lost:
            raise DataError(
                f"shards {lost[:5]} of {split} vanished while being written; start the stage again"
            )
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
        _check_stop(context)
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
    tokenizer = PairTokenizer(text, image, recipe.data, recipe.shards.vqvae_batch)
    identity = f"{context.run.fingerprint(recipe, stage.name)}:{source.fingerprint}"
    with torch.no_grad():
        for split in source.splits:
            _write_split(context, split, source, tokenizer, identity)
    _write_text(context, text)
    gather_objects(None)
    if world.is_first:
        summary = _summary(context, source)
        for reason, count in summary["refused"].items():
            logger.warning("left out %d: %s, for example %s", count, reason, summary["examples"][reason][0])
        fsops.write_json(stage.output / "refused.json", summary)
        context.finish(stage, summary)


if __name__ == "__main__":
    run_stage("shard_dataset", job)
