"""How columns of ``metrics.jsonl`` become curves with bands, and which of them every system is drawn with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from preceptor.report.run_folder import JsonObject, is_finite

MAXIMUM_POINTS = 300
WINDOWS_PER_RUN = 20
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


CHARTS = (
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


@dataclass(frozen=True)
class Curve:
    """One column over the steps, smoothed; ``low`` and ``high`` are one standard deviation of the window around it."""

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


def panels(rows: Sequence[JsonObject], charts: Sequence[Chart] = CHARTS) -> tuple[list[Panel], list[str]]:
    """The panels of ``charts`` that ``rows`` have data for, and the titles of those left out."""
    drawn, left_out = [], []
    for chart in charts:
        curves = [c for column, label in chart.columns if (c := curve(rows, column, label=label)) is not None]
        if not curves:
            left_out.append(chart.title)
            continue
        bound = curve(rows, chart.maximum[0], label=chart.maximum[1]) if chart.maximum else None
        steps = sorted({step for c in curves for step in (c.steps[0], c.steps[-1])})
        levels = [level(label, value, steps) for label, value in chart.constants]
        notes = [f"{c.label}: no finite value at {c.num_missing} of the steps" for c in curves if c.num_missing]
        drawn.append(Panel(chart, curves, [*([bound] if bound else []), *levels], notes))
    return drawn, left_out


def level(label: str, value: float, steps: Sequence[int]) -> Curve:
    """A constant as a curve over ``steps``."""
    values = [value] * len(steps)
    return Curve(label, list(steps), values, values, values, 0)


def other_charts(rows: Sequence[JsonObject], charts: Sequence[Chart]) -> list[Chart]:
    """A chart of its own for every column of numbers that none of ``charts`` draws, in order of first appearance."""
    known = {column.partition(".")[0] for chart in charts for column, _ in chart.columns}
    known |= {chart.maximum[0] for chart in charts if chart.maximum} | {"step", "seconds"}
    found: dict[str, Chart] = {}
    for row in rows:
        for column, value in row.items():
            if column not in known and column not in found and is_finite(value):
                found[column] = Chart(column, column.replace("_", " "), "", ((column, column.replace("_", " ")),))
    return list(found.values())


def value_at(row: JsonObject, column: str) -> Any:
    """The entry ``column`` of ``row``, or with a dot an entry of an entry; :data:`ABSENT` where there is none.

    >>> value_at({"weights": {"books": 0.5}}, "weights.books")
    0.5
    """
    if column in row:
        return row[column]
    outer, dot, inner = column.partition(".")
    nested = row.get(outer)
    return value_at(nested, inner) if dot and isinstance(nested, dict) else ABSENT


def curve(rows: Sequence[JsonObject], column: str, *, label: str) -> Curve | None:
    """The curve of a column, or ``None`` where no row has a finite number in it.

    Value and band are mean and standard deviation in a centred window of a twentieth of the run; at most
    ``MAXIMUM_POINTS`` are kept, evenly spaced, the last one among them.
    """
    present = [(row["step"], value) for row in rows if (value := value_at(row, column)) is not ABSENT]
    points = [(step, float(value)) for step, value in present if is_finite(value)]
    if not points:
        return None
    half = len(points) // (2 * WINDOWS_PER_RUN)
    centres = evenly_spaced(len(points), MAXIMUM_POINTS)
    values, deviations = [], []
    for centre in centres:
        window = [value for _, value in points[max(0, centre - half) : centre + half + 1]]
        mean = sum(window) / len(window)
        values.append(mean)
        deviations.append(math.sqrt(sum((value - mean) ** 2 for value in window) / len(window)))
    return Curve(
        label=label,
        steps=[points[centre][0] for centre in centres],
        values=values,
        low=[value - deviation for value, deviation in zip(values, deviations, strict=True)],
        high=[value + deviation for value, deviation in zip(values, deviations, strict=True)],
        num_missing=len(present) - len(points),
    )


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
