"""MediaWiki markup to the blocks of an article, with mwparserfromhell."""

from __future__ import annotations

import re
from typing import Any

from preceptor.data.articles.markup import HOLE, Block, plain_blocks, readable_formula
from preceptor.errors import MissingExtraError

_REFERENCE = re.compile(
    r"<ref\b[^<>]*/>|<ref\b[^<>]*>[^<]*(?:<(?!/?ref\b)[^<]*)*</ref\s*>|</?ref\b[^<>]*>?", re.IGNORECASE
)
# Shown by MediaWiki, but no running text; what shows nothing at all is known to mwparserfromhell.
_DROPPED_TAGS = frozenset({"ref", "references", "source", "syntaxhighlight", "table", "templatestyles"})
_HIDDEN_NAMESPACES = frozenset({"category", "file", "image", "media"})
# Templates that put no words into the sentence in which they stand: sources, remarks of editors, pronunciations,
# anchors. A template on lines of its own needs no mention here.
_SILENT = re.compile(
    r"cit(e|ation|ar)\b.*|r|rp|ref\w*|sfn\w*|efn\w*|harv\w*|notetag|note( label)?|google books|wikicite|wayback|"
    r"webarchive|dead link|subscription required|.* needed( .*)?|(failed |not )?verif\w*( .*)?|dubious|clarify|vague|"
    r"who|when|where|which|whom|by whom|how|why|according to whom|weasel inline|ipac?\b.*|pron\w*|respell|audio|listen|"
    r"anchor|coord|use \w+ (dates|english)|engvar\w*|short description|pp-.*|infobox\b.*|clear\w*|-|defaultsort.*|"
    r"\w+ article|hatnote|main|see also|further|legend|bar (box|percent)|s-\w+"
)
# Templates that show their first argument as it is.
_SHOWN = frozenset(
    {
        "abbr", "big", "em", "ill", "interlanguage link", "keypress", "math", "mvar", "nihongo", "nobold", "nobr",
        "nobreak", "nowrap", "nq", "resize", "sic", "small", "smallcaps", "strong", "sub", "sup", "tooltip", "val",
        "var", "visible anchor",
    }
)  # fmt: skip


def wikitext_blocks(source: str) -> list[Block]:
    """Blocks of MediaWiki markup: running text with its headings and lists.

    Left out: references, tables, galleries, files, categories, comments, link targets, and templates. Of the templates
    that stand for words of a sentence, those that prose cannot do without are read (`_template_text`); any other in a
    line of text leaves a hole, and `markup.article_text` then leaves its sentence out.

    Raises:
        MissingExtraError: the extra ``web`` is not installed.
    """
    try:
        import mwparserfromhell
    except ImportError as error:
        raise MissingExtraError("reading wikitext", package="mwparserfromhell", extra="web") from error

    # References go first: an unbalanced quote inside one would make the parser take the tag for text.
    # Two passes: the parser's tree to text with holes, then repairs of that text.
    text = _text(mwparserfromhell.parse(_REFERENCE.sub("", source)))
    text = re.sub(r"__[A-Z]+__|'{2,}", "", text)
    # A line of nothing but templates is a box or a note, no sentence.
    text = re.sub(rf"^[\s*:#;,.|]*{HOLE}[\s*:#;,.|{HOLE}]*$", "", text, flags=re.MULTILINE)
    # What a dropped template leaves behind: "(; born 1900)", "()", "word ,".
    text = re.sub(r"\([\s,;:]+", "(", text)
    text = re.sub(r"[ \t]?\([\s,;:]*\)", "", text)
    text = re.sub(r"(?<![ \t])[ \t]+(?=[,;:!?)]|\.(?![.\d]))", "", text)
    return plain_blocks(text)


def _text(code: Any) -> str:
    """Visible text of parsed wikitext; headings stay ``== X ==`` lines and items ``* x`` lines, as in plain text."""
    return "".join(_node_text(node) for node in code.nodes) if code is not None else ""


def _node_text(node: Any) -> str:
    # Dispatch by class name: the classes can only be imported where the extra is installed.
    match type(node).__name__:
        case "Text":
            return str(node.value)
        case "HTMLEntity":
            return str(node.normalize())
        case "Heading":
            marks = "=" * node.level
            return f"\n\n{marks} {_text(node.title).strip()} {marks}\n\n"
        case "Wikilink":
            namespace, colon, _ = str(node.title).partition(":")
            if colon and namespace.strip().casefold() in _HIDDEN_NAMESPACES:
                return ""
            if colon and node.text is None and re.fullmatch(r"[a-z]{2,3}(-[a-z]+)*", namespace):
                return ""  # a link to the article in another language
            return _text(node.title if node.text is None else node.text)
        case "ExternalLink":
            return _text(node.title)
        case "Template":
            return _template_text(node)
        case "Tag":
            return _tag_text(node)
        case _:
            return ""  # comments and template arguments


def _tag_text(node: Any) -> str:
    from mwparserfromhell.definitions import is_visible

    match str(node.tag).strip().casefold():
        case "math" | "chem" | "ce":
            return readable_formula(str(node.contents))
        case name if name in _DROPPED_TAGS or not is_visible(name):
            return ""
        case "br":
            return " "
        case "hr" | "dt" | "dd":
            return "\n\n" + _text(node.contents)
        case "li":
            return "\n* " + _text(node.contents)
        case "p" | "div" | "blockquote" | "ul" | "ol":
            return f"\n\n{_text(node.contents)}\n\n"
        case _:
            return _text(node.contents)


def _template_text(node: Any) -> str:
    """The words that a template puts into a sentence, a `HOLE` for words that are not known."""
    name = " ".join(str(node.name).replace("_", " ").split()).casefold()
    arguments = [_text(parameter.value).strip() for parameter in node.params if not parameter.showkey]
    # Named templates first, then those that show their first argument, then what is silent; all else leaves a hole,
    # which costs a sentence and never invents one.
    match name, arguments:
        case (("convert" | "cvt"), [low, ("to" | "and" | "or" | "by" | "x" | "-" | "–") as joint, high, unit, *_]):
            return f"{low}–{high} {unit}" if joint in {"-", "–"} else f"{low} {joint} {high} {unit}"
        case (("convert" | "cvt"), [amount, unit, *_]):
            return f"{amount} {unit}"
        case ("as of", [year, *_]):
            return f"As of {year}"
        case (("c." | "ca." | "circa"), [_, *_]):
            return " – ".join(f"c. {year}" for year in arguments)
        case (("frac" | "fraction" | "sfrac"), [denominator]):
            return f"1/{denominator}"
        case (("frac" | "fraction" | "sfrac"), [*whole, numerator, denominator]):
            return " ".join([*whole, f"{numerator}/{denominator}"])
        case (("chem" | "chem2" | "gaps"), parts):
            return "".join(parts)
        case (("us$" | "£" | "€"), [amount, *_]):
            return f"{name.upper()}{amount}"
        case (("hms" | "uss" | "ss" | "rms" | "mv"), [ship, *_]):
            return f"{name.upper()} {ship}"
        case ("angbr", [text, *_]):
            return f"⟨{text}⟩"
        case (("lang" | "script"), [_, text, *_]):
            return text
        case (("transl" | "translit" | "transliteration"), [*_, text]):
            return text
        case _, [text, *_] if name in _SHOWN:
            return text
        case (("quote" | "blockquote"), [text, *_]):
            return f"\n\n{text}\n\n"
        case (("mdash" | "mdashb" | "snd" | "spaced ndash" | "ndash"), _):
            return " – "
        case (("nbsp" | "spaces" | "space"), _):
            return " "
        case ("eqm", _):
            return " ⇌ "
        case _ if name.startswith("lang-") and arguments:
            return arguments[0]
        case _ if re.fullmatch(r"formatnum:[\d.,]+", name):
            return name.removeprefix("formatnum:")
        case _:
            return "" if _SILENT.fullmatch(name) or "\n" in str(node) else HOLE
