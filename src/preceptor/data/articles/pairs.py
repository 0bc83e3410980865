"""What an episode reads: key-value pairs from an article, as consecutive sentences or as chunks of tokens."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from preceptor.data.articles.sentences import split_paragraphs, split_sentences
from preceptor.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch

_CJK = re.compile("[\u3040-\u30ff\u3400-\u9fff]")  # kana and unified ideographs


@dataclass(frozen=True)
class Pair:
    """Two consecutive sentences: ``key`` is what a query is matched with, ``value`` is what is then read.

    ``index`` (from 0) is the pair's identity: two pairs of equal text are still two.
    """

    index: int
    key: str
    value: str


def sentence_pairs(
    text: str,
    *,
    language: str = "en",
    min_characters: int = 15,
    max_characters: int = 2_000,
    left_out: Counter[str] | None = None,
) -> list[Pair]:
    r"""Non-overlapping pairs of consecutive sentences of ``text``, in the order of the article.

    Sentences that cannot carry meaning are passed over first: those under ``min_characters``, over ``max_characters``,
    or without two words (a lone symbol, a list number, a year). Pairs then stay within a paragraph. Where a paragraph
    has an odd number of sentences, its last one is paired with the first of the next paragraph if that has an odd
    number too (so that neither loses one, and text of one-sentence paragraphs still gives pairs), and else it is left
    out. No pair reaches over the end of a section (two blank lines, as
    `preceptor.data.articles.markup.article_text` writes).

    Args:
        text: plain text as in `preceptor.data.articles.article.Article.text`.
        language: ISO 639-1 code for the sentence splitter.
        min_characters: shortest sentence that counts; a Chinese or Japanese character counts as three.
        max_characters: longest sentence that counts.
        left_out: receives how many sentences are in no pair, by reason.

    Raises:
        DataError: there is not even one pair.

    >>> sentence_pairs("The cat sat on a mat. The mat was red.\n\nA dog came by later.")
    [Pair(index=0, key='The cat sat on a mat.', value='The mat was red.')]
    """
    pairs: list[Pair] = []
    num_sentences, reasons = 0, Counter[str]() if left_out is None else left_out
    # Sections first, then paragraphs: a pair across a section's end would join two topics.
    for section in re.split(r"\n[^\S\n]*\n[^\S\n]*\n\s*", text):
        pending: str | None = None
        for paragraph in split_paragraphs(section):
            sentences = []
            for sentence in split_sentences(paragraph, language=language):
                if _latin_length(sentence) < min_characters:
                    reasons[f"shorter than {min_characters} characters"] += 1
                elif len(sentence) > max_characters:
                    reasons[f"longer than {max_characters:,} characters"] += 1
                elif not _has_two_words(sentence):
                    reasons["without two words"] += 1
                else:
                    sentences.append(sentence)
            num_sentences += len(sentences)
            # Both paragraphs are odd: their left-over sentences make one pair, and no other pairing changes.
            if pending is not None and len(sentences) % 2:
                sentences.insert(0, pending)
            for key, value in zip(sentences[::2], sentences[1::2], strict=False):
                pairs.append(Pair(len(pairs), key, value))
            # An empty paragraph leaves the pending sentence waiting; an even one clears it.
            if sentences:
                pending = sentences[-1] if len(sentences) % 2 else None
    if num_unpaired := num_sentences - 2 * len(pairs):
        reasons["without a neighbour to pair with"] += num_unpaired
    if not pairs:
        raise DataError(
            f"the article is too short for one pair: it has {num_sentences} usable sentences (of {min_characters} to "
            f"{max_characters} characters), and a pair takes two consecutive ones; pass a longer article"
        )
    return pairs


def chunk_pairs(
    token_ids: Sequence[int], *, key_tokens: int, value_tokens: int
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Consecutive chunks of ``key_tokens`` + ``value_tokens`` tokens as (key ids, value ids), a last short one dropped.

    This is the later form of the predecessor (24 + 40 tokens), which ignores where sentences end.

    Raises:
        ConfigError: a chunk length under 1.
        DataError: ``token_ids`` do not fill one chunk.

    >>> chunk_pairs([1, 2, 3, 4, 5, 6, 7], key_tokens=1, value_tokens=2)
    [((1,), (2, 3)), ((4,), (5, 6))]
    """
    if key_tokens < 1 or value_tokens < 1:
        raise ConfigError(f"key_tokens and value_tokens must be at least 1, got {key_tokens} and {value_tokens}")
    width = key_tokens + value_tokens
    if len(token_ids) < width:
        raise DataError(
            f"the article is too short for one pair: it has {len(token_ids)} tokens and a pair takes {width} "
            f"({key_tokens} + {value_tokens}); pass a longer article or shorten the chunks"
        )
    # No chunk is padded: the last start that fills a whole one is len − width.
    starts = range(0, len(token_ids) - width + 1, width)
    return [
        (tuple(token_ids[start : start + key_tokens]), tuple(token_ids[start + key_tokens : start + width]))
        for start in starts
    ]


def hold_out_probes(
    pairs: Sequence[Pair], num_probes: int, *, generator: torch.Generator | None = None
) -> tuple[list[Pair], list[str]]:
    """``(readable, probes)``: ``num_probes`` pairs leave the article, and their values are the probe sentences.

    Without a ``generator`` the probes are spread evenly: probe ``i`` of ``k`` comes from pair ``floor((i + 1/2) n/k)``
    of ``n``, the same in every run and for every seed. With one they are drawn from it without replacement. Probes keep
    the article's order; the readable pairs are numbered anew, so that ``readable[i].index == i``.

    Raises:
        ConfigError: ``num_probes`` is negative.
        DataError: no pair would be left to read.
    """
    if num_probes < 0:
        raise ConfigError(f"num_probes must not be negative, got {num_probes}")
    if num_probes >= len(pairs):
        raise DataError(
            f"{num_probes} probes leave nothing to read of {len(pairs)} pairs; hold out at most {len(pairs) - 1} or "
            "pass a longer article"
        )
    # The middle of each of k equal parts: probes cover the article evenly and need no randomness.
    if generator is None:
        held_out = {(2 * i + 1) * len(pairs) // (2 * num_probes) for i in range(num_probes)}
    else:
        import torch

        # A permutation, so that the first k are a sample without replacement.
        order = torch.randperm(len(pairs), generator=generator, device=generator.device)
        held_out = set(order[:num_probes].tolist())
    readable = [pair for position, pair in enumerate(pairs) if position not in held_out]
    probes = [pairs[position].value for position in sorted(held_out)]
    return [replace(pair, index=index) for index, pair in enumerate(readable)], probes


def _latin_length(sentence: str) -> int:
    """Characters of ``sentence``, each of Chinese or Japanese as the three letters that say about as much."""
    # 2 more for each, so that `min_characters` means about as much text in either script.
    return len(sentence) + 2 * len(_CJK.findall(sentence))


def _has_two_words(sentence: str) -> bool:
    """Whether ``sentence`` has two words of letters; text without spaces (Chinese, Japanese) counts each letter."""
    return len(re.findall(r"[^\W\d_]+", sentence)) >= 2 or len(_CJK.findall(sentence)) >= 2
