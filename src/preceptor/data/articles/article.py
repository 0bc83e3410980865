"""An article from wherever it lies: a file, a URL or a Wikipedia title."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import unquote, urlsplit

from preceptor.data.articles.markup import Block, article_text, document_title, markdown_blocks, plain_blocks
from preceptor.errors import DataError, StorageError, did_you_mean

if TYPE_CHECKING:
    from preceptor.data.articles.fetch import Fetcher

Format = Literal["plain", "markdown", "html", "wikitext"]

FORMATS: dict[str, Format] = {
    ".txt": "plain",
    ".text": "plain",
    ".md": "markdown",
    ".markdown": "markdown",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".wiki": "wikitext",
    ".wikitext": "wikitext",
    ".mediawiki": "wikitext",
}
MAX_BYTES = 10_000_000
MAX_UNBROKEN_CHARACTERS = 10_000  # a run without white space this long is data, and makes some tokenizers take minutes

_MEDIA_TYPES: dict[str, Format] = {
    "text/html": "html",
    "application/xhtml+xml": "html",
    "text/markdown": "markdown",
    "text/x-markdown": "markdown",
    "text/x-wiki": "wikitext",
}
_CACHE_FORM = "article-2"  # to be raised when the same source would now give another text


@dataclass(frozen=True)
class Article:
    """Plain text to read.

    Args:
        title: of the article; of a file without one, its name.
        text: paragraphs separated by one blank line, sections by two, headings left out.
        source: the path, the URL, or the URL of the Wikipedia page.
        sha256: hexadecimal SHA-256 of ``text`` in UTF-8, the identity of what was read.
    """

    title: str
    text: str
    source: str
    sha256: str


def read_article(
    source: str, *, cache_dir: Path, language: str = "en", endpoint: str | None = None, fetcher: Fetcher | None = None
) -> Article:
    """The article that ``source`` names: an existing file, an http(s) URL, or else the title of a Wikipedia article.

    A file's form is told by its suffix (`FORMATS`), otherwise by its content. A URL of a Wikipedia article is read
    through the API like its title. What came over the network is kept in ``cache_dir``; reading it again needs none. A
    file in the working folder goes before the Wikipedia article of the same name.

    Args:
        source: path, URL or title.
        cache_dir: folder of the cache, made when needed.
        language: of Wikipedia (``en``, ``de``, …) for a title.
        endpoint: address of another MediaWiki API for titles; ``None`` is that of Wikipedia in ``language``.
        fetcher: limits and manners of network access; ``None`` is `Fetcher()`.

    Raises:
        DataError: no such file, page or title (near ones are named), or not usable as an article: empty, over 10 MB,
            not UTF-8, binary.
        ServiceError: the network or the service failed.
        StorageError: the file cannot be read or the cache not written.
        MissingExtraError: HTML or wikitext without the extra ``web``.
    """
    # 1. A URL: http(s) alone, and Wikipedia's through its API, whose text is cleaner than the page.
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", source)
    if scheme and scheme[1].lower() not in {"http", "https"}:
        raise DataError(f"'{source}' cannot be read; pass a file, an http:// or https:// URL, or a Wikipedia title")
    if scheme:
        if wikipedia := _wikipedia_title(source):
            language, title = wikipedia
            return _read_title(title, language, None, cache_dir, fetcher)
        return _cached(cache_dir, f"url {source}", lambda: _read_url(source, fetcher))
    # 2. A file or folder that exists goes before a title of the same name.
    try:
        is_file, is_folder = Path(source).is_file(), Path(source).is_dir()
    except (OSError, ValueError) as error:  # too long for a name, or with a NUL
        raise DataError(f"{source[:80]!r} is neither a path nor a title ({error})") from error
    if is_file:
        return read_file(Path(source))
    if is_folder:
        raise DataError(
            f"'{source}' is a folder; pass one of its files, or train on all of them: --train-articles {source}"
        )
    # 3. A mistyped path must not be looked up on Wikipedia.
    if _looks_like_path(source):
        raise DataError(_no_such_file(Path(source)))
    return _read_title(source, language, endpoint, cache_dir, fetcher)


def read_file(path: Path) -> Article:
    """The article in a file; see `read_article` for the forms and errors."""
    try:
        with path.open("rb") as file:
            # One byte more than allowed tells a file of exactly the limit from a larger one, without reading all of
            # that.
            body = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}; check the path and its permissions") from error
    suffix = path.suffix.lower()
    if what := _NO_ARTICLES.get(suffix) or (_NO_ARTICLES[".ipynb"] if _is_notebook(body) else None):
        raise DataError(
            f"{path} is {what}; an article is plain text, Markdown, HTML or wikitext in UTF-8 ({_suffixes()})"
        )
    form = FORMATS.get(suffix)
    return _article(body, form=form, name=str(path), title=path.stem.replace("_", " "))


_TABLE, _CODE, _DATA = (f"{what}, not running text" for what in ("a table", "a program", "data"))
_CONVERT = "save or convert it as text first"
_NO_ARTICLES = {
    ".ipynb": f"a notebook ({_CONVERT}: jupyter nbconvert --to markdown)",
    ".tex": f"LaTeX ({_CONVERT}: pandoc -t markdown)",
    ".rst": f"reStructuredText ({_CONVERT}: pandoc -t markdown)",
    ".org": f"Org mode ({_CONVERT}: pandoc -t markdown)",
    ".adoc": f"AsciiDoc ({_CONVERT}: asciidoctor, then the HTML)",
    ".rtf": f"rich text ({_CONVERT})",
    ".eml": f"an e-mail ({_CONVERT})",
    ".srt": f"subtitles ({_CONVERT})",
    ".vtt": f"subtitles ({_CONVERT})",
    ".svg": "a drawing, not running text",
    ".bib": "a bibliography, not running text",
    **dict.fromkeys((".csv", ".tsv"), _TABLE),
    **dict.fromkeys([".json", ".jsonl", ".ndjson", ".yaml", ".yml", ".toml", ".ini", ".xml", ".log"], _DATA),
    **dict.fromkeys([".py", ".js", ".ts", ".c", ".h", ".cpp", ".rs", ".go", ".java", ".sh", ".rb", ".sql"], _CODE),
}  # fmt: skip
"""Suffixes of text that is no article, and what it is; whatever is not known is read as text."""


def _is_notebook(body: bytes) -> bool:
    """By its content, should it have lost its suffix."""
    return body.lstrip()[:1] == b"{" and b'"nbformat"' in body and b'"cells"' in body


def article_folder(path: Path) -> list[Path]:
    """The article files of a folder, sorted by name: those with a suffix of `FORMATS`, no hidden ones, no subfolders.

    Raises:
        DataError: not a folder, or no article in it.
    """
    if not path.is_dir():
        raise DataError(f"'{path}' is not a folder of articles; pass a folder with {_suffixes()} files")
    files = sorted(
        entry
        for entry in path.iterdir()
        if entry.suffix.lower() in FORMATS and not entry.name.startswith(".") and entry.is_file()
    )
    if not files:
        raise DataError(f"there is no article in the folder '{path}'; put {_suffixes()} files there")
    return files


def decode_text(body: bytes, *, name: str, encoding: str = "utf-8") -> str:
    """``body`` as text, strictly.

    Raises:
        DataError: empty, binary (NUL bytes), or not in ``encoding``; the message has the offset of the first bad byte.
    """
    # Common on Windows, hence named: the message below would speak of a bad byte 0 and help nobody.
    if body.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{name} is UTF-16; save it as UTF-8")
    if (offset := body.find(b"\0")) >= 0:
        raise DataError(
            f"{name} is binary (NUL at byte {offset}); pass plain text, Markdown, HTML or wikitext in UTF-8"
        )
    try:
        # Strictly: a replaced character would be trained on.
        text = body.removeprefix(b"\xef\xbb\xbf").decode(encoding)
    except UnicodeDecodeError as error:
        # Counted in the file, byte order mark included, as an editor or hexdump shows it.
        offset = error.start + (3 if body.startswith(b"\xef\xbb\xbf") else 0)
        raise DataError(
            f"{name} is not {encoding.upper()} (byte {offset} is 0x{body[offset]:02x}); save it as UTF-8"
        ) from error
    except LookupError as error:
        raise DataError(f"{name} declares the unknown encoding '{encoding}'; save it as UTF-8") from error
    if not text.strip():
        raise DataError(f"{name} is empty; pass an article with at least two sentences")
    return text


def _article(body: bytes, *, form: Format | None, name: str, title: str, charset: str | None = None) -> Article:
    if len(body) > MAX_BYTES:
        raise DataError(f"{name} is over {MAX_BYTES:,} bytes, the most an article may have; pass a part of it")
    # HTML may declare its encoding inside; the standard asks for it within the first 1,024 bytes.
    if charset is None and (form == "html" or (form is None and b"<html" in body[:1024].lower())):
        declared = re.search(rb"<meta[^>]+charset=[\"']?([\w-]+)", body[:2048], re.IGNORECASE)
        charset = declared[1].decode("ascii") if declared else None
    text = decode_text(body, name=name, encoding=charset or "utf-8")
    blocks = _blocks(text, form or _guess_format(text))
    return _from_blocks(blocks, title=document_title(blocks) or title, source=name)


def _from_blocks(blocks: list[Block], *, title: str, source: str) -> Article:
    text = article_text(blocks)
    if not text:
        raise DataError(f"{source} has no running text; pass an article with at least two sentences")
    if run := re.search(rf"\S{{{MAX_UNBROKEN_CHARACTERS}}}", text):
        raise DataError(
            f"{source} has {MAX_UNBROKEN_CHARACTERS:,} characters without a space ('{run[0][:20]}…'): data, not "
            "text; remove them"
        )
    # Of the text that is read and not of the file: the same article as HTML and as plain text has one identity.
    return Article(title, text, source, hashlib.sha256(text.encode()).hexdigest())


def _blocks(text: str, form: Format) -> list[Block]:
    if form == "html":
        from preceptor.data.articles.html import html_blocks

        return html_blocks(text)
    if form == "wikitext":
        from preceptor.data.articles.wikitext import wikitext_blocks

        return wikitext_blocks(text)
    return markdown_blocks(text) if form == "markdown" else plain_blocks(text)


def _guess_format(text: str) -> Format:
    # Most certain first. A lone "==" or "#" in prose would otherwise make wikitext or Markdown of a plain text.
    if re.match(r"\s*(?:<\?xml[^>]*>\s*)?<(?:!doctype html|html|head|body)\b", text, re.IGNORECASE):
        return "html"
    if "[[" in text and re.search(r"'''|\{\{|^=+ *\S.*=+\s*$", text, re.MULTILINE):
        return "wikitext"
    if re.search(r"^#{1,6} \S", text, re.MULTILINE):
        return "markdown"
    return "plain"


# What reads the network, HTML and wikitext is imported when it is needed: most articles are files of plain text.


def _read_url(url: str, fetcher: Fetcher | None) -> Article:
    from preceptor.data.articles.fetch import Fetcher

    fetched = (fetcher or Fetcher(max_bytes=MAX_BYTES)).get(url)
    path = Path(unquote(urlsplit(fetched.url).path))
    # The server's media type where it says something, else the suffix: many serve Markdown as text/plain.
    form = _MEDIA_TYPES.get(fetched.media_type)
    if form is None:
        if fetched.media_type not in {"", "text/plain", "application/octet-stream"}:
            raise DataError(f"{url} is '{fetched.media_type}'; an article is HTML, Markdown, wikitext or plain text")
        form = FORMATS.get(path.suffix.lower())
    title = path.stem.replace("_", " ") or urlsplit(fetched.url).netloc
    return _article(fetched.body, form=form, name=url, title=title, charset=fetched.charset)


def _read_title(title: str, language: str, endpoint: str | None, cache_dir: Path, fetcher: Fetcher | None) -> Article:
    from preceptor.data.articles.fetch import Fetcher
    from preceptor.data.articles.wikipedia import api_endpoint, read_wikipedia

    endpoint = api_endpoint(language) if endpoint is None else endpoint
    fetcher = fetcher or Fetcher(max_bytes=MAX_BYTES)

    def read() -> Article:
        page = read_wikipedia(title, endpoint=endpoint, fetcher=fetcher)
        return _from_blocks(page.blocks, title=page.title, source=page.url)

    return _cached(cache_dir, f"title {endpoint} {title}", read)


def _wikipedia_title(url: str) -> tuple[str, str] | None:
    """``(language, title)`` if ``url`` is that of a Wikipedia article, desktop or mobile."""
    parts = urlsplit(url)
    host = re.fullmatch(r"([a-z-]+)(?:\.m)?\.wikipedia\.org", parts.netloc.lower())
    if host and not parts.query and parts.path.startswith("/wiki/"):
        return host[1], unquote(parts.path.removeprefix("/wiki/")).replace("_", " ")
    return None


def _cached(cache_dir: Path, key: str, read: Callable[[], Article]) -> Article:
    """The article kept under ``key``, or else the one that ``read`` gives, then kept; a damaged entry is read anew."""
    # A hash as the file name: keys hold URLs and titles of any length and with any character.
    entry = cache_dir / f"{hashlib.sha256(f'{_CACHE_FORM} {key}'.encode()).hexdigest()}.json"
    try:
        # The entry proves itself by its own hash, so that a damaged one counts as absent.
        article = Article(**json.loads(entry.read_text(encoding="utf-8")))
        if article.sha256 == hashlib.sha256(article.text.encode()).hexdigest():
            return article
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        pass  # not there, or not what was written
    except OSError as error:
        raise StorageError(f"the cache entry {entry} cannot be read: {error.strerror}") from error
    article = read()
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        # A reader never sees half an entry: the name appears with the whole content.
        with tempfile.NamedTemporaryFile("w", dir=cache_dir, suffix=".tmp", encoding="utf-8", delete=False) as file:
            try:
                json.dump(asdict(article), file)
                file.flush()
                # fsync before the rename: the name must not survive a power cut that the content does not.
                os.fsync(file.fileno())
                Path(file.name).replace(entry)
            except BaseException:  # Ctrl-C too: half an entry must not stay
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise StorageError(
            f"the cache {cache_dir} cannot be written: {error.strerror}; free space or choose another"
        ) from error
    return article


def _looks_like_path(source: str) -> bool:
    """Whether the user meant a file: a known suffix, a leading ``/``, ``.`` or ``~``, or a folder that exists.

    "AC/DC" and "Node.js" are titles.
    """
    return (
        source.startswith(("/", "./", "../", "~", ".\\"))
        or Path(source).suffix.lower() in FORMATS
        or ("/" in source and Path(source).parent.is_dir())
    )


def _no_such_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no file '{path}', nor its folder; check the path"
    names = [entry.name for entry in path.parent.iterdir() if entry.is_file() and not entry.name.startswith(".")]
    return f"there is no file '{path}'{did_you_mean(path.name, names)}; check the path"


def _suffixes() -> str:
    return ", ".join(FORMATS)
