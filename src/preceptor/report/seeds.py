"""Figures of many runs as one: each curve is the mean over the runs, its band goes from the lowest to the highest."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from pathlib import Path

from preceptor.report.charts import declared_charts, series_panels
from preceptor.report.curves import MACHINE, MAXIMUM_POINTS, Chart, Curve, evenly_spaced, panels, standard_charts
from preceptor.report.run_folder import JsonObject, is_finite, read_run

MAXIMUM_LINES = 16
"""Of a chart; a comparison of many groups would draw more than can be told apart."""


def merged_charts(runs: Iterable[tuple[str, Path]]) -> list[JsonObject]:
    """The charts of finished ``runs`` as those of one, in the form that ``result.json`` holds them.

    What measures the machine (speed, memory) is left out, so that the same runs give the same charts.

    Args:
        runs: (label of its group, folder); curves of different groups stay apart.

    Raises:
        DataError: a folder that is no run, or a malformed file in it.
    """
    charts: dict[str, Chart] = {}
    curves: dict[str, dict[str, list[Curve]]] = {}
    tables: dict[str, list[JsonObject]] = {}
    for label, folder in runs:
        run = read_run(folder)
        own = (run.result or {}).get("charts", [])
        declared = declared_charts(own)
        taken = {column for chart in declared for column, _ in chart.columns}
        standard = [
            chart
            for chart in standard_charts(str((run.result or run.manifest).get("system")))
            if chart.name not in MACHINE and taken.isdisjoint(column for column, _ in chart.columns)
        ]
        for panel in (*panels(run.metrics, declared)[0], *series_panels(own), *panels(run.metrics, standard)[0]):
            charts.setdefault(panel.chart.title, panel.chart)
            of_chart = curves.setdefault(panel.chart.title, {})
            for drawn in (*panel.curves, *panel.bounds):
                of_chart.setdefault(f"{drawn.label} ({label})" if label else drawn.label, []).append(drawn)
        for chart in own:
            if chart.get("kind") == "matrix":
                tables.setdefault(f"{chart['title']}: {label}" if label else str(chart["title"]), []).append(chart)
    series = [_series(charts[title], dict(list(lines.items())[:MAXIMUM_LINES])) for title, lines in curves.items()]
    return [*series, *(_mean_matrix(title, found) for title, found in tables.items())]


def _series(chart: Chart, lines: dict[str, list[Curve]]) -> JsonObject:
    steps = sorted({step for found in lines.values() for curve in found for step in curve.steps})
    grid = [steps[k] for k in evenly_spaced(len(steps), MAXIMUM_POINTS)]
    drawn: dict[str, list[float | None]] = {}
    bands: dict[str, list[list[float | None]]] = {}
    for label, found in lines.items():
        at = [[value for curve in found if (value := interpolated(curve, step)) is not None] for step in grid]
        drawn[label] = [sum(values) / len(values) if values else None for values in at]
        bands[label] = [[choose(values) if values else None for values in at] for choose in (min, max)]
    return {
        "kind": "series",
        "title": chart.title,
        "unit": chart.unit,
        "x_label": chart.x_label,
        "x": grid,
        "lines": drawn,
        "bands": bands,
    }


def interpolated(curve: Curve, step: float) -> float | None:
    """The value of a curve at ``step``, linear between its points; ``None`` before the first and after the last.

    >>> interpolated(Curve("x", [1, 3], [0.0, 1.0], [], [], 0), 2)
    0.5
    """
    right = bisect_left(curve.steps, step)
    if right == len(curve.steps) or step < curve.steps[0]:
        return None
    if curve.steps[right] == step:
        return curve.values[right]
    begin, end = curve.steps[right - 1], curve.steps[right]
    share = (step - begin) / (end - begin)
    return (1 - share) * curve.values[right - 1] + share * curve.values[right]


def _mean_matrix(title: str, found: Sequence[JsonObject]) -> JsonObject:
    """Cell by cell over the runs that have the same rows and columns as the first; a cell that one lacks is lacking."""
    first = found[0]
    same = [chart for chart in found if (chart["rows"], chart["columns"]) == (first["rows"], first["columns"])]
    values = [
        [
            sum(cells) / len(cells) if all(map(is_finite, cells)) else None
            for cells in zip(*(chart["values"][row] for chart in same), strict=True)
        ]
        for row in range(len(first["rows"]))
    ]
    mean = f", mean of {len(same)} runs" if len(same) > 1 else ""
    low, high = (
        choose(chart[end] for chart in same) if all(is_finite(chart.get(end)) for chart in same) else None
        for end, choose in (("low", min), ("high", max))
    )
    return {**first, "title": f"{title}{mean}", "values": values, "low": low, "high": high}
