"""Documents of a text corpus: files of rows or plain text, read through an adapter, as clean strings.

It refuses to guess: a file that yields no document is a :class:`~preceptor.errors.DataError` that names it.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
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
_LONGEST_CELL = 1 << 30  # of a table, in characters; Python's own limit is 131,072
_PLAIN_SUFFIXES = frozenset({"", ".md", ".markdown", ".raw", ".rst", ".tex", ".text", ".tokens", ".txt"})


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
    turns = row["dialog"]
    if not isinstance(turns, list):
        raise TypeError(f"field 'dialog' holds {type(turns).__name__}, not a list of texts")
    for turn in turns:
        if not isinstance(turn, str):
            raise TypeError(f"field 'dialog' has a turn of {type(turn).__name__}, not text")
    return "\n".join(turn.strip() for turn in turns)


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
    # A heading is a row of its own in WikiText; alone it is no document.
    if _HEADING.match(text):
        return ""
    # " @-@ " and the like stand for "-" that the tokeniser split.
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

    A file of rows (``.jsonl``, ``.ndjson``, ``.json``, ``.csv``, ``.tsv``, ``.parquet``) gives a document per ``join``
    rows (pieces are joined by a blank line). A file of plain text in UTF-8 (``.txt``, ``.md``, no suffix, …) is one
    document, without its ``== heading ==`` lines. A folder gives the documents of the files of rows in it and in its
    folders, by path; only where there is none, those of the files of plain text.

    Args:
        path: a file or a folder of files.
        adapter: a name in :data:`ADAPTERS` or ``field:NAME``; used for rows only.
        join: number of consecutive rows that make one document, at least 1.

    Raises:
        DataError: unknown adapter, missing path, a suffix that is none of these, an adapter for plain text, a row
            without the adapter's field, text that is not UTF-8.
        MissingExtraError: a Parquet file without the extra ``datasets``.
    """
    adapt = adapter_named(adapter)
    # Files in order of their path, so that every machine reads the same documents in the same order.
    if path.is_dir():
        for file in _files(path):
            yield from read_documents(file, adapter=adapter, join=join)
        return
    if not path.is_file():
        raise DataError(f"corpus file {path} does not exist; check the path or the corpus folder")
    try:
        # A file of rows is read lazily, one of plain text whole: it is one document.
        if rows := _ROWS.get(path.suffix.lower()):
            yield from joined(adapted(rows(path), adapt), join)
        elif path.suffix.lower() not in _PLAIN_SUFFIXES:
            raise DataError(
                f"{path}: '{path.suffix}' files are not understood; rows come as {', '.join(_ROWS)}, plain text as .txt"
            )
        elif adapter != "text":
            raise DataError(f"{path} is plain text, which has no rows for the adapter '{adapter}'; leave it out")
        else:
            # utf-8-sig drops the byte order mark that some editors write.
            lines = path.read_text(encoding="utf-8-sig").splitlines()
            text = "\n".join(line for line in lines if not _HEADING.match(line)).strip()
            if text:
                yield re.sub(r"\n{3,}", "\n\n", text)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {error.start}; convert it to UTF-8") from error


def _files(folder: Path) -> list[Path]:
    """The files of rows in ``folder`` and its folders, or else those of plain text; nothing hidden.

    A clone of a hub dataset holds a card and a licence beside its rows.
    """
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    rows = [path for path in files if path.suffix.lower() in _ROWS]
    return rows or [path for path in files if path.suffix.lower() in _PLAIN_SUFFIXES]


def adapted(rows: Iterator[tuple[str, Row]], adapt: Callable[[Row], str]) -> Iterator[str]:
    """What ``adapt`` makes of each row, stripped; ``rows`` come with the place that an error names."""
    for place, row in rows:
        try:
            text = adapt(row).strip()
            # Raises for half a surrogate pair, which a JSON escape can smuggle in.
            text.encode()
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{place}: no such row for this adapter ({error!r}); its fields are {', '.join(row)}"
            ) from error
        except UnicodeEncodeError as error:  # no tokenizer takes half a surrogate pair
            raise DataError(
                f"{place}: {error.object[error.start]!r} at character {error.start} is half a character; repair the row"
            ) from error
        yield text


def joined(pieces: Iterator[str], join: int) -> Iterator[str]:
    """Documents of ``join`` consecutive non-empty pieces each; the last may have fewer."""
    held: list[str] = []
    for piece in pieces:
        # Empty pieces (headings, blank rows) do not count towards a document.
        if piece:
            held.append(piece)
        if len(held) == join:
            yield "\n\n".join(held)
            held = []
    if held:
        yield "\n\n".join(held)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open(encoding="utf-8-sig") as lines:
        yield from _json_lines(path, lines)


def _json_lines(path: Path, lines: Iterable[str]) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"{path}, line {number}"
            yield place, _object(place, _json(place, line), "has one JSON object a line")


def _json_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Rows of a ``.json`` file: an array of objects, or an object a line as in ``.jsonl``."""
    text = path.read_text(encoding="utf-8-sig")
    # .json may be an array or, against its name, an object a line; the first character tells which.
    if not text.lstrip().startswith("["):
        yield from _json_lines(path, text.splitlines())
        return
    for number, row in enumerate(_json(str(path), text), start=1):
        place = f"{path}, row {number}"
        yield place, _object(place, row, "is an array of objects")


def _json(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also for an integer beyond Python's limit of digits
        raise DataError(f"{place}: not JSON ({error}); repair it") from error


def _object(place: str, row: Any, form: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{place}: a {type(row).__name__}; such a file {form}")
    return row


def _table_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Rows of a ``.csv`` or ``.tsv`` file, whose first line names the fields."""
    # csv's own limit of 131,072 characters is shorter than many articles.
    csv.field_size_limit(_LONGEST_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        # strict: a stray quote would otherwise swallow the rows that follow it.
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            for row in reader:
                place = f"{path}, line {reader.line_num}"
                # DictReader puts cells beyond the header under the key None.
                if None in row:
                    raise DataError(f"{place}: more cells than the {len(reader.fieldnames or ())} fields; repair it")
                yield place, row
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: {error}; repair it") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise MissingExtraError("reading Parquet", package="pyarrow", extra="datasets") from error
    try:
        number = 0
        with parquet.ParquetFile(path) as file:
            # In batches, for a file may be larger than memory.
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except ArrowException as error:
        raise DataError(f"{path} is no readable Parquet file ({error}); write it anew") from error


_ROWS: dict[str, Callable[[Path], Iterator[tuple[str, Row]]]] = {
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _table_rows,
    ".tsv": _table_rows,
    ".parquet": _parquet_rows,
}
