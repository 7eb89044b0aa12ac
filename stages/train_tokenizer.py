"""Stage train_tokenizer: the text tokenizer. Rank 0 trains while no collective is open; the others wait."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from cogview2.pipeline import fsops
from cogview2.pipeline.data.records import RefusedError
from cogview2.pipeline.data.sources import open_source
from cogview2.pipeline.data.text_corpus import check_readable, read_lines
from cogview2.pipeline.distributed import watchdog
from cogview2.pipeline.errors import ConfigError, Preempted
from cogview2.pipeline.tokenizers.train_text import TrainedTokenizer, train
from cogview2.pipeline.tokenizers.vocabulary import SPECIAL_TOKENS
from cogview2.stages._loading import open_models
from cogview2.stages._runner import StageContext, run_stage

logger = logging.getLogger(__name__)
BEAT_SECONDS = 2.0


def _sentences(context: StageContext, counts: Counter[str]) -> Iterator[str]:
    """Yield the captions of training pictures, then the lines of the text corpora."""
    recipe = context.recipe
    source = open_source(recipe.data, recipe.seed)
    for index in source.splits["train"]:
        try:
            pair = source.read(index)
        except RefusedError as error:
            counts["refused"] += 1
            logger.warning("record %s is left out: %s", source.keys[index], error)
            continue
        counts["captions"] += len(pair.captions)
        yield from (pair.captions[language] for language in sorted(pair.captions))
    for corpus in recipe.data.text:
        if corpus.for_tokenizer:
            yield from read_lines(Path(corpus.path), counts)


def _train(context: StageContext) -> None:
    recipe, stage = context.recipe, context.stage
    check_readable([Path(corpus.path) for corpus in recipe.data.text if corpus.for_tokenizer])
    counts: Counter[str] = Counter()
    vocabulary = recipe.coglm.model.vocabulary
    result: list[TrainedTokenizer | BaseException] = []

    def work() -> None:
        try:
            trained = train(
                _sentences(context, counts),
                pieces=vocabulary.text_pieces,
                config=recipe.tokenizer,
                image_codes=recipe.vqvae.model.codebook_size,
                rows=vocabulary.rows,
                seed=recipe.seed,
            )
            result.append(trained)
        except BaseException as error:  # handed to the main thread, which raises it
            result.append(error)

    # In a thread, so that the main thread can beat: 130,000 pieces take hours.
    thread = threading.Thread(target=work, daemon=True)
    started = time.monotonic()
    thread.start()
    watchdog.enter("work")
    while thread.is_alive():
        thread.join(BEAT_SECONDS)
        watchdog.progress()
        stage.write_heartbeat(0, 1, message=f"SentencePiece, {time.monotonic() - started:.0f} s")
        if context.stop.is_set:
            raise Preempted(
                f"stopped by {context.stop.reason} while training; the same command starts it again"
            )
    trained = result[0]
    if isinstance(trained, BaseException):
        raise trained
    fsops.write_bytes(stage.output / "tokenizer.model", trained.model_bytes)
    trained.vocabulary.save(stage.output / "vocabulary.json")
    fsops.write_json(stage.output / "report.json", trained.report | {"sources": dict(counts)})
    logger.info("tokenizer: %s", trained.report)
    stage.write_heartbeat(1, 1)
    context.finish(stage, {"report": trained.report})


def _take(context: StageContext, source: str) -> None:
    """Take the tokenizer of a run or weights folder as it is."""
    recipe, stage = context.recipe, context.stage
    tokenizer = open_models(Path(source)).text_tokenizer()
    found, wanted = tokenizer.vocabulary, recipe.coglm.model.vocabulary
    rows = wanted.rows or found.text_end + len(SPECIAL_TOKENS)
    for key, here, there in (
        ("vqvae.model.codebook_size", recipe.vqvae.model.codebook_size, found.image_codes),
        ("coglm.model.vocabulary.text_pieces", wanted.text_pieces, found.text_pieces),
        ("coglm.model.vocabulary.rows", rows, found.rows),
    ):
        if here != there:
            raise ConfigError(
                f"tokenizer.take_from {source} has an id layout with {there}, but {key} is {here}; set it to {there}"
            )
    fsops.write_bytes(stage.output / "tokenizer.model", tokenizer.model_bytes)
    found.save(stage.output / "vocabulary.json")
    report = {"taken_from": source, "pieces": tokenizer.pieces}
    fsops.write_json(stage.output / "report.json", report)
    logger.info("tokenizer: taken from %s", source)
    context.finish(stage, {"report": report})


def _wait(context: StageContext) -> None:
    """Wait for rank 0 by its record: a collective would time out long before the tokenizer is trained."""
    watchdog.enter(watchdog.WAIT)
    while context.stage.done() is None:
        time.sleep(0.5)
        if context.stop.is_set:
            raise Preempted(
                f"stopped by {context.stop.reason} while waiting for rank 0; the same command starts it again"
            )


def job(context: StageContext) -> None:
    """Train, or take, on rank 0; wait on the others."""
    source = context.recipe.tokenizer.take_from
    if context.world.is_first:
        _train(context) if source is None else _take(context, source)
    else:
        _wait(context)


if __name__ == "__main__":
    run_stage("train_tokenizer", job, collective=False)
