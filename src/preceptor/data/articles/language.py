"""Noticing that a text is in another language than its sentences are split for."""

from __future__ import annotations

import re
from collections import Counter

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
