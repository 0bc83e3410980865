"""A text in another language than the one that is set."""

from __future__ import annotations

from pathlib import Path

import pytest

from preceptor.data.articles.pairs import MIN_WORDS, other_language

TEXTS = {
    "en": "The harbour was built by the people of the town, and it is from this that they lived for a long time. ",
    "de": "Der Hafen wurde von den Leuten der Stadt gebaut, und sie lebten lange Zeit von dem, was er ihnen gab. ",
    "fr": "Le port a été construit par les gens de la ville, et ils ont vécu de ce qu'il leur donnait dans une baie. ",
    "es": "El puerto fue construido por la gente de la ciudad, y mucho tiempo los hombres vivieron con lo que daba. ",
    "nl": "De haven werd door de mensen van de stad gebouwd, en zij leefden niet lang van het geld dat daar op kwam. ",
    "ru": "Порт был построен жителями города, и они долго жили тем, что он им давал. ",
    "zh": "港口是由城裡的人建造的他們靠它生活了很長時間",
    "ja": "港は町の人々によって作られ、彼らは長い間それで暮らしていた。",
}  # fmt: skip


@pytest.mark.parametrize("language", TEXTS)
def test_a_language_is_told_from_the_others(language: str) -> None:
    text = TEXTS[language] * 8
    assert other_language(text, language) is None
    for other in TEXTS:
        if other != language and (language, other) != ("ja", "zh"):
            assert other_language(text, other) == language, other


def test_of_a_short_text_nothing_is_said() -> None:
    assert other_language(TEXTS["de"], "en") is None
    assert len(TEXTS["de"].split()) < MIN_WORDS


def test_real_articles_are_in_english(test_data: Path) -> None:
    seen = 0
    for path in sorted((test_data / "wiki" / "articles").glob("*.txt"))[:40]:
        assert other_language(path.read_text(encoding="utf-8"), "en") is None, path.name
        seen += 1
    assert seen == 40
