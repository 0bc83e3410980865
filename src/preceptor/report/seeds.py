"""Figures of many runs as one: each curve is the mean over the runs, its band goes from the lowest to the highest."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from preceptor.report.curves import MAXIMUM_POINTS, Curve, Panel, evenly_spaced, panels, series_panel
from preceptor.report.run_folder import JsonObject, RunFolder, is_finite, read_run
from preceptor.report.sections import GENERAL_LINES, Lines, Matrix, Section, Series, declared_figures

MAXIMUM_LINES = 16
"""Of a chart; a comparison of many groups would draw more than can be told apart."""


def merged_charts(
    runs: Iterable[tuple[str, Path]], sections: Callable[[RunFolder], list[Section]] | None = None
) -> list[JsonObject]:
    """The charts of finished ``runs`` as those of one, in the form that ``result.json`` holds them.

    What measures the machine (speed, memory) is left out, so that the same runs give the same charts.

    Args:
        runs: (label of its group, folder); curves of different groups stay apart.
        sections: of the system, which name its curves.

    Raises:
        DataError: a folder that is no run, or a malformed file in it.
    """
    drawn: dict[str, Panel] = {}
    curves: dict[str, dict[str, list[Curve]]] = {}
    matrices: dict[str, list[Matrix]] = {}
    for label, folder in runs:
        run = read_run(folder)
        declared = declared_figures((run.result or {}).get("charts", []))
        for panel in _panels(run, declared, sections):
            # The first run's panel gives title, unit and axis; later ones add curves to it.
            drawn.setdefault(panel.title, panel)
            of_panel = curves.setdefault(panel.title, {})
            for curve in (*panel.curves, *panel.bounds):
                # Runs of one group share a label and so become one curve; groups stay apart.
                of_panel.setdefault(f"{curve.label} ({label})" if label else curve.label, []).append(curve)
        for matrix in (figure for figure in declared if isinstance(figure, Matrix)):
            matrices.setdefault(f"{matrix.title}: {label}" if label else matrix.title, []).append(matrix)
    series = [_series(drawn[title], dict(list(lines.items())[:MAXIMUM_LINES])) for title, lines in curves.items()]
    return [*series, *(_mean_matrix(title, found) for title, found in matrices.items())]


def _panels(
    run: RunFolder,
    declared: Sequence[Lines | Series | Matrix],
    sections: Callable[[RunFolder], list[Section]] | None,
) -> list[Panel]:
    """The curves that the result declares, then those of the system's sections that show no column a second time."""
    lines = [figure for figure in declared if isinstance(figure, Lines)]
    taken = {column for own in lines for column in own.columns}
    named = [
        figure
        for section in (sections(run) if sections else [Section("", GENERAL_LINES)])
        for figure in section.figures
    ]
    further = [
        figure
        for figure in named
        if isinstance(figure, Lines) and not figure.about_the_machine and taken.isdisjoint(figure.columns)
    ]
    series = [series_panel(figure) for figure in declared if isinstance(figure, Series)]
    return [
        *panels(run.metrics, lines)[0],
        *(panel for panel in series if panel is not None),
        *panels(run.metrics, further)[0],
    ]


def _series(panel: Panel, lines: dict[str, list[Curve]]) -> JsonObject:
    # Runs may have logged different steps (stopped early, other schedules): take all of them, then thin.
    steps = sorted({step for found in lines.values() for curve in found for step in curve.steps})
    grid = [steps[k] for k in evenly_spaced(len(steps), MAXIMUM_POINTS)]
    drawn: dict[str, list[float | None]] = {}
    bands: dict[str, list[list[float | None]]] = {}
    for label, found in lines.items():
        # A run contributes where it has data and is not extrapolated beyond.
        at = [[value for curve in found if (value := interpolated(curve, step)) is not None] for step in grid]
        drawn[label] = [sum(values) / len(values) if values else None for values in at]
        bands[label] = [[choose(values) if values else None for values in at] for choose in (min, max)]
    return {
        "kind": "series",
        "title": panel.title,
        "unit": panel.unit,
        "x_label": panel.x_label,
        "x": grid,
        "lines": drawn,
        # Lowest and highest run, not an interval: with few seeds that is all that can be said.
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


def _mean_matrix(title: str, found: Sequence[Matrix]) -> JsonObject:
    """Cell by cell over the runs that have the same rows and columns as the first; a cell that one lacks is lacking."""
    first = found[0]
    # Matrices of another shape are no measurement of the same thing.
    same = [matrix for matrix in found if (matrix.rows, matrix.columns) == (first.rows, first.columns)]
    values = [
        [
            # A mean over fewer runs than the title says would mislead, so one missing cell blanks it.
            sum(cells) / len(cells) if all(map(is_finite, cells)) else None
            for cells in zip(*(matrix.values[row] for matrix in same), strict=True)
        ]
        for row in range(len(first.rows))
    ]
    mean = f", mean of {len(same)} runs" if len(same) > 1 else ""
    lows = [matrix.low for matrix in same if is_finite(matrix.low)]
    highs = [matrix.high for matrix in same if is_finite(matrix.high)]
    return {
        "kind": "matrix",
        "title": f"{title}{mean}",
        "unit": first.unit,
        "rows": first.rows,
        "columns": first.columns,
        "values": values,
        # Bounds of the colours hold only if every run states them.
        "low": min(lows) if len(lows) == len(same) else None,
        "high": max(highs) if len(highs) == len(same) else None,
    }
