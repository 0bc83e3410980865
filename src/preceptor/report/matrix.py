"""Tables of numbers as shaded cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from preceptor.report.arms import title_case
from preceptor.report.drawing import fixed
from preceptor.report.run_folder import is_finite
from preceptor.report.sections import Matrix

NUM_SHADES = 8


@dataclass(frozen=True)
class Cell:
    """One number of a matrix, as text and as a shade from 0 to 7; no shade where it is not finite."""

    text: str
    shade: int | None


@dataclass(frozen=True)
class ShadedTable:
    """A matrix as its cells; ``low`` and ``high`` are the ends of the shades, as text."""

    title: str
    unit: str
    low: str
    high: str
    columns: list[str]
    rows: list[tuple[str, list[Cell]]]


def shaded_table(matrix: Matrix) -> ShadedTable:
    """The cells of ``matrix``."""
    finite = [value for row in matrix.values for value in row if is_finite(value)]
    low = matrix.low if is_finite(matrix.low) else min(finite, default=0.0)
    high = matrix.high if is_finite(matrix.high) else max(finite, default=0.0)
    rows = [
        (str(name), [_cell(value, low, high) for value in values])
        for name, values in zip(matrix.rows, matrix.values, strict=True)
    ]
    least, most = (fixed(end, high - low) for end in (low, high))
    return ShadedTable(title_case(matrix.title), matrix.unit, least, most, [str(c) for c in matrix.columns], rows)


def _cell(value: Any, low: float, high: float) -> Cell:
    if not is_finite(value):
        return Cell("\N{EN DASH}", None)
    share = (value - low) / (high - low) if high > low else 0.0
    return Cell(fixed(value, high - low), min(NUM_SHADES - 1, max(0, int(share * NUM_SHADES))))
