"""How columns of ``metrics.jsonl``, and numbers that are given, become curves with bands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from preceptor.report.arms import title_case
from preceptor.report.run_folder import JsonObject, is_finite
from preceptor.report.sections import Lines, Series

MAXIMUM_POINTS = 300
"""Of one curve; a chart of many has fewer of each, so that no chart outgrows the page."""
MAXIMUM_POINTS_OF_A_CHART = 1_200
MAXIMUM_BANDS = 4
"""More curves than these are drawn without bands, which would only cover each other."""
WINDOWS_PER_RUN = 20
STEPS_OF_AN_ARM = ("arm_step", "stretch_step")
"""Columns that count a method's own steps, where a run trains one method after the other."""
COUNTERS = ("step", "seconds", "arm_number", "epoch", *STEPS_OF_AN_ARM)
"""Columns that say when a row was written and are no curves."""
ABSENT = object()


@dataclass(frozen=True)
class Curve:
    """One column over the steps, smoothed; ``low`` and ``high`` are the ends of its band."""

    label: str
    steps: list[int]
    values: list[float]
    low: list[float]
    high: list[float]
    num_missing: int
    """Rows that have the column but no finite number in it."""


@dataclass(frozen=True)
class Panel:
    """Curves of one unit on common axes."""

    title: str
    unit: str
    curves: list[Curve]
    bounds: list[Curve] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    x_label: str = "step"
    limits: tuple[float, float] | None = None


def panels(rows: Sequence[JsonObject], figures: Sequence[Lines]) -> tuple[list[Panel], list[str]]:
    """The panels of ``figures`` that ``rows`` have data for, and the titles of those left out.

    Where a run trains one method after the other, each has a curve of its own over its own steps.
    """
    drawn, left_out = [], []
    # Methods that train one after the other share the run's step counter; their own counters make them comparable.
    x = next((name for name in STEPS_OF_AN_ARM if any(name in row for row in rows)), "step")
    for lines in figures:
        curves = _curves(rows, lines, x)
        if not curves:
            left_out.append(lines.title)
            continue
        bound = curve(rows, lines.maximum[0], label=lines.maximum[1], x=x) if lines.maximum else None
        # The constant needs a point wherever a curve begins or ends, and no others.
        steps = sorted({step for c in curves for step in (c.steps[0], c.steps[-1])})
        levels = [level(label, value, steps) for label, value in lines.constants.items()]
        drawn.append(
            Panel(
                title=title_case(lines.title),
                unit=lines.unit,
                curves=legible(curves),
                bounds=[*([bound] if bound else []), *levels],
                notes=[f"{c.label}: no finite value at {c.num_missing} of the steps" for c in curves if c.num_missing],
                x_label="step" if x == "step" else "step of its own training",
                limits=lines.limits,
            )
        )
    return drawn, left_out


def series_panel(series: Series) -> Panel | None:
    """The panel of a :class:`Series`, thinned to ``MAXIMUM_POINTS``; points that are not finite are left out."""
    # Thinned first: points that are not finite then leave a shorter line, never another spacing.
    kept = evenly_spaced(len(series.x), MAXIMUM_POINTS)
    curves = []
    for label, values in series.lines.items():
        points = [at for at in kept if at < len(values) and is_finite(values[at])]
        low, high = ([ends[at] for at in points] for ends in (series.bands.get(label) or (values, values)))
        steps = [series.x[at] for at in points]
        if points:
            curves.append(Curve(str(label), steps, [values[at] for at in points], low, high, 0))  # type: ignore[arg-type, misc]
    if not curves:
        return None
    return Panel(
        title_case(series.title), series.unit, curves if series.bands else legible(curves), x_label=series.x_label
    )


def _curves(rows: Sequence[JsonObject], lines: Lines, x: str) -> list[Curve]:
    found = []
    for column, label in lines.columns.items():
        # A row without the column is another kind of row; a row with a NaN in it is a missing value. They are told
        # apart.
        having = [row for row in rows if value_at(row, column) is not ABSENT]
        for part, own in _parts(having, "arm" if x != "step" else lines.split_by):
            name = label if part is None else part if len(lines.columns) == 1 else f"{label}, {part}"
            if (drawn := curve(own, column, label=name, x=x)) is not None:
                found.append(drawn)
    return found


def _parts(rows: Sequence[JsonObject], key: str | None) -> list[tuple[str | None, Sequence[JsonObject]]]:
    """``rows`` by their ``key``, or as they are where there is none, one of them lacks it or all have the same."""
    parts: dict[str, list[JsonObject]] = {}
    for row in rows:
        parts.setdefault(str(row.get(key, "")) if key else "", []).append(row)
    return [(None, rows)] if "" in parts or len(parts) < 2 else list(parts.items())


def legible(curves: Sequence[Curve]) -> list[Curve]:
    """``curves`` with fewer points each where there are many, and then without bands."""
    # Fewer points each where there are many curves, yet enough of each to show its shape.
    kept = max(50, MAXIMUM_POINTS_OF_A_CHART // max(1, len(curves)))
    thinned = []
    for c in curves:
        at = evenly_spaced(len(c.steps), kept)
        low, high = (c.values, c.values) if len(curves) > MAXIMUM_BANDS else (c.low, c.high)
        steps, values, low, high = ([sequence[k] for k in at] for sequence in (c.steps, c.values, low, high))
        thinned.append(Curve(c.label, steps, values, low, high, c.num_missing))  # type: ignore[arg-type]
    return thinned


def level(label: str, value: float, steps: Sequence[int]) -> Curve:
    """A constant as a curve over ``steps``."""
    values = [value] * len(steps)
    return Curve(label, list(steps), values, values, values, 0)


def other_lines(rows: Sequence[JsonObject], figures: Sequence[Lines]) -> list[Lines]:
    """A panel for every column of numbers that none of ``figures`` draws, in order of first appearance.

    Entries of a column that is named like a method are drawn metric by metric, with the methods as curves.
    """
    drawn = {column for lines in figures for column in lines.columns}
    drawn |= {lines.maximum[0] for lines in figures if lines.maximum}
    methods = {str(row["arm"]) for row in rows if "arm" in row}
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        # Order of first appearance, which is the order in which the system computes them.
        for column, value in row.items():
            if column in COUNTERS:
                continue
            if is_finite(value) and column not in drawn:
                found.setdefault(column, {})[column] = title_case(column)
            elif isinstance(value, dict) and column in methods:
                for metric, entry in value.items():
                    if is_finite(entry) and f"{column}.{metric}" not in drawn:
                        found.setdefault(metric, {})[f"{column}.{metric}"] = column
    return [Lines(name, "", columns) for name, columns in found.items()]


def value_at(row: JsonObject, column: str) -> Any:
    """The entry ``column`` of ``row``, or with a dot an entry of an entry; :data:`ABSENT` where there is none.

    >>> value_at({"weights": {"books": 0.5}}, "weights.books")
    0.5
    """
    # The whole name comes first: a dot may belong to it.
    if column in row:
        return row[column]
    for dot in (at for at, character in enumerate(column) if character == "."):  # a name may have dots of its own
        nested = row.get(column[:dot])
        if isinstance(nested, dict) and (value := value_at(nested, column[dot + 1 :])) is not ABSENT:
            return value
    return ABSENT


def curve(rows: Sequence[JsonObject], column: str, *, label: str, x: str = "step") -> Curve | None:
    """The curve of a column, or ``None`` where no row has a finite number in it.

    Value and band are mean and standard deviation in a centred window of a twentieth of the run, the band cut off at
    the least and the greatest value in the window; at most ``MAXIMUM_POINTS`` are kept, evenly spaced, the last one
    among them. ``x`` is the column of the steps.
    """
    present = [(row[x], value) for row in rows if x in row and (value := value_at(row, column)) is not ABSENT]
    points = [(step, float(value)) for step, value in present if is_finite(value)]
    if not points:
        return None
    # Half a window: a fortieth of the run on either side, and none at all in runs of fewer than 40 steps.
    half = len(points) // (2 * WINDOWS_PER_RUN)
    centres = evenly_spaced(len(points), MAXIMUM_POINTS)
    values, low, high = [], [], []
    for centre in centres:
        # Shorter at both ends, where the window would leave the run.
        window = [value for _, value in points[max(0, centre - half) : centre + half + 1]]
        mean = sum(window) / len(window)
        # Divided by n: the spread of these very points, not an estimate of something beyond them.
        deviation = math.sqrt(sum((value - mean) ** 2 for value in window) / len(window))
        values.append(mean)
        # A skewed window would otherwise have a band where there are no points, such as below a loss of 0.
        low.append(max(mean - deviation, min(window)))
        high.append(min(mean + deviation, max(window)))
    return Curve(label, [points[centre][0] for centre in centres], values, low, high, len(present) - len(points))


def evenly_spaced(count: int, maximum: int) -> list[int]:
    """At most ``maximum`` of the indices 0 to ``count - 1``, evenly spaced, first and last among them.

    >>> evenly_spaced(9, 3), evenly_spaced(2, 5)
    ([0, 4, 8], [0, 1])
    """
    if count <= maximum:
        return list(range(count))
    # Rounded positions of an even grid, so that the first and the last index are exact.
    return [round(k * (count - 1) / (maximum - 1)) for k in range(maximum)]
