"""HTML by hand, and a real page with what surrounds its article."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from preceptor.data.articles.html import html_blocks
from preceptor.data.articles.markup import article_text, document_title
from preceptor.errors import DataError, MissingExtraError

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

FILLER = "<p>The lighthouse stands on the northern cliff of the island. Its lamp is lit each evening at dusk.</p>" * 4


def text_of(body: str) -> list[str]:
    """The paragraphs of a page with ``body`` amid enough text that it is taken for an article, without that text."""
    page = f"<html><body><article><h1>Island</h1>{FILLER}{body}{FILLER}</article></body></html>"
    text = article_text(html_blocks(page))
    return [paragraph for paragraph in re.split(r"\n\n+", text) if not paragraph.startswith("The lighthouse")]


def test_html() -> None:
    blocks = html_blocks(HTML)
    assert document_title(blocks) == "The Heron"
    assert article_text(blocks) == (
        "The grey heron is a long-legged wader that stands in shallow water. It eats fish.\n\n\n"
        "It stands still for a long time, and then strikes at great speed. It nests in tall trees near the water.\n\n"
        "In winter it may fly to the south, where the water does not freeze over.\n\n"
        "Some herons stay for the whole of the winter."
    )


def test_the_title_of_the_page_stands_in_for_a_heading_that_it_lacks() -> None:
    page = f"<html><head><title>The Island</title></head><body><article>{FILLER}{FILLER}</article></body></html>"
    blocks = html_blocks(page)
    assert document_title(blocks) == "The Island"
    assert blocks[0].kind == "heading"


def test_html_without_text() -> None:
    with pytest.raises(DataError, match="no main text"):
        html_blocks("<html><body></body></html>")


def test_a_line_break_is_a_space() -> None:
    assert text_of("<p>Rain fell on Monday.<br>Snow fell on Tuesday,<br/>and hail on <b>Friday<br>night</b>.</p>") == [
        "Rain fell on Monday. Snow fell on Tuesday, and hail on Friday night."
    ]


def test_an_item_comes_before_the_items_inside_it() -> None:
    body = (
        "<ol><li>Gulls nest on the cliff.<ul><li>Herring gulls nest at the top.<ul><li>They are loud.</li></ul></li>"
        "<li>Terns nest below.</li></ul>All of them leave in winter.</li><li>Seals rest on the beach.</li></ol>"
    )
    assert text_of(body) == [
        "Gulls nest on the cliff. All of them leave in winter.",
        "Herring gulls nest at the top.",
        "They are loud.",
        "Terns nest below.",
        "Seals rest on the beach.",
    ]


def test_a_formula_reads_as_text_or_takes_its_sentence_along() -> None:
    def formula(tex: str) -> str:
        return (
            '<span class="mwe-math-element"><math xmlns="http://www.w3.org/1998/Math/MathML"><semantics><mrow><mi>a</mi>'
            f'</mrow><annotation encoding="application/x-tex">{tex}</annotation></semantics></math></span>'
        )

    height, area = formula("{\\displaystyle h=9}"), formula("{\\frac 12}h")
    assert text_of(f"<p>Its height is {height} here. Its area is {area}. It is old.</p>") == [
        "Its height is h=9 here. It is old."
    ]
    assert text_of("<p>The width \\(w\\) is known to everybody. The depth is not.</p>") == [
        "The width w is known to everybody. The depth is not."
    ]


def test_missing_extra_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trafilatura", None)
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'preceptor[web]'")):
        html_blocks("<p>x</p>")


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
