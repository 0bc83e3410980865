"""Documents of a text corpus: files of rows or plain text, read through an adapter, as clean strings.

It refuses to guess: a file that yields no document is a :class:`~preceptor.errors.DataError` that names it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from preceptor.errors import DataError, nearest

Row = Mapping[str, Any]

_HEADING = re.compile(r"^=+ .* =+$")
_WIKITEXT_JOINERS = re.compile(r" @([-,.])@ ")
_SPACE_BEFORE = re.compile(r" ([,.;:!?%)\]}'])")
_SPACE_AFTER = re.compile(r"([(\[{$]) ")
_QUOTED = re.compile(r'" ([^"]*?) "')


def _field(name: str) -> Callable[[Row], str]:
    def adapt(row: Row) -> str:
        return str(row[name])

    return adapt


def _arxiv(row: Row) -> str:
    return f"{row['title']}\n\n{row['abstract']}"


def _dialog(row: Row) -> str:
    return "\n".join(str(turn).strip() for turn in row["dialog"])


def _translation(language: str) -> Callable[[Row], str]:
    def adapt(row: Row) -> str:
        return str(row["translation"][language])

    return adapt


def _wikitext(row: Row) -> str:
    """One WikiText paragraph with its tokenised spacing undone; headings become empty."""
    text = str(row["text"]).strip()
    if _HEADING.match(text):
        return ""
    text = _WIKITEXT_JOINERS.sub(r"\1", text)
    text = _SPACE_AFTER.sub(r"\1", _SPACE_BEFORE.sub(r"\1", text))
    return _QUOTED.sub(r'"\1"', text).replace(" n't", "n't")


ADAPTERS: dict[str, Callable[[Row], str]] = {
    "text": _field("text"),
    "article": _field("article"),
    "arxiv": _arxiv,
    "dialog": _dialog,
    "english": _translation("en"),
    "french": _translation("fr"),
    "wikitext": _wikitext,
}
"""Adapters from one JSONL row to one document (or to one piece of a document that ``join`` puts together)."""


def read_documents(path: Path, *, adapter: str = "text", join: int = 1) -> Iterator[str]:
    """Documents of ``path``, stripped and non-empty.

    A ``.jsonl`` file gives a document per ``join`` rows (pieces are joined by a blank line); any other file is one
    plain text document in UTF-8, without its ``== heading ==`` lines; a folder gives its files' documents by name.

    Args:
        path: a file or a folder of files.
        adapter: a name in :data:`ADAPTERS`; used for rows only.
        join: number of consecutive rows that make one document, at least 1.

    Raises:
        DataError: unknown adapter, missing path, a row without the adapter's field, text that is not UTF-8.
    """
    if adapter not in ADAPTERS:
        raise DataError(f"unknown adapter '{adapter}'{nearest(adapter, ADAPTERS)}; use one of {', '.join(ADAPTERS)}")
    if path.is_dir():
        for file in sorted(entry for entry in path.iterdir() if entry.is_file() and not entry.name.startswith(".")):
            yield from read_documents(file, adapter=adapter, join=join)
        return
    if not path.is_file():
        raise DataError(f"corpus file {path} does not exist; check the path or the corpus folder")
    try:
        if path.suffix == ".jsonl":
            yield from _joined(_rows(path, ADAPTERS[adapter]), join)
        else:
            lines = path.read_text(encoding="utf-8").splitlines()
            text = "\n".join(line for line in lines if not _HEADING.match(line)).strip()
            if text:
                yield re.sub(r"\n{3,}", "\n\n", text)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {error.start}; convert it to UTF-8") from error


def _rows(path: Path, adapt: Callable[[Row], str]) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield adapt(json.loads(line)).strip()
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise DataError(f"{path}, line {number}: no such row for this adapter ({error!r})") from error


def _joined(pieces: Iterator[str], join: int) -> Iterator[str]:
    held: list[str] = []
    for piece in pieces:
        if piece:
            held.append(piece)
        if len(held) == join:
            yield "\n\n".join(held)
            held = []
    if held:
        yield "\n\n".join(held)
