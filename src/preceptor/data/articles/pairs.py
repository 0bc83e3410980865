"""What an episode reads: key-value pairs from an article, as consecutive sentences or as chunks of tokens.

Paragraphs become sentences by Wikimedia's splitter sentencex and a few repairs; a language that does not fit is noted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

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


# ---- sentences ------------------------------------------------------------------------------------------------------

# What sentencex 1.0.32 splits although the sentence goes on (test_sentences.py has a case for each):
# a list number ("1. Open the box"), and an abbreviation that it lacks before the number that belongs to it ("vol. 2").
_LIST_MARKER = re.compile(r"\(?(?:\d{1,3}|[a-zA-Z]|[ivxIVX]+)[.)]")
_ABBREVIATION_BEFORE_NUMBER = re.compile(
    r"(?:\b|^)(?:approx|app|art|bk|ca|cf|ch|chap|col|ed|eds|eq|eqs|est|fig|figs|fl|ll|no|nos|op|p|par|pp|pt|ref|refs|sec|"
    r"sect|ser|tab|vers|vol|vols)\.$",
    re.IGNORECASE,
)
# In many languages a number with a full stop is an ordinal ("Im 19. Jahrhundert", "Ludwig XIV. war"). Where it may as
# well end the sentence, the text is kept together.
_ORDINAL_LANGUAGES = (
    *("de", "da", "nb", "nn", "no", "fi", "cs", "sk", "sl", "hr", "sr", "bs", "hu", "et", "lv", "tr", "is", "eu"),
)
_ORDINAL = re.compile(r"(?:^|[\s(–-])(?:\d{1,2}|[IVXL]{1,6})\.$")
# And what it keeps together: a sentence that stands in parentheses as a whole, with the one after it.
_WHOLE_PARENTHESIS = re.compile(r"^(\([^()]*[.!?]\)\s+)(?=[A-Z\"“‘(])")


def split_paragraphs(text: str) -> list[str]:
    """The paragraphs of ``text`` (separated by blank lines), each on one line, none empty."""
    return [paragraph for piece in re.split(r"\n\s*\n", text) if (paragraph := " ".join(piece.split()))]


def split_sentences(text: str, *, language: str = "en") -> list[str]:
    r"""The sentences of ``text`` in order; a sentence never reaches over a blank line.

    Joined by spaces, they are ``text`` up to white space: nothing is dropped or changed. Where a full stop may or may
    not end a sentence ("vitamin C. Then"), the text is rather kept together than cut in the middle.

    Args:
        text: plain text, paragraphs separated by blank lines.
        language: ISO 639-1 code that chooses the abbreviations (sentencex falls back to English for what it lacks).

    >>> split_sentences("Dr. Ada Byron lives in the U.S. in a flat of 3.5 rooms. She works.\n\nHe does not.")
    ['Dr. Ada Byron lives in the U.S. in a flat of 3.5 rooms.', 'She works.', 'He does not.']
    """
    return [sentence for paragraph in split_paragraphs(text) for sentence in _split_paragraph(paragraph, language)]


def _split_paragraph(paragraph: str, language: str) -> list[str]:
    import sentencex  # type: ignore[import-untyped]

    sentences: list[str] = []
    for segment in sentencex.segment(language, paragraph):
        # The pattern's group makes split() keep the parenthesis as a part of its own.
        for part in filter(None, _WHOLE_PARENTHESIS.split(segment)):
            if sentences and _continues(sentences[-1].rstrip(), part.strip(), language):
                # Joined with its own white space, so that no character of the text is lost.
                sentences[-1] += part
            else:
                sentences.append(part)
    return [sentence.strip() for sentence in sentences]


def _continues(previous: str, part: str, language: str) -> bool:
    """Whether ``part`` belongs to ``previous``, although the splitter cut between them."""
    return bool(
        _LIST_MARKER.fullmatch(previous)
        or (language in _ORDINAL_LANGUAGES and _ORDINAL.search(previous))
        or not re.search(r"\w", part)  # a lone bracket or quotation mark
        or (part[0].isdigit() and _ABBREVIATION_BEFORE_NUMBER.search(previous))
    )


# ---- texts in another language --------------------------------------------------------------------------------------

# The commonest words of a language that its neighbours do not share: enough to tell a page apart, not a sentence.
_COMMON_WORDS = {
    "en": "the of and to is that was for with by from are this which were it",
    "de": "der die und das ist nicht mit dem den ein eine von wurde auf im zu",
    "fr": "les des est dans une pour qui sur pas plus avec sont cette aux du et",
    "es": "el los las una por con para del como más fue sus son pero y",
    "it": "il di che gli della per con una del sono alla nel è anche dei",
    "pt": "os um uma não com para por mais como dos foi são pelo ao das",
    "nl": "het een van de en dat niet zijn op met voor werd door ook aan",
    "sv": "och att det som en på är av för med den till inte var ett",
    "da": "og at det som en på er af for med den til ikke var et blev",
    "pl": "nie się na jest do że jak po przez był od za jego oraz w",
    "cs": "se na je že byl jako ale jeho pro při také nebo ve s byla",
    "fi": "ja on ei se että oli hän mutta joka myös kun sen ovat tai",
    "tr": "ve bir bu için ile olarak olan daha çok gibi sonra kadar ancak en",
}  # fmt: skip

_SCRIPTS = {
    "ja": "[\u3040-\u30ff]",
    "zh": "[\u4e00-\u9fff]",
    "ko": "[\uac00-\ud7af]",
    "ru": "[\u0400-\u04ff]",
    "el": "[\u0370-\u03ff]",
    "ar": "[\u0600-\u06ff]",
    "he": "[\u0590-\u05ff]",
    "hi": "[\u0900-\u097f]",
    "th": "[\u0e00-\u0e7f]",
}
_SHARED_SCRIPTS = {"ja": {"zh"}, "ru": {"uk", "bg", "sr", "be", "mk", "kk"}, "ar": {"fa", "ur"}, "hi": {"mr", "ne"}}
"""Languages that are written in another one's letters."""

MIN_WORDS = 30
"""Fewer words say nothing about a language."""


def other_language(text: str, language: str) -> str | None:
    """The language (ISO 639-1) that ``text`` is plainly in, if it is not ``language``; None where that is unclear.

    >>> other_language("Im Hafen der Stadt und auf dem Fluss ist das Boot nicht zu sehen. " * 5, "en")
    'de'
    >>> other_language("The ship in the harbour of the town is not to be seen from the river. " * 5, "en") is None
    True
    """
    letters = sum(character.isalpha() for character in text)
    for other, script in _SCRIPTS.items():
        # A third of the letters: kana make up about half of Japanese, and no Latin text has so many of another script.
        if len(re.findall(script, text)) * 3 > letters > MIN_WORDS:
            return None if language == other or language in _SHARED_SCRIPTS.get(other, ()) else other
    words = Counter(re.findall(r"[^\W\d_]+", text.lower()))
    if words.total() < MIN_WORDS:
        return None
    shares = {
        other: sum(words[word] for word in common.split()) / words.total() for other, common in _COMMON_WORDS.items()
    }
    likeliest = max(shares, key=shares.__getitem__)
    # One word in ten is common in running text of a language, and of its neighbours' words far fewer are.
    if likeliest == language or shares[likeliest] < 0.1 or shares[likeliest] < 1.5 * shares.get(language, 0.0):
        return None
    return likeliest
