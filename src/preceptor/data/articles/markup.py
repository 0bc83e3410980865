"""Markup to plain text: Markdown, HTML, wikitext and plain text with ``== headings ==`` become the text of an article.

Every reader yields a list of `Block`; `article_text` then joins the blocks into the one form that the rest of the
library reads: **paragraphs separated by one blank line, sections by two**, without headings, tables, references,
navigation or citation marks. A heading therefore never becomes a sentence, and a reader of the text still sees where a
section ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from xml.etree import ElementTree

from preceptor.errors import DataError, MissingExtraError

if TYPE_CHECKING:
    from markdown_it.token import Token

SECTION_BREAK = "\n\n\n"
PARAGRAPH_BREAK = "\n\n"

# Sections that list sources or links instead of telling something; they and their subsections are left out.
BACK_MATTER = frozenset(
    {
        "bibliography", "citations", "external links", "footnotes", "further reading", "general references",
        "notes", "notes and references", "references", "references and notes", "see also", "sources", "works cited",
    }
)  # fmt: skip

_WIKI_HEADING = re.compile(r"(={1,6})\s*(.*?\S)\s*\1")
_BULLET = re.compile(r"[*•‣-]\s+|\*\Z")
_INVISIBLE = re.compile("[\u00ad\u200b\u200e\u200f\u2060\ufeff]")
# Only a bracket that touches what it annotates is a mark: "old.[1]", "2018[update]", never "the list [1, 2]".
_CITATION_MARK = re.compile(
    r"(?<=\S)\[(?:\d{1,3}|(?:n|nb|note|notes|fn|lower-alpha) ?\d+|edit|update|clarification needed|"
    r"(?:better source|citation|full citation|page|quotation|verification) needed|dubious[^\]]*|who\?|when\?|which\?)\]"
)
_SENTENCE_END = re.compile(r"[.!?…。！？][\"'”’)\]»]*\Z")


@dataclass(frozen=True)
class Block:
    """One piece of a document, in reading order; the ``level`` of a heading counts from 1 (outermost)."""

    kind: Literal["heading", "paragraph", "item"]
    text: str
    level: int = 0


def article_text(blocks: Iterable[Block]) -> str:
    """The running text of ``blocks``: paragraphs separated by one blank line, sections by two, headings left out.

    Left out as well: sections named in `BACK_MATTER` down to the next heading of their level, and list items that do
    not end like a sentence (captions, links, names).

    >>> article_text([Block("paragraph", "It rains.[1]"), Block("heading", "References", 2), Block("item", "A book.")])
    'It rains.'
    """
    sections: list[list[str]] = [[]]
    back_matter_level: int | None = None
    for block in blocks:
        text = _clean(block.text)
        if block.kind == "heading":
            if back_matter_level is None or block.level <= back_matter_level:
                back_matter_level = block.level if text.casefold().strip(" :") in BACK_MATTER else None
            sections.append([])
        elif text and back_matter_level is None and (block.kind == "paragraph" or _SENTENCE_END.search(text)):
            sections[-1].append(text)
    return SECTION_BREAK.join(PARAGRAPH_BREAK.join(paragraphs) for paragraphs in sections if paragraphs)


def document_title(blocks: list[Block]) -> str | None:
    """The text of the first block if that is a heading of the outermost level, else ``None``."""
    if blocks and blocks[0].kind == "heading" and blocks[0].level == 1:
        return _clean(blocks[0].text) or None
    return None


def plain_blocks(text: str) -> list[Block]:
    """Blocks of plain text: a blank line ends a paragraph, ``== X ==`` is a heading, ``- x`` and ``* x`` are items.

    A single line break is a space, so that hard-wrapped text keeps its sentences whole.
    """
    blocks: list[Block] = []
    lines: list[str] = []
    kind: Literal["paragraph", "item"] = "paragraph"

    def flush() -> None:
        if lines:
            blocks.append(Block(kind, " ".join(lines)))
            lines.clear()

    for line in map(str.strip, text.splitlines()):
        if heading := _WIKI_HEADING.fullmatch(line):
            flush()
            blocks.append(Block("heading", heading[2], len(heading[1])))
        elif bullet := _BULLET.match(line):
            flush()
            kind = "item"
            lines.append(line[bullet.end() :])
        elif line:
            kind = kind if lines else "paragraph"
            lines.append(line)
        else:
            flush()
    flush()
    return blocks


def markdown_blocks(source: str) -> list[Block]:
    """Blocks of CommonMark text; tables, code blocks, raw HTML, images, footnotes and front matter are left out."""
    from markdown_it import MarkdownIt

    source = re.sub(r"\A---\n.*?\n---\n", "", source.replace("\r\n", "\n"), flags=re.DOTALL)
    blocks: list[Block] = []
    list_depth = 0
    in_table = False
    heading_level = 0
    for token in MarkdownIt("commonmark").enable("table").parse(source):
        match token.type:
            case "bullet_list_open" | "ordered_list_open":
                list_depth += 1
            case "bullet_list_close" | "ordered_list_close":
                list_depth -= 1
            case "table_open" | "table_close":
                in_table = token.type == "table_open"
            case "heading_open":
                heading_level = int(token.tag[1])
            case "inline" if not in_table and not token.content.startswith("[^"):
                text = re.sub(r"\[\^[^\]\s]+\]", "", _inline_text(token.children or []))
                if heading_level:
                    blocks.append(Block("heading", text, heading_level))
                    heading_level = 0
                else:
                    blocks.append(Block("item" if list_depth else "paragraph", text))
    return blocks


def _inline_text(tokens: list[Token]) -> str:
    """What a reader sees of a line of Markdown: text and code, no images and no raw HTML."""
    breaks = {"softbreak": " ", "hardbreak": " "}
    return "".join(
        token.content if token.type in {"text", "code_inline"} else breaks.get(token.type, "") for token in tokens
    )


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
    if title and document_title(blocks) is None:
        blocks.insert(0, Block("heading", title, 1))
    return blocks


def _xml_blocks(parent: ElementTree.Element | None) -> Iterator[Block]:
    """Blocks of trafilatura's XML: ``head``, ``p``, ``quote``, and ``list`` of ``item``."""
    for element in parent if parent is not None else ():
        match element.tag:
            case "head":
                yield Block("heading", "".join(element.itertext()), int(element.get("rend", "h2")[1:]))
            case "p":
                yield Block("paragraph", "".join(element.itertext()))
            case "item" if element.find(".//item") is None:
                yield Block("item", "".join(element.itertext()))
            case "quote" if element.find("p") is None:
                yield Block("paragraph", "".join(element.itertext()))
            case "list" | "quote" | "item":
                yield from _xml_blocks(element)


def wikitext_blocks(source: str) -> list[Block]:
    """Blocks of MediaWiki markup (mwparserfromhell): running text with its headings and lists.

    Left out: templates (but for the few of `_template_text` that stand for words of the sentence), references, tables,
    galleries, files, categories, comments and link targets.

    Raises:
        MissingExtraError: the extra ``web`` is not installed.
    """
    try:
        import mwparserfromhell
    except ImportError as error:
        raise MissingExtraError("reading wikitext", package="mwparserfromhell", extra="web") from error

    # References go first: an unbalanced quote inside one would make the parser take the tag for text.
    source = _REFERENCE.sub("", source)
    text = _wiki_text(mwparserfromhell.parse(source))
    text = re.sub(r"__[A-Z]+__|'{2,}", "", text)
    # What a dropped template leaves behind: "(; born 1900)", "()", "word ,".
    text = re.sub(r"\([\s,;:]+", "(", text)
    text = re.sub(r"[ \t]?\([\s,;:]*\)", "", text)
    text = re.sub(r"(?<![ \t])[ \t]+(?=[,;:!?)]|\.(?![.\d]))", "", text)
    return plain_blocks(text)


_REFERENCE = re.compile(
    r"<ref\b[^<>]*/>|<ref\b[^<>]*>[^<]*(?:<(?!/?ref\b)[^<]*)*</ref\s*>|</?ref\b[^<>]*>?", re.IGNORECASE
)
_DROPPED_TAGS = frozenset(
    {
        "gallery",
        "imagemap",
        "ref",
        "references",
        "score",
        "source",
        "syntaxhighlight",
        "table",
        "templatestyles",
        "timeline",
    }
)
_HIDDEN_NAMESPACES = frozenset({"category", "file", "image", "media"})


def _wiki_text(code: Any) -> str:
    """Visible text of parsed wikitext; headings stay ``== X ==`` lines and items ``* x`` lines, as in plain text."""
    return "".join(_wiki_node_text(node) for node in code.nodes) if code is not None else ""


def _wiki_node_text(node: Any) -> str:
    # Dispatch by class name: the classes can only be imported where the extra is installed.
    match type(node).__name__:
        case "Text":
            return str(node.value)
        case "HTMLEntity":
            return str(node.normalize())
        case "Heading":
            marks = "=" * node.level
            return f"\n\n{marks} {_wiki_text(node.title).strip()} {marks}\n\n"
        case "Wikilink":
            namespace, colon, _ = str(node.title).partition(":")
            if colon and namespace.strip().casefold() in _HIDDEN_NAMESPACES:
                return ""
            if colon and node.text is None and re.fullmatch(r"[a-z]{2,3}(-[a-z]+)*", namespace):
                return ""  # a link to the article in another language
            return _wiki_text(node.title if node.text is None else node.text)
        case "ExternalLink":
            return _wiki_text(node.title)
        case "Template":
            return _template_text(node)
        case "Tag":
            return _tag_text(node)
        case _:
            return ""  # comments and template arguments


def _tag_text(node: Any) -> str:
    name = str(node.tag).strip().casefold()
    if name in _DROPPED_TAGS:
        return ""
    match name:
        case "br":
            return " "
        case "math" | "chem":
            return readable_formula(str(node.contents))
        case "hr" | "dt" | "dd":
            return "\n\n" + _wiki_text(node.contents)
        case "li":
            return "\n* " + _wiki_text(node.contents)
        case "p" | "div" | "blockquote" | "ul" | "ol":
            return f"\n\n{_wiki_text(node.contents)}\n\n"
        case _:
            return _wiki_text(node.contents)


def _template_text(node: Any) -> str:
    """The words that a template puts into a sentence, for those that English Wikipedia's prose cannot do without."""
    name = str(node.name).strip().casefold()
    arguments = [_wiki_text(parameter.value).strip() for parameter in node.params if not parameter.showkey]
    match name, arguments:
        case (("convert" | "cvt"), [low, ("to" | "and" | "or" | "by" | "x" | "-" | "–") as joint, high, unit, *_]):
            return f"{low}–{high} {unit}" if joint in {"-", "–"} else f"{low} {joint} {high} {unit}"
        case (("convert" | "cvt"), [amount, unit, *_]):
            return f"{amount} {unit}"
        case (("as of"), [year, *_]):
            return f"As of {year}"
        case (("c." | "ca." | "circa"), [year, *_]):
            return f"c. {year}"
        case (("chem" | "chem2"), parts):
            return "".join(parts)
        case (("angbr"), [text, *_]):
            return f"⟨{text}⟩"
        case (("lang" | "script"), [_, text, *_]):
            return text
        case (("transl" | "transliteration"), [*_, text]):
            return text
        case (("big" | "keypress" | "nihongo" | "nobold" | "nowrap" | "sic" | "small"), [text, *_]):
            return text
        case (("quote" | "blockquote"), [text, *_]):
            return f"\n\n{text}\n\n"
        case (("mdash" | "mdashb" | "snd" | "spaced ndash" | "ndash"), _):
            return " – "
        case _:
            return ""


def readable_formula(tex: str) -> str:
    """``tex`` without its outer spaces if it reads as text (``n``, ``x^2``), else ``""``."""
    return "" if re.search(r"[\\{}\n]", tex.strip()) else tex.strip()


def _clean(text: str) -> str:
    """``text`` on one line, without citation marks, edit links and invisible characters."""
    return _CITATION_MARK.sub("", " ".join(_INVISIBLE.sub("", text).split()).replace(" [edit]", ""))
