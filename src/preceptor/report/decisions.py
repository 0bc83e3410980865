"""Rows of ``decisions.jsonl`` as plain tables, one for each kind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from preceptor.report.arms import title_case
from preceptor.report.curves import evenly_spaced
from preceptor.report.drawing import clipped, number
from preceptor.report.run_folder import RunFolder, parse_row, read_rows
from preceptor.report.sections import Section, Table

MAXIMUM_ROWS = 200
"""Of all tables together."""
MAXIMUM_COLUMNS = 12
MAXIMUM_CELL = 200
"""Characters."""
TOKEN_IDS = "token_ids"
"""What columns of numbers end with that only a tokenizer reads."""


def decisions_section(run: RunFolder) -> list[Section]:
    """A section with the run's decisions as tables; none where nothing was recorded."""
    tables = decision_tables(run.decisions) if run.decisions is not None else []
    return [Section("What was decided", tables)] if tables else []


def decision_tables(decisions: Path) -> list[Table]:
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
            what = "rows" if kind else "decisions"
            shown = (
                f"All {len(found)} recorded {what}."
                if len(rows) == len(found)
                else f"{len(rows)} of {len(found):,} recorded {what}, evenly spaced over the run."
            )
            tables.append(Table(title_case(kind), [title_case(column) for column in columns], rows, note=shown))
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
