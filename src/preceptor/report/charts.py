"""The figures that a result asks for: curves of its metrics, curves of its own, and matrices.

``result.json`` may hold ``charts``, a list of objects:

``{"kind": "lines", "title", "unit", "columns": {column: label}, "constants": {label: value}}``
    columns of ``metrics.jsonl`` over the steps; ``a.b`` is the entry ``b`` of the column ``a``;
``{"kind": "series", "title", "unit", "x_label", "x": [...], "lines": {label: [...]}, "bands": {label: [low, high]}}``
    numbers of the result; ``low`` and ``high`` are lists, the ends of a band, for the lines that have one;
``{"kind": "matrix", "title", "unit", "rows": [...], "columns": [...], "values": [[...]], "low", "high"}``
    a table whose cells are shaded from ``low`` to ``high``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from preceptor.errors import DataError
from preceptor.report.arms import title_case
from preceptor.report.curves import MAXIMUM_POINTS, Chart, Curve, Panel, evenly_spaced, legible
from preceptor.report.drawing import fixed
from preceptor.report.run_folder import JsonObject, is_finite

NUM_SHADES = 8
_NEEDED = {
    "lines": ("columns",),
    "series": ("x_label", "x", "lines"),
    "matrix": ("rows", "columns", "values"),
}


@dataclass(frozen=True)
class Cell:
    """One number of a matrix, as text and as a shade from 0 to 7; no shade where it is not finite."""

    text: str
    shade: int | None


@dataclass(frozen=True)
class Matrix:
    """A table of numbers."""

    title: str
    unit: str
    low: str
    high: str
    columns: list[str]
    rows: list[tuple[str, list[Cell]]]


def declared_charts(charts: Sequence[JsonObject]) -> list[Chart]:
    """The charts of kind ``lines``.

    Raises:
        DataError: a chart is not one of those described above.
    """
    return [
        Chart(
            name=f"declared-{index}",
            title=title_case(str(chart["title"])),
            unit=str(chart["unit"]),
            columns=tuple((str(column), str(label)) for column, label in chart["columns"].items()),
            constants=tuple((str(label), float(value)) for label, value in chart.get("constants", {}).items()),
        )
        for index, chart in enumerate(charts)
        if _kind(chart) == "lines"
    ]


def series_panels(charts: Sequence[JsonObject]) -> list[Panel]:
    """The charts of kind ``series``, thinned to ``MAXIMUM_POINTS``; points that are not finite are left out.

    Raises:
        DataError: a chart is not one of those described above.
    """
    found = []
    for index, chart in enumerate(charts):
        if _kind(chart) != "series":
            continue
        kept = evenly_spaced(len(chart["x"]), MAXIMUM_POINTS)
        curves = []
        for label, values in chart["lines"].items():
            band = chart.get("bands", {}).get(label)
            points = [at for at in kept if at < len(values) and is_finite(values[at])]
            low, high = ([ends[at] for at in points] for ends in (band or (values, values)))
            steps = [chart["x"][at] for at in points]
            if points:
                curves.append(Curve(str(label), steps, [values[at] for at in points], low, high, 0))
        described = Chart(
            f"series-{index}", title_case(str(chart["title"])), str(chart["unit"]), (), x_label=str(chart["x_label"])
        )
        if curves:
            found.append(Panel(described, curves if chart.get("bands") else legible(curves)))
    return found


def matrices(charts: Sequence[JsonObject]) -> list[Matrix]:
    """The charts of kind ``matrix``.

    Raises:
        DataError: a chart is not one of those described above.
    """
    found = []
    for chart in charts:
        if _kind(chart) != "matrix":
            continue
        finite = [value for row in chart["values"] for value in row if is_finite(value)]
        low, high = (
            chart[end] if is_finite(chart.get(end)) else choose(finite, default=0.0)
            for end, choose in (("low", min), ("high", max))
        )
        rows = [
            (str(name), [_cell(value, low, high) for value in values])
            for name, values in zip(chart["rows"], chart["values"], strict=True)
        ]
        columns = [str(column) for column in chart["columns"]]
        least, most = (fixed(end, high - low) for end in (low, high))
        found.append(Matrix(title_case(str(chart["title"])), str(chart["unit"]), least, most, columns, rows))
    return found


def _cell(value: Any, low: float, high: float) -> Cell:
    if not is_finite(value):
        return Cell("\N{EN DASH}", None)
    share = (value - low) / (high - low) if high > low else 0.0
    return Cell(fixed(value, high - low), min(NUM_SHADES - 1, max(0, int(share * NUM_SHADES))))


def _kind(chart: Any) -> str:
    kind = chart.get("kind") if isinstance(chart, Mapping) else None
    missing = [key for key in ("title", "unit", *_NEEDED.get(str(kind), ())) if key not in chart] if kind else []
    if kind not in _NEEDED or missing:
        lack = f"lacks {', '.join(missing)}" if missing else f"is of no kind of {', '.join(_NEEDED)}"
        raise DataError(f"a chart of result.json {lack}, got {str(chart)[:200]}.")
    return str(kind)
