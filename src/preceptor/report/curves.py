"""How columns of ``metrics.jsonl`` become curves with bands, and which of them every system is drawn with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from preceptor.report.arms import title_case
from preceptor.report.run_folder import JsonObject, is_finite

MAXIMUM_POINTS = 300
"""Of one curve; a chart of many has fewer of each, so that no chart outgrows the page."""
MAXIMUM_POINTS_OF_A_CHART = 1_200
MAXIMUM_BANDS = 4
"""More curves than these are drawn without bands, which would only cover each other."""
WINDOWS_PER_RUN = 20
STEPS_OF_AN_ARM = ("arm_step", "stretch_step")
"""Columns that count an arm's own steps, where a run trains one arm after the other."""
COUNTERS = ("step", "seconds", "arm_number", "epoch", *STEPS_OF_AN_ARM)
"""Columns that say when a row was written and are no curves."""
ABSENT = object()


@dataclass(frozen=True)
class Chart:
    """A panel: one unit, one or more columns, and the lines that they are read against."""

    name: str
    title: str
    unit: str
    columns: tuple[tuple[str, str], ...]
    """(column, label) of each curve; ``a.b`` is the entry ``b`` of the column ``a``."""
    maximum: tuple[str, str] | None = None
    """(column, label) of a curve that bounds the others, drawn dotted."""
    limits: tuple[float, float] | None = None
    """The range of the axis where the quantity has one."""
    constants: tuple[tuple[str, float], ...] = ()
    """(label, value) of level lines, drawn dotted."""
    x_label: str = "step"


READING_CHARTS = (
    Chart("reward", "Reward", "nats per value token", (("reward", "reward"),)),
    Chart("normalised_reward", "Normalised reward", "nats per value token", (("normalised_reward", "normalised"),)),
    Chart("gap", "Gap closed, training", "share", (("gap_closed_train", "gap closed"),)),
    Chart(
        "query_entropy",
        "Query entropy",
        "nats per token",
        (("query_entropy", "query entropy"),),
        maximum=("query_entropy_maximum", "maximum"),
    ),
    Chart(
        "selection_entropy",
        "Selection entropy",
        "share of ln(remaining)",
        (("selection_entropy", "selection entropy"),),
        limits=(0.0, 1.0),
    ),
    Chart("kl", "KL on value tokens", "nats per token", (("kl", "KL"),)),
    Chart("selection_kl", "KL on selections", "nats per step", (("selection_kl", "selection KL"),)),
    Chart("passed_fraction", "Passing the filter", "share", (("passed_fraction", "passed"),), limits=(0.0, 1.0)),
    Chart("policy_loss", "Policy loss", "dimensionless", (("policy_loss", "loss"),)),
    Chart("gradient_norm", "Gradient norm", "dimensionless", (("gradient_norm", "norm"),)),
    Chart("tokens_per_second", "Speed", "tokens per second", (("tokens_per_second", "speed"),)),
    Chart("peak_memory", "Peak memory", "MiB", (("peak_memory_mib", "memory"),)),
)
OTHER_CHARTS = (
    Chart("reward", "Reward", "", (("reward", "reward"),)),
    Chart("kl", "KL to the reference", "nats", (("kl", "KL"),)),
    *READING_CHARTS[-4:],
)
MACHINE = ("tokens_per_second", "peak_memory")
"""Charts of the machine rather than of what is learned."""


def standard_charts(system: str) -> tuple[Chart, ...]:
    """The charts that every run of ``system`` is drawn with."""
    return READING_CHARTS if system == "reading" else OTHER_CHARTS


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
    """A chart with the data of one run."""

    chart: Chart
    curves: list[Curve]
    bounds: list[Curve] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def panels(rows: Sequence[JsonObject], charts: Sequence[Chart]) -> tuple[list[Panel], list[str]]:
    """The panels of ``charts`` that ``rows`` have data for, and the titles of those left out.

    Where a run trains one arm after the other, each arm has a curve of its own over its own steps.
    """
    drawn, left_out = [], []
    x = next((name for name in STEPS_OF_AN_ARM if any(name in row for row in rows)), "step")
    for chart in charts:
        curves = _curves(rows, chart, x)
        if not curves:
            left_out.append(chart.title)
            continue
        bound = curve(rows, chart.maximum[0], label=chart.maximum[1], x=x) if chart.maximum else None
        steps = sorted({step for c in curves for step in (c.steps[0], c.steps[-1])})
        levels = [level(label, value, steps) for label, value in chart.constants]
        notes = [f"{c.label}: no finite value at {c.num_missing} of the steps" for c in curves if c.num_missing]
        if x != "step":
            chart = replace(chart, x_label="step of the arm")
        drawn.append(Panel(chart, legible(curves), [*([bound] if bound else []), *levels], notes))
    return drawn, left_out


def _curves(rows: Sequence[JsonObject], chart: Chart, x: str) -> list[Curve]:
    found = []
    for column, label in chart.columns:
        having = [row for row in rows if value_at(row, column) is not ABSENT]
        parts = _parts(having, "arm" if x != "step" else "bandit" if chart in OTHER_CHARTS[:1] else None)
        for part, own in parts:
            name = label if part is None else part if len(chart.columns) == 1 else f"{label}, {part}"
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


def other_charts(rows: Sequence[JsonObject], charts: Sequence[Chart]) -> list[Chart]:
    """A chart of its own for every column of numbers that none of ``charts`` draws, in order of first appearance.

    Entries of a column that is named like an arm are drawn metric by metric, with the arms as curves.
    """
    drawn = {column for chart in charts for column, _ in chart.columns} | {c.maximum[0] for c in charts if c.maximum}
    arms = {str(row["arm"]) for row in rows if "arm" in row}
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        for column, value in row.items():
            if column in COUNTERS:
                continue
            if is_finite(value) and column not in drawn:
                found.setdefault(column, {})[column] = title_case(column)
            elif isinstance(value, dict) and column in arms:
                for metric, entry in value.items():
                    if is_finite(entry) and f"{column}.{metric}" not in drawn:
                        found.setdefault(metric, {})[f"{column}.{metric}"] = column
    return [Chart(f"other-{name}", title_case(name), "", tuple(columns.items())) for name, columns in found.items()]


def value_at(row: JsonObject, column: str) -> Any:
    """The entry ``column`` of ``row``, or with a dot an entry of an entry; :data:`ABSENT` where there is none.

    >>> value_at({"weights": {"books": 0.5}}, "weights.books")
    0.5
    """
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
    half = len(points) // (2 * WINDOWS_PER_RUN)
    centres = evenly_spaced(len(points), MAXIMUM_POINTS)
    values, low, high = [], [], []
    for centre in centres:
        window = [value for _, value in points[max(0, centre - half) : centre + half + 1]]
        mean = sum(window) / len(window)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in window) / len(window))
        values.append(mean)
        low.append(max(mean - deviation, min(window)))
        high.append(min(mean + deviation, max(window)))
    return Curve(label, [points[centre][0] for centre in centres], values, low, high, len(present) - len(points))


def reward_by_position(rows: Sequence[JsonObject], *, share: float = 0.1) -> tuple[list[float], list[float]] | None:
    """Mean reward at each position of the trajectory over the first and over the last ``share`` of the steps.

    A position that some steps lack is averaged over those that have it. ``None`` where the column is absent.
    """
    lists = [row["reward_by_position"] for row in rows if isinstance(row.get("reward_by_position"), list)]
    if not lists:
        return None
    count = max(1, int(len(lists) * share))
    return _mean_by_position(lists[:count]), _mean_by_position(lists[-count:])


def _mean_by_position(lists: Sequence[list[Any]]) -> list[float]:
    columns = [[row[k] for row in lists if k < len(row) and is_finite(row[k])] for k in range(max(map(len, lists)))]
    return [sum(column) / len(column) for column in columns if column]


def evenly_spaced(count: int, maximum: int) -> list[int]:
    """At most ``maximum`` of the indices 0 to ``count - 1``, evenly spaced, first and last among them.

    >>> evenly_spaced(9, 3), evenly_spaced(2, 5)
    ([0, 4, 8], [0, 1])
    """
    if count <= maximum:
        return list(range(count))
    return [round(k * (count - 1) / (maximum - 1)) for k in range(maximum)]
