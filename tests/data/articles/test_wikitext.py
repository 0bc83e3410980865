"""Wikitext by hand, and real articles against texts that somebody else extracted from them."""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from preceptor.data.articles.markup import HOLE, article_text, plain_blocks
from preceptor.data.articles.wikitext import wikitext_blocks
from preceptor.errors import MissingExtraError

WIKITEXT = """{{Infobox bird | name = Heron {{nested|x}} }}
[[File:Heron.jpg|thumb|A [[heron]] by day]]
'''Herons''' ({{IPA|x}}; {{lang|la|Ardea}}) are [[bird|birds]] {{convert|84|to|102|cm}} tall.<ref name="a">{{cite
book|title=B}}</ref>
They weigh ''about'' {{convert|1.5|kg|lb}} and {{nowrap|live long}}.<ref name="a" /><!-- no -->
They drink H<sub>2</sub>O&nbsp;&mdash; daily , too.

== Habits ==
* They stand still.
* [[Standing]]
{| class="wikitable"
! head
|-
| cell
|}
Let <math>n</math> be odd. Let <math>n</math> be <math>\\frac{1}{2}</math> of it. See [http://x.example this page] or [http://bare.example].

== See also ==
* [[Egret]] is another.

== External links ==
* [http://y.example Site]. It is dropped.
{{Authority control}}
[[Category:Birds]]
[[de:Reiher]]
"""


def test_wikitext() -> None:
    assert article_text(wikitext_blocks(WIKITEXT)) == (
        "Herons (Ardea) are birds 84 to 102 cm tall. They weigh about 1.5 kg and live long. "
        "They drink H2O — daily, too.\n\n\n"
        "They stand still.\n\n"
        "Let n be odd. See this page or."
    )


def test_wikitext_with_a_broken_reference() -> None:
    text = "It is old.<ref>He said ''no.</ref> It is large.<ref name='x/y'>{{cite|a}}</ref> It stays."
    assert article_text(wikitext_blocks(text)) == "It is old. It is large. It stays."


@pytest.mark.parametrize(
    ("sentence", "shown"),
    [
        (
            "The tower is {{frac|1|3}} as high, or {{fraction|2|1|4}} of it.",
            "The tower is 1/3 as high, or 2 1/4 of it.",
        ),
        ("A {{frac|2}} is left.", "A 1/2 is left."),
        (
            "It flew the flag of the {{abbr|RAF|Royal Air Force}} in {{circa|1920}}.",
            "It flew the flag of the RAF in c. 1920.",
        ),
        ("It was built {{c.|1650|1660}} in stone.", "It was built c. 1650 – c. 1660 in stone."),
        ("The owner {{ill|Ada Rook|fr|Ada Rook}} sold it.", "The owner Ada Rook sold it."),
        ("It was {{Interlanguage_link|Bo Lind|sv}} who built it.", "It was Bo Lind who built it."),
        ("Where {{mvar|k}} is odd, {{math|''k''<sup>3</sup>}} is odd.", "Where k is odd, k3 is odd."),
        ("{{lang-de|Turm}} is its name.", "Turm is its name."),
        ("It has {{formatnum:1200}} steps.", "It has 1200 steps."),
        ("It is old.{{citation needed|date=May 2020}} It is high{{sfn|Rook|1990}}.", "It is old. It is high."),
        # What is not known is not guessed: its sentence goes, the others stay.
        ("It is old. It has {{unheard of|9}} floors. It is high.", "It is old. It is high."),
        ("{{Unheard of box|a=b}}\nIt is old.", "It is old."),
        ("{{Unheard of box\n|a=b\n}} It is old.", "It is old."),
    ],
)
def test_a_template_shows_what_mediawiki_shows_or_takes_its_sentence_along(sentence: str, shown: str) -> None:
    assert article_text(wikitext_blocks(sentence)) == shown


def test_missing_extra_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mwparserfromhell", None)
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'preceptor[web]'")):
        wikitext_blocks("<p>x</p>")


def test_real_wikitext_against_the_published_plain_text(test_data: Path) -> None:
    """The words of each article, counted, against another extractor's: what is missing, and what is too much."""
    paths = sorted((test_data / "wiki" / "wikitext").glob("*.wiki"))
    for path in paths:
        blocks = wikitext_blocks(path.read_text(encoding="utf-8"))
        ours = article_text(replace(block, text=block.text.replace(HOLE, " ")) for block in blocks)
        full = (test_data / "wiki" / "full" / f"{path.stem}.txt").read_text(encoding="utf-8")
        theirs = article_text(plain_blocks(full))
        our_words, their_words = (Counter(re.findall(r"\w+", text)) for text in (ours, theirs))
        shared = (our_words & their_words).total()
        assert shared >= 0.995 * their_words.total(), path.name  # measured: 0.9964 and more
        # We also keep quotations, formulas and list items that are sentences; measured: 0.870 and more.
        assert shared >= 0.85 * our_words.total(), path.name
        # Sentences that a template left a hole in are few; measured: 1.3 % and less.
        kept = Counter(re.findall(r"\w+", article_text(blocks)))
        assert (kept & our_words).total() >= 0.98 * our_words.total(), path.name
        assert not re.search(r"\{\{|\}\}|\[\[|\]\]|</?ref|'''|\bthumb\b|Category:", ours), path.name
    assert len(paths) == 12
