"""Each form of markup by hand, and real pages against texts that somebody else extracted from them."""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from preceptor.data.articles.markup import (
    Block,
    article_text,
    document_title,
    html_blocks,
    markdown_blocks,
    plain_blocks,
    wikitext_blocks,
)
from preceptor.errors import DataError, MissingExtraError

MARKDOWN = """---
title: not this
---
# The Heron

The *grey* heron is a [long-legged](http://x.example/y) wader.[^1] It
eats `fish` ![photo](h.png) & frogs.

| a | b |
|---|---|
| 1 | 2 |

## Habits

- It stands still.
- standing

```python
code = "dropped"
```

> It nests in trees.

<div>raw</div>

[^1]: A footnote that is dropped.

## References

- A book. It is dropped.

### Subsection of references

Also dropped.

## Range

It lives in Europe.
"""

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
Let <math>n</math> be <math>\\frac{1}{2}</math> of it. See [http://x.example this page] or [http://bare.example].

== See also ==
* [[Egret]] is another.

== External links ==
* [http://y.example Site]. It is dropped.
{{Authority control}}
[[Category:Birds]]
[[de:Reiher]]
"""

HTML = """<!DOCTYPE html><html><head><title>The Heron - A Site</title><script>var x = "no";</script></head><body>
<nav><ul><li><a href="/">Home</a></li><li><a href="/b">Birds of the whole wide world.</a></li></ul></nav>
<article><h1>The Heron</h1>
<p>The grey heron is a long-legged wader that stands in shallow water.<sup class="reference">[1]</sup> It eats fish.</p>
<table><tr><td>Weight</td><td>1.5 kg and more in winter.</td></tr></table>
<h2>Habits<span class="mw-editsection">[edit]</span></h2>
<p>It stands still for a long time, and then strikes at great speed.[2] It nests in tall trees near the water.</p>
<p>In winter it may fly to the south, where the water does not freeze over.</p>
<ul><li>Some herons stay for the whole of the winter.</li><li>Heron in snow</li></ul>
<h2>References</h2><ol><li>Smith, A. Birds of Europe. Penguin.</li></ol>
</article><footer>Copyright 2020 by the people of the site.</footer></body></html>"""


def test_blocks_become_text() -> None:
    blocks = [
        Block("heading", "Title", 1),
        Block("paragraph", " It\u00a0is  old.[12][n 3] It is x\u200b[citation needed]. [1, 2] and a[7] stay or go. "),
        Block("item", "A caption"),
        Block("item", "It ends “well.”"),
        Block("heading", "Notes", 2),
        Block("paragraph", "Gone."),
        Block("heading", "Deeper", 3),
        Block("paragraph", "Gone too."),
        Block("heading", "Later [edit]", 2),
        Block("paragraph", "Kept."),
    ]
    assert article_text(blocks) == "It is old. It is x. [1, 2] and a stay or go.\n\nIt ends “well.”\n\n\nKept."
    assert document_title(blocks) == "Title"
    assert document_title(blocks[1:]) is None
    assert document_title([Block("heading", "Second level", 2)]) is None
    assert article_text([]) == ""


def test_plain() -> None:
    text = "First\nof one. Two = 2 == 2.\r\n\r\n== Head = ing ==\n - an item\n goes on.\n* other.\n=== S ===\nx.\n\ny."
    assert plain_blocks(text) == [
        Block("paragraph", "First of one. Two = 2 == 2."),
        Block("heading", "Head = ing", 2),
        Block("item", "an item goes on."),
        Block("item", "other."),
        Block("heading", "S", 3),
        Block("paragraph", "x."),
        Block("paragraph", "y."),
    ]


def test_markdown() -> None:
    blocks = markdown_blocks(MARKDOWN)
    assert document_title(blocks) == "The Heron"
    assert article_text(blocks) == (
        "The grey heron is a long-legged wader. It eats fish & frogs.\n\n\n"
        "It stands still.\n\nIt nests in trees.\n\n\n"
        "It lives in Europe."
    )


def test_wikitext() -> None:
    assert article_text(wikitext_blocks(WIKITEXT)) == (
        "Herons (Ardea) are birds 84 to 102 cm tall. They weigh about 1.5 kg and live long. "
        "They drink H2O — daily, too.\n\n\n"
        "They stand still.\n\n"
        "Let n be of it. See this page or."
    )


def test_wikitext_with_a_broken_reference() -> None:
    text = "It is old.<ref>He said ''no.</ref> It is large.<ref name='x/y'>{{cite|a}}</ref> It stays."
    assert article_text(wikitext_blocks(text)) == "It is old. It is large. It stays."


def test_html() -> None:
    blocks = html_blocks(HTML)
    assert document_title(blocks) == "The Heron"
    assert article_text(blocks) == (
        "The grey heron is a long-legged wader that stands in shallow water. It eats fish.\n\n\n"
        "It stands still for a long time, and then strikes at great speed. It nests in tall trees near the water.\n\n"
        "In winter it may fly to the south, where the water does not freeze over.\n\n"
        "Some herons stay for the whole of the winter."
    )


def test_html_without_text() -> None:
    with pytest.raises(DataError, match="no main text"):
        html_blocks("<html><body></body></html>")


@pytest.mark.parametrize(
    ("read", "package"), [(html_blocks, "trafilatura"), (wikitext_blocks, "mwparserfromhell")], ids=["html", "wikitext"]
)
def test_missing_extra_names_the_command(monkeypatch: pytest.MonkeyPatch, read: object, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'preceptor[web]'")):
        read("<p>x</p>")  # type: ignore[operator]


def test_saved_wikipedia_page(test_data: Path) -> None:
    blocks = html_blocks((test_data / "mediawiki" / "wikipedia-2_source.html").read_text(encoding="utf-8"))
    text = article_text(blocks)
    assert document_title(blocks) == "New Zealand"
    assert text.startswith("New Zealand (Māori: Aotearoa [aɔˈtɛaɾɔa]) is a sovereign island country")
    assert text.endswith("it is still used for formal occasions such as tangihanga.")
    assert 50_000 < len(text) < 55_000
    assert not re.search(r"\[(\d+|edit|update|n \d+)\]", text)
    for chrome in ("Coordinates", "Jump to", "From Wikipedia", "ISBN", "Retrieved", "Calling code", "External links"):
        assert chrome not in text, chrome
    # Headings are no paragraphs, and each begins a section.
    for heading in ("Etymology", "Foreign relations and military", "Biodiversity", "See also"):
        assert heading not in re.split(r"\n\n+", text)
    assert text.count("\n\n\n") > 15


def test_real_wikitext_against_the_published_plain_text(test_data: Path) -> None:
    """The words of each article, counted, against another extractor's: what is missing, and what is too much."""
    paths = sorted((test_data / "wiki" / "wikitext").glob("*.wiki"))
    for path in paths:
        ours = article_text(wikitext_blocks(path.read_text(encoding="utf-8")))
        full = (test_data / "wiki" / "full" / f"{path.stem}.txt").read_text(encoding="utf-8")
        theirs = article_text(plain_blocks(full))
        our_words, their_words = (Counter(re.findall(r"\w+", text)) for text in (ours, theirs))
        shared = (our_words & their_words).total()
        assert shared >= 0.995 * their_words.total(), path.name  # measured: 0.9964 and more
        # We also keep quotations, formulas and list items that are sentences; measured: 0.870 and more.
        assert shared >= 0.85 * our_words.total(), path.name
        assert not re.search(r"\{\{|\}\}|\[\[|\]\]|</?ref|'''|\bthumb\b|Category:", ours), path.name
    assert len(paths) == 12
