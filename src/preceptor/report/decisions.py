"""Rows of ``decisions.jsonl`` as plain tables, one for each kind, for systems whose decisions are no readings."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from preceptor.report.arms import title_case
from preceptor.report.curves import evenly_spaced
from preceptor.report.drawing import number
from preceptor.report.run_folder import parse_row, read_rows
from preceptor.report.trajectories import clipped

MAXIMUM_ROWS = 200
"""Of all tables together."""
MAXIMUM_COLUMNS = 12
MAXIMUM_CELL = 200
"""Characters."""
TOKEN_IDS = "token_ids"
"""What columns of numbers end with that only a tokenizer reads."""


@dataclass(frozen=True)
class Decisions:
    """Some rows of one kind, evenly spaced over the run, and how many there are."""

    kind: str
    columns: list[str]
    rows: list[list[str]]
    num_rows: int


def are_readings(decisions: Path) -> bool:
    """Whether the rows are episodes of reading, which the trajectory viewer shows."""
    return any("reader_spans" in row for _, row in itertools.islice(read_rows(decisions), 1))


def decision_tables(decisions: Path) -> list[Decisions]:
    """A table for each ``kind`` of row, or one where rows have none; at most ``MAXIMUM_ROWS`` rows in all, as text.

    Raises:
        DataError: a malformed row, naming its line.
    """
    places: dict[str, list[tuple[int, int]]] = {}
    for line, (offset, row) in enumerate(read_rows(decisions), start=1):
        places.setdefault(str(row.get("kind", "")), []).append((offset, line))
    tables = []
    with decisions.open("rb") as file:
        for kind, found in places.items():
            chosen = []
            for index in evenly_spaced(len(found), max(2, MAXIMUM_ROWS // len(places))):
                offset, line = found[index]
                file.seek(offset)
                chosen.append(parse_row(file.readline(), where=f"{decisions}:{line}"))
            names = dict.fromkeys(key for row in chosen for key in row if row[key] is not None)
            columns = [name for name in names if name != "kind" and not name.endswith(TOKEN_IDS)][:MAXIMUM_COLUMNS]
            rows = [
                [
                    _text(title_case(str(row[column])) if column == "arm" and column in row else row.get(column))
                    for column in columns
                ]
                for row in chosen
            ]
            tables.append(Decisions(kind, columns, rows, len(found)))
    return tables


def _text(value: object) -> str:
    """A value as a reader wants it.

    >>> _text([0.123456, "a"]), _text({"mean": [1.0, 2.5], "n": 3}), _text(True), _text(None)
    ('0.1235, a', 'mean 1, 2.5; n 3', 'yes', '')
    """
    return clipped(_words(value), MAXIMUM_CELL)


def _words(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list) and not any(isinstance(entry, list | dict) for entry in value):
        return ", ".join(_words(entry) for entry in value)
    if isinstance(value, Mapping):
        return "; ".join(f"{title_case(key)} {_words(entry)}" for key, entry in value.items())
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
