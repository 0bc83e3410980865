"""An article by its title, through the MediaWiki API (https://www.mediawiki.org/wiki/Extension:TextExtracts)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from preceptor.data.articles.fetch import Fetcher, TransientError
from preceptor.data.articles.markup import Block, plain_blocks, readable_formula
from preceptor.errors import DataError, ServiceError, did_you_mean

_INVALID_IN_TITLE = re.compile(r"[#<>\[\]{}|\x00-\x1f\x7f]")
_LANGUAGE = re.compile(r"[a-z]{2,3}(?:-[a-z]+)*|simple")
_TEX = "{\\displaystyle"  # … }, as a line's end
_MAX_TITLE_BYTES = 255


@dataclass(frozen=True)
class WikipediaPage:
    """A page as found: ``title`` after redirects and normalisation, ``url`` of the page, its text as ``blocks``."""

    title: str
    url: str
    blocks: list[Block]


def api_endpoint(language: str) -> str:
    """The API address of Wikipedia in ``language`` (a code such as ``en``, ``de``, ``simple``).

    Raises:
        DataError: the code cannot be one.
    """
    if not _LANGUAGE.fullmatch(language):
        raise DataError(f"'{language}' is not a Wikipedia language code; it is one like 'en', 'de' or 'simple'")
    return f"https://{language}.wikipedia.org/w/api.php"


def read_wikipedia(title: str, *, endpoint: str, fetcher: Fetcher) -> WikipediaPage:
    """The article called ``title`` (redirects followed) from the MediaWiki API at ``endpoint``.

    Raises:
        DataError: the title is malformed, missing, a disambiguation page or has no text; the message names near ones.
        ServiceError: no network, or the service failed, refused or answered nonsense in every try.
    """
    # A "|" would ask the API for several pages at once; the rest cannot stand in a title.
    if not title.strip() or _INVALID_IN_TITLE.search(title) or len(title.encode()) > _MAX_TITLE_BYTES:
        raise DataError(
            f"{title[:80]!r} cannot be a Wikipedia title, which has 1 to {_MAX_TITLE_BYTES} bytes and none of "
            "# < > [ ] { } |; check the title, or pass a file or URL"
        )
    # One request for text, kind and address. Plain text comes ready-made, with headings kept as ``== X ==``.
    answer = _query(
        endpoint,
        fetcher,
        prop="extracts|pageprops|info",
        explaintext="1",
        exsectionformat="wiki",
        ppprop="disambiguation",
        inprop="url",
        redirects="1",
        titles=title,
    )
    # formatversion 2 gives a list; one title asked for is one page answered.
    pages = answer.get("query", {}).get("pages")
    if not isinstance(pages, list) or len(pages) != 1 or "title" not in pages[0]:
        raise ServiceError(f"{endpoint} did not answer as the MediaWiki API does; check the endpoint")
    page = pages[0]
    if page.get("missing") or page.get("invalid"):
        raise DataError(_missing_message(title, _search(title, endpoint, fetcher)))
    # A list of meanings is no article to learn from; its links are the candidates.
    if "disambiguation" in page.get("pageprops", {}):
        raise DataError(f"'{title}' may mean several articles; pass one of {_quoted(_links(title, endpoint, fetcher))}")
    found_title = str(page["title"])
    blocks = extract_blocks(str(page.get("extract", "")))
    if not any(block.kind == "paragraph" for block in blocks):
        raise DataError(f"the Wikipedia page '{found_title}' has no text; pass another title or a file")
    return WikipediaPage(found_title, str(page.get("fullurl", endpoint)), blocks)


def extract_blocks(extract: str) -> list[Block]:
    r"""Blocks of a plain-text extract of the API, where every line is a paragraph and ``== X ==`` a heading.

    A formula comes as indented lines, the last with its TeX as ``{\displaystyle …}``, in the middle of a sentence that
    goes on with a space or a comma; it is put back where it reads as text (``n``), else a `markup.HOLE` stands for it.
    """
    lines: list[str] = []
    indented: list[str] = []
    for line in extract.splitlines():
        # Two spaces and more: how the extract sets a formula apart.
        if line.startswith("  "):
            indented.append(line.strip())
        elif line.strip():
            if _put_back(indented, lines) and line[0] in " ,.;:)":
                lines[-1] += line
            else:
                lines.append(line)
    _put_back(indented, lines)
    return plain_blocks("\n\n".join(lines))


def _put_back(indented: list[str], lines: list[str]) -> bool:
    """Empty ``indented`` into ``lines``; whether it was a formula, which then ends the last line."""
    formulas = [readable_formula(text) for text in indented if text.startswith(_TEX)]
    if formulas and lines:
        lines[-1] = " ".join([lines[-1].rstrip(), *formulas])
    elif not formulas:
        lines.extend(indented)
    indented.clear()
    return bool(formulas and lines)


def _query(endpoint: str, fetcher: Fetcher, **parameters: str) -> dict[str, Any]:
    """The decoded answer to one ``action=query``; lag and cut answers are retried like other transient failures."""
    # maxlag: the API refuses while its replicas lag 5 s behind, as its rules for clients ask.
    params = {"action": "query", "format": "json", "formatversion": "2", "maxlag": "5", **parameters}

    def attempt(deadline: float) -> dict[str, Any]:
        fetched = fetcher.attempt(endpoint, deadline=deadline, params=params)
        try:
            answer = json.loads(fetched.body)
        except ValueError as bad_json:
            raise TransientError("the answer is not complete JSON") from bad_json
        if not isinstance(answer, dict):
            raise TransientError("the answer is not a JSON object")
        if error := answer.get("error"):
            code, info = str(error.get("code")), str(error.get("info"))
            # The API reports errors with status 200, so they have to be told apart here.
            if code in {"maxlag", "ratelimited"} or code.startswith("internal_api_error"):
                raise TransientError(
                    f"the service is busy ({code}: {info})", retry_after=5.0 if code == "maxlag" else 0.0
                )
            raise ServiceError(f"{endpoint} refused the request ({code}: {info})")
        return answer

    return fetcher.retry(endpoint, attempt)


def _search(title: str, endpoint: str, fetcher: Fetcher) -> list[str]:
    """Titles that the wiki's own search finds for ``title``, its spelling suggestion first."""
    answer = _query(endpoint, fetcher, list="search", srsearch=title, srlimit="5", srinfo="suggestion", srprop="")
    query = answer.get("query", {})
    suggestion = query.get("searchinfo", {}).get("suggestion")
    found = [str(hit["title"]) for hit in query.get("search", [])]
    return found or ([str(suggestion)] if suggestion else [])


def _links(title: str, endpoint: str, fetcher: Fetcher) -> list[str]:
    """Titles of the first articles that the page links to."""
    answer = _query(endpoint, fetcher, prop="links", plnamespace="0", pllimit="12", redirects="1", titles=title)
    return [str(link["title"]) for page in answer.get("query", {}).get("pages", []) for link in page.get("links", [])]


def _missing_message(title: str, found: list[str]) -> str:
    remedy = f"pass one of {_quoted(found)}, or a file" if found else "check the spelling, or pass a file or URL"
    return f"there is no file and no Wikipedia article called '{title}'{did_you_mean(title, found)}; {remedy}"


def _quoted(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
