"""Which columns of ``metrics.jsonl`` are drawn together, and how a column becomes a curve with a band."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from preceptor.report.run_folder import JsonObject, is_finite

MAXIMUM_POINTS = 300
WINDOWS_PER_RUN = 20


@dataclass(frozen=True)
class Chart:
    """A panel: one unit, one or more columns, and the line that they are read against."""

    name: str
    title: str
    unit: str
    columns: tuple[tuple[str, str], ...]
    """(column, label) of each curve."""
    maximum: tuple[str, str] | None = None
    """(column, label) of a curve that bounds the others, drawn dotted."""
    limits: tuple[float, float] | None = None
    """The range of the axis where the quantity has one."""


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
    maximum: Curve | None = None
    notes: list[str] = field(default_factory=list)


def panels(rows: Sequence[JsonObject]) -> tuple[list[Panel], list[str]]:
    """The panels that ``rows`` have data for, and the titles of those left out."""
    drawn, left_out = [], []
    for chart in CHARTS:
        curves = [c for column, label in chart.columns if (c := curve(rows, column, label=label)) is not None]
        if not curves:
            left_out.append(chart.title)
            continue
        bound = curve(rows, *chart.maximum[:1], label=chart.maximum[1]) if chart.maximum else None
        notes = [f"{c.label}: no finite value at {c.num_missing} of the steps" for c in curves if c.num_missing]
        drawn.append(Panel(chart, curves, bound, notes))
    return drawn, left_out


def curve(rows: Sequence[JsonObject], column: str, *, label: str) -> Curve | None:
    """The curve of a column, or ``None`` where no row has a finite number in it.

    Value and band are mean and standard deviation in a centred window of a twentieth of the run; at most
    ``MAXIMUM_POINTS`` are kept, evenly spaced, the last one among them.
    """
    present = [row for row in rows if column in row]
    points = [(row["step"], float(row[column])) for row in present if is_finite(row[column])]
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
