"""Paragraphs to sentences, with Wikimedia's splitter sentencex and a few repairs."""

from __future__ import annotations

import re

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
