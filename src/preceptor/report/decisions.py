"""Rows of ``decisions.jsonl`` as a plain table, for systems whose decisions are not readings."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

from preceptor.report.curves import evenly_spaced
from preceptor.report.drawing import number
from preceptor.report.run_folder import parse_row, read_rows
from preceptor.report.trajectories import clipped

MAXIMUM_ROWS = 200
MAXIMUM_COLUMNS = 12
MAXIMUM_CELL = 200
"""Characters."""


@dataclass(frozen=True)
class Decisions:
    """Some rows, evenly spaced over the run, and how many there are."""

    columns: list[str]
    rows: list[list[str]]
    num_rows: int


def are_readings(decisions: Path) -> bool:
    """Whether the rows are episodes of reading, which the trajectory viewer shows."""
    return any("reader_spans" in row for _, row in itertools.islice(read_rows(decisions), 1))


def decision_table(decisions: Path) -> Decisions:
    """At most ``MAXIMUM_ROWS`` rows as text.

    Raises:
        DataError: a malformed row, naming its line.
    """
    offsets = [offset for offset, _ in read_rows(decisions)]
    chosen = []
    with decisions.open("rb") as file:
        for index in evenly_spaced(len(offsets), MAXIMUM_ROWS) if offsets else []:
            file.seek(offsets[index])
            chosen.append(parse_row(file.readline(), where=f"{decisions}:{index + 1}"))
    columns = list(dict.fromkeys(key for row in chosen for key in row))[:MAXIMUM_COLUMNS]
    return Decisions(columns, [[_text(row.get(column)) for column in columns] for row in chosen], len(offsets))


def _text(value: object) -> str:
    """A value as a reader wants it.

    >>> _text([0.123456, "a"]), _text(None)
    ('0.1235, a', '')
    """
    if value is None:
        return ""
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list) and not any(isinstance(entry, list | dict) for entry in value):
        return clipped(", ".join(_text(entry) for entry in value), MAXIMUM_CELL)
    return clipped(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), MAXIMUM_CELL)
