"""Markup to plain text: Markdown and plain text with ``== headings ==`` become the text of an article.

Every reader (those of HTML and wikitext are in `html` and `wikitext`) yields a list of `Block`; `article_text` then
joins the blocks into the one form that the rest of the library reads: **paragraphs separated by one blank line,
sections by two**, without headings, tables, references, navigation or citation marks. A heading therefore never becomes
a sentence, and a reader of the text still sees where a section ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from preceptor.data.articles.pairs import split_sentences

if TYPE_CHECKING:
    from markdown_it.token import Token

SECTION_BREAK = "\n\n\n"
PARAGRAPH_BREAK = "\n\n"
HOLE = "\ufdd0"  # stands for words that could not be read, such as a formula; a noncharacter, so no text has its own

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

    Left out as well: sections named in `BACK_MATTER` down to the next heading of their level, list items that do not
    end like a sentence (captions, links, names), and sentences with a `HOLE`, which would read "If is even".

    >>> article_text([Block("paragraph", "It rains.[1]"), Block("heading", "References", 2), Block("item", "A book.")])
    'It rains.'
    """
    sections: list[list[str]] = [[]]
    back_matter_level: int | None = None
    for block in blocks:
        # A citation mark at the end of a sentence would hide its full stop from the splitter, so it goes first.
        text = _clean(block.text)
        if HOLE in text and block.kind != "heading":
            text = " ".join(sentence for sentence in split_sentences(text) if HOLE not in sentence)
        if block.kind == "heading":
            # A heading ends the back matter unless it lies deeper: subsections of "References" are left out with it.
            if back_matter_level is None or block.level <= back_matter_level:
                back_matter_level = block.level if text.casefold().strip(" :") in BACK_MATTER else None
            sections.append([])
        elif text and back_matter_level is None and (block.kind == "paragraph" or _SENTENCE_END.search(text)):
            sections[-1].append(text)
    return SECTION_BREAK.join(PARAGRAPH_BREAK.join(paragraphs) for paragraphs in sections if paragraphs)


def document_title(blocks: list[Block]) -> str | None:
    """The text of the first block if that is a heading of the outermost level, else ``None``."""
    if blocks and blocks[0].kind == "heading" and blocks[0].level == 1:
        return _clean(blocks[0].text.replace(HOLE, "")) or None
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

    # A small state machine: lines gather until a blank line, a heading or a bullet ends the block.
    for line in map(str.strip, text.splitlines()):
        if heading := _WIKI_HEADING.fullmatch(line):
            flush()
            blocks.append(Block("heading", heading[2], len(heading[1])))
        elif bullet := _BULLET.match(line):
            flush()
            kind = "item"
            lines.append(line[bullet.end() :])
        elif line:
            # A line under a bullet continues the item; after a blank line it is a paragraph again.
            kind = kind if lines else "paragraph"
            lines.append(line)
        else:
            flush()
    flush()
    return blocks


def markdown_blocks(source: str) -> list[Block]:
    """Blocks of CommonMark text; tables, code blocks, raw HTML, images, footnotes and front matter are left out."""
    from markdown_it import MarkdownIt

    # YAML front matter between --- lines, as static site generators write it.
    source = re.sub(r"\A---\n.*?\n---\n", "", source.replace("\r\n", "\n"), flags=re.DOTALL)
    blocks: list[Block] = []
    list_depth = 0
    in_table = False
    heading_level = 0
    # Block tokens open and close around `inline` ones, which carry the text; tables are parsed to be left out.
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
                # Footnote marks, which CommonMark does not know and would show as text.
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


def readable_formula(tex: str) -> str:
    r"""``tex`` if it reads as text (``n``, ``x^2``), without ``{\displaystyle …}`` and outer spaces; else a `HOLE`."""
    tex = re.sub(r"^\{\\displaystyle(.*)\}$", r"\1", tex.strip(), flags=re.DOTALL).strip()
    # Other TeX commands cannot be read as words, so the sentence is given up (see `article_text`).
    return HOLE if not tex or re.search(r"[\\{}\n]", tex) else tex


def _clean(text: str) -> str:
    """``text`` on one line, without citation marks, edit links and invisible characters."""
    return _CITATION_MARK.sub("", " ".join(_INVISIBLE.sub("", text).split()).replace(" [edit]", ""))
