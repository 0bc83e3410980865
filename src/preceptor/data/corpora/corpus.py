"""Documents of a text corpus: files of rows or plain text, read through an adapter, as clean strings.

It refuses to guess: a file that yields no document is a :class:`~preceptor.errors.DataError` that names it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from preceptor.errors import DataError, MissingExtraError, did_you_mean

Row = Mapping[str, Any]

_HEADING = re.compile(r"^=+ .* =+$")
_WIKITEXT_JOINERS = re.compile(r" @([-,.])@ ")
_SPACE_BEFORE = re.compile(r" ([,.;:!?%)\]}'])")
_SPACE_AFTER = re.compile(r"([(\[{$]) ")
_QUOTED = re.compile(r'" ([^"]*?) "')


_WRAP = re.compile(r"(?<!\n)\n(?!\n)")
_FIELD_PREFIX = "field:"
_CODE_FIELDS = ("content", "code", "text", "func_code_string", "whole_func_string")
_ROWS_AT_ONCE = 1_024


def _text(row: Row, name: str) -> str:
    """The text in field ``name``; an absent value (null) is an empty text, a number or a list is a mistake."""
    value = row[name]
    if value is not None and not isinstance(value, str):
        raise TypeError(f"field '{name}' holds {type(value).__name__}, not text")
    return value or ""


def _field(name: str) -> Callable[[Row], str]:
    return lambda row: _text(row, name)


def _arxiv(row: Row) -> str:
    return f"{_text(row, 'title')}\n\n{_text(row, 'abstract')}"


def _dialog(row: Row) -> str:
    return "\n".join(str(turn).strip() for turn in row["dialog"])


def _translation(language: str) -> Callable[[Row], str]:
    return lambda row: _text(row["translation"], language)


def _code(row: Row) -> str:
    """A source file under any of the names that datasets of code give it."""
    return _text(row, next((name for name in _CODE_FIELDS if name in row), _CODE_FIELDS[0]))


def _book(row: Row) -> str:
    """Prose whose lines were wrapped for print, with a paragraph on one line again."""
    return _WRAP.sub(" ", _text(row, "text").replace("\r\n", "\n"))


def _wikitext(row: Row) -> str:
    """One WikiText paragraph with its tokenised spacing undone; headings become empty."""
    text = _text(row, "text").strip()
    if _HEADING.match(text):
        return ""
    text = _WIKITEXT_JOINERS.sub(r"\1", text)
    text = _SPACE_AFTER.sub(r"\1", _SPACE_BEFORE.sub(r"\1", text))
    return _QUOTED.sub(r'"\1"', text).replace(" n't", "n't")


ADAPTERS: dict[str, Callable[[Row], str]] = {
    "text": _field("text"),
    "article": _field("article"),
    "arxiv": _arxiv,
    "book": _book,
    "code": _code,
    "dialog": _dialog,
    "english": _translation("en"),
    "french": _translation("fr"),
    "wikitext": _wikitext,
}
"""Adapters from one row to one document (or to one piece of a document that ``join`` puts together)."""


def adapter_named(name: str) -> Callable[[Row], str]:
    """The adapter ``name`` of :data:`ADAPTERS`, or the plain field NAME for ``field:NAME``.

    Raises:
        DataError: there is none of that name.

    >>> adapter_named("field:context")({"context": "Ice floats."})
    'Ice floats.'
    """
    field = name.removeprefix(_FIELD_PREFIX)
    if field and field != name:
        return _field(field)
    if name not in ADAPTERS:
        known = ", ".join(ADAPTERS)
        raise DataError(f"unknown adapter '{name}'{did_you_mean(name, ADAPTERS)}; use one of {known}, or field:NAME")
    return ADAPTERS[name]


def read_documents(path: Path, *, adapter: str = "text", join: int = 1) -> Iterator[str]:
    """Documents of ``path``, stripped and non-empty.

    A ``.jsonl`` or ``.parquet`` file gives a document per ``join`` rows (pieces are joined by a blank line); any other
    file is one plain text document in UTF-8, without its ``== heading ==`` lines; a folder gives its files' documents
    by name.

    Args:
        path: a file or a folder of files.
        adapter: a name in :data:`ADAPTERS` or ``field:NAME``; used for rows only.
        join: number of consecutive rows that make one document, at least 1.

    Raises:
        DataError: unknown adapter, missing path, a row without the adapter's field, text that is not UTF-8.
        MissingExtraError: a Parquet file without the extra ``datasets``.
    """
    adapt = adapter_named(adapter)
    if path.is_dir():
        for file in sorted(entry for entry in path.iterdir() if entry.is_file() and not entry.name.startswith(".")):
            yield from read_documents(file, adapter=adapter, join=join)
        return
    if not path.is_file():
        raise DataError(f"corpus file {path} does not exist; check the path or the corpus folder")
    try:
        if path.suffix == ".jsonl":
            yield from joined(adapted(_jsonl_rows(path), adapt), join)
        elif path.suffix == ".parquet":
            yield from joined(adapted(_parquet_rows(path), adapt), join)
        else:
            lines = path.read_text(encoding="utf-8").splitlines()
            text = "\n".join(line for line in lines if not _HEADING.match(line)).strip()
            if text:
                yield re.sub(r"\n{3,}", "\n\n", text)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {error.start}; convert it to UTF-8") from error


def adapted(rows: Iterator[tuple[str, Row]], adapt: Callable[[Row], str]) -> Iterator[str]:
    """What ``adapt`` makes of each row, stripped; ``rows`` come with the place that an error names."""
    for place, row in rows:
        try:
            yield adapt(row).strip()
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{place}: no such row for this adapter ({error!r}); its fields are {', '.join(row)}"
            ) from error


def joined(pieces: Iterator[str], join: int) -> Iterator[str]:
    """Documents of ``join`` consecutive non-empty pieces each; the last may have fewer."""
    held: list[str] = []
    for piece in pieces:
        if piece:
            held.append(piece)
        if len(held) == join:
            yield "\n\n".join(held)
            held = []
    if held:
        yield "\n\n".join(held)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{place}: not JSON ({error}); a .jsonl file has one JSON object a line") from error
            if not isinstance(row, dict):
                raise DataError(f"{place}: a {type(row).__name__}; a .jsonl file has one JSON object a line")
            yield place, row


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise MissingExtraError("reading Parquet", package="pyarrow", extra="datasets") from error
    try:
        number = 0
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except ArrowException as error:
        raise DataError(f"{path} is no readable Parquet file ({error}); write it anew") from error
