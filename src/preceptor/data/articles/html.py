"""HTML to the blocks of an article, with trafilatura."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal
from xml.etree import ElementTree

from preceptor.data.articles.markup import Block, document_title, readable_formula
from preceptor.errors import DataError, MissingExtraError

# Trafilatura writes MathML as the TeX of its annotation between \( and \).
_FORMULA = re.compile(r"\\\((.*?)\\\)", re.DOTALL)
_BLOCKS = frozenset({"head", "item", "list", "p", "quote"})


def html_blocks(source: str) -> list[Block]:
    """Blocks of the main text of an HTML page (trafilatura); the page's title, if it has one, comes first as a heading.

    Raises:
        MissingExtraError: the extra ``web`` is not installed.
        DataError: no main text is found.
    """
    try:
        import trafilatura
    except ImportError as error:
        raise MissingExtraError("reading HTML", package="trafilatura", extra="web") from error

    # MediaWiki hides its citation marks and edit links in <sup class="reference"> and <span class="mw-editsection">.
    chrome = [
        "//sup[contains(@class, 'reference')]",
        "//*[contains(@class, 'mw-editsection')]",
        "//*[@id='coordinates']",
    ]
    extracted = trafilatura.extract(
        source,
        output_format="xml",
        with_metadata=True,
        include_comments=False,
        include_tables=False,
        include_images=False,
        include_links=False,
        prune_xpath=chrome,
    )
    if not extracted:
        raise DataError(
            "the HTML page has no main text; save the text of the article as .txt or .md and pass that file"
        )
    root = ElementTree.fromstring(extracted)
    blocks = list(_xml_blocks(root.find("main")))
    title = root.get("title")
    # A page may repeat its title as a heading; it is then not put in front once more.
    if title and document_title(blocks) is None:
        blocks.insert(0, Block("heading", title, 1))
    return blocks


def _xml_blocks(parent: ElementTree.Element | None) -> Iterator[Block]:
    """Blocks of trafilatura's XML: ``head``, ``p``, ``quote``, and ``list`` of ``item``, which nest."""
    for element in parent if parent is not None else ():
        match element.tag:
            case "head":
                yield Block("heading", _text(element), int(element.get("rend", "h2")[1:]))
            case "p":
                yield Block("paragraph", _text(element))
            case "item" | "quote":
                # What stands beside nested lists and paragraphs comes first, then they do.
                kind: Literal["item", "paragraph"] = "item" if element.tag == "item" else "paragraph"
                yield Block(kind, _text(element))
                yield from _xml_blocks(element)
            case "list":
                yield from _xml_blocks(element)


def _text(element: ElementTree.Element) -> str:
    """The text of ``element`` without that of the blocks inside it; a line break is a space."""
    return _FORMULA.sub(lambda found: readable_formula(found[1]), "".join(_pieces(element)))


def _pieces(element: ElementTree.Element) -> Iterator[str]:
    yield element.text or ""
    for child in element:
        yield from (" ",) if child.tag in _BLOCKS or child.tag == "lb" else _pieces(child)
        yield child.tail or ""
