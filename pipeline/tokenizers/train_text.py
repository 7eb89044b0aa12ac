"""Train the text tokenizer: SentencePiece unigram, its pieces in the order of the id layout (spec 1.2)."""

import hashlib
import io
import logging
import random
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import sentencepiece

from cogview2.pipeline.config.stages import TokenizerConfig
from cogview2.pipeline.errors import DataError
from cogview2.pipeline.tokenizers.piece_ranges import group_pieces, has_cjk
from cogview2.pipeline.tokenizers.text import NEWLINE_MARK, TextTokenizer
from cogview2.pipeline.tokenizers.vocabulary import (
    BOS,
    CONTROL_PIECES,
    EOS,
    NEWLINE,
    PAD,
    RANGE_NAMES,
    UNK,
    Vocabulary,
)

logger = logging.getLogger(__name__)

NORMALIZER = "nmt_nfkc"
_MAX_CHARACTERS = 1000
"""Longer sentences are cut: SentencePiece silently drops lines above 4192 bytes."""
_REPORTED_SENTENCES = 2000
_WORDS_ALONE = 100_000
_REQUIRED_CHARACTERS = "".join(sorted(string.ascii_letters + string.digits + string.punctuation))
"""Always pieces, so that no printable ASCII that a user types is unknown, whatever the corpus."""
_EXTREMELY_LARGE = 10_000_000
"""Sentences above which SentencePiece needs 64-bit offsets."""
_CONTROL_SPELLING = re.compile("|".join(map(re.escape, CONTROL_PIECES[:-1])))
_TOO_FEW = re.compile(r"smaller than required_chars\. \d+ vs (\d+)")


@dataclass(frozen=True)
class TrainedTokenizer:
    """A text model, its id layout, and what is worth knowing about it."""

    model_bytes: bytes
    vocabulary: Vocabulary
    report: dict[str, Any]


def clean(sentences: Iterable[str]) -> Iterator[str]:
    """Yield non-empty lines of at most 1000 characters, without the spellings of control pieces.

    A learned piece spelled like a control piece would make the model invalid.
    """
    for sentence in sentences:
        sentence = sentence.encode("utf-8", "ignore").decode("utf-8")
        for line in sentence.replace("\0", " ").replace(NEWLINE_MARK, "").splitlines():
            # `< pad >` for `<pad>`: the characters still count, the spelling does not.
            line = _CONTROL_SPELLING.sub(lambda match: f"< {match[0][1:-1]} >", line).strip()
            for start in range(0, len(line), _MAX_CHARACTERS):
                yield line[start : start + _MAX_CHARACTERS]


def draw(sentences: Iterable[str], count: int, seed: int) -> list[str]:
    """Return `count` of the sentences (all, if fewer) drawn uniformly, in their order.

    SentencePiece can draw too, but from a generator that remembers earlier trainings of the process.
    """
    generator = random.Random(seed)
    kept: list[tuple[int, str]] = []
    for index, sentence in enumerate(sentences):
        if len(kept) < count:
            kept.append((index, sentence))
        else:
            slot = generator.randrange(index + 1)
            if slot < count:
                kept[slot] = (index, sentence)
    kept.sort()
    return [sentence for _, sentence in kept]


def words_alone(sentences: list[str]) -> list[str]:
    """Return the frequent words that are set off by spaces, each once.

    SentencePiece's candidates are the substrings that occur before two different characters. In captions made
    from few patterns a word such as "red" always stands before a space and would never become a piece; one
    line of its own makes it a candidate. Its frequency in the corpus stays what decides.
    """
    counts = Counter(word for sentence in sentences for word in sentence.split() if word.isalpha())
    frequent = [word for word, count in counts.most_common(_WORDS_ALONE) if count > 1]
    return [word for word in frequent if not has_cjk(word)]


def _fit(sentences: list[str], pieces: int, config: TokenizerConfig) -> bytes:
    """Train a model of at most `pieces` pieces; fewer when the corpus supports no more."""
    writer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=chain(sentences, words_alone(sentences)),
            model_writer=writer,
            model_type="unigram",
            vocab_size=pieces,
            hard_vocab_limit=False,
            byte_fallback=False,
            character_coverage=config.character_coverage,
            required_chars=_REQUIRED_CHARACTERS,
            user_defined_symbols=[CONTROL_PIECES[NEWLINE]],
            unk_id=UNK,
            bos_id=BOS,
            eos_id=EOS,
            pad_id=PAD,
            normalization_rule_name=NORMALIZER,
            num_threads=config.num_threads,
            seed_sentencepiece_size=config.seed_pieces,
            input_sentence_size=0,
            shuffle_input_sentence=False,
            train_extremely_large_corpus=len(sentences) > _EXTREMELY_LARGE,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        too_few = _TOO_FEW.search(str(error))
        if too_few:
            raise DataError(
                f"{pieces} text pieces are fewer than the {too_few[1]} that the single characters need at "
                f"character_coverage {config.character_coverage}; set coglm.model.vocabulary.text_pieces to "
                f"{too_few[1]} or more, or lower tokenizer.character_coverage"
            ) from error
        raise DataError(
            f"the text tokenizer cannot be trained on these {len(sentences)} sentences: {error}"
        ) from error
    return writer.getvalue()


def _usage(tokenizer: TextTokenizer, sentences: list[str]) -> dict[str, Any]:
    """Return tokens per caption by language and the share of unknown tokens, on a sample of the sentences."""
    tokens: dict[str, list[int]] = {"en": [], "zh": []}
    unknown = 0
    for sentence in draw(sentences, _REPORTED_SENTENCES, seed=0):
        ids = tokenizer.encode(sentence)
        tokens["zh" if has_cjk(sentence) else "en"].append(len(ids))
        unknown += ids.count(tokenizer.vocabulary.unk)
    total = sum(map(sum, tokens.values()))
    return {
        "tokens_per_caption": {name: sum(each) / len(each) for name, each in tokens.items() if each},
        "unk_rate": unknown / total if total else 0.0,
    }


def train(
    sentences: Iterable[str],
    *,
    pieces: int,
    config: TokenizerConfig,
    image_codes: int,
    rows: int | None,
    seed: int,
) -> TrainedTokenizer:
    """Train a text model and lay out the ids.

    Equal sentences, arguments and `config.num_threads` give equal bytes, whatever the process did before.

    Args:
        sentences: captions or lines of text in any order; read once.
        pieces: text pieces of the id layout, control pieces included.
        config: section `tokenizer` of the recipe.
        image_codes: image codes, the ids before the text pieces.
        rows: rows of the embedding; None for just enough.
        seed: of the draw of `config.input_sentences` sentences.

    Returns:
        With `config.shrink_to_fit`, a model that may have fewer than `pieces` pieces; the layout keeps its
        width and the ids without a piece end the rare range.

    Raises:
        DataError: no text; more pieces than the corpus supports; fewer than its characters need; few rows.
    """
    Vocabulary.uniform(image_codes, pieces, rows)
    chosen = draw(clean(sentences), config.input_sentences, seed)
    if not chosen:
        raise DataError("no text to train the tokenizer on; give captions or name a corpus in data.text")
    trained = _fit(chosen, pieces, config)
    model, counts = group_pieces(trained, config.rare_frequency)
    size = sum(counts)
    if size < pieces:
        if not config.shrink_to_fit:
            raise DataError(
                f"the corpus of {len(chosen)} sentences supports at most {size} text pieces, not {pieces}; "
                f"set coglm.model.vocabulary.text_pieces to {size}, give more text, or set "
                "tokenizer.shrink_to_fit to true"
            )
        logger.warning(
            "the corpus supports %d text pieces of %d; the rest of the ids stay unused", size, pieces
        )
    common, english, chinese, rare = counts
    vocabulary = Vocabulary.from_counts(image_codes, (common, english, chinese, rare + pieces - size), rows)
    tokenizer = TextTokenizer.from_bytes(model, vocabulary)
    report = {
        "sentences": len(chosen),
        "pieces": size,
        "unused_ids": pieces - size,
        "pieces_by_range": dict(zip(RANGE_NAMES, counts, strict=True)),
        **_usage(tokenizer, chosen),
        "num_threads": config.num_threads,
        "normalizer": NORMALIZER,
        "character_coverage": config.character_coverage,
        "sentencepiece_version": sentencepiece.__version__,
        "sha256": hashlib.sha256(model).hexdigest(),
    }
    return TrainedTokenizer(model_bytes=model, vocabulary=vocabulary, report=report)
