"""The geometry of the page's drawings: numbers in, coordinates and path strings out. The templates write the SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from preceptor.report.arms import Arms, spelled
from preceptor.report.curves import Chart, Curve, Panel

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 18, 10, 24
ROW, LABEL = 22, 118


@dataclass(frozen=True)
class Tick:
    """A position along an axis, in the drawing's units, and what stands there."""

    at: float
    label: str


@dataclass(frozen=True)
class Line:
    """A curve as path strings: itself and the band around it ("" where there is none)."""

    label: str
    path: str
    band: str
    last: str


@dataclass(frozen=True)
class LineChart:
    """Everything that a curve panel's SVG needs; ``data`` is what the pointer reads off it."""

    name: str
    title: str
    unit: str
    lines: list[Line]
    bounds: list[Line]
    x_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    notes: list[str]
    data: dict[str, Any]


@dataclass(frozen=True)
class ArmRow:
    """One arm's interval: coordinates of its ends and its mean."""

    name: str
    kind: str
    y: float
    low: float | None
    high: float | None
    mean: float
    text: str


@dataclass(frozen=True)
class ArmChart:
    """The arms of one metric, the baseline's interval as a band and the best oracle as a line."""

    metric: str
    unit: str
    height: float
    rows: list[ArmRow]
    band: tuple[float, float] | None
    oracle: float | None
    x_ticks: list[Tick]


def line_chart(panel: Panel) -> LineChart:
    """The coordinates of a curve panel."""
    chart = panel.chart
    ends = [end for c in panel.curves for end in (*c.low, *c.high)] + [v for c in panel.bounds for v in c.values]
    low, high = chart.limits or (min(ends), max(ends))
    y_values = ticks(low, high, 4)
    low, high = min(low, y_values[0]), max(high, y_values[-1])
    steps = [step for c in panel.curves for step in c.steps]
    first, last = min(steps), max(steps)
    x_values = [tick for tick in ticks(first, last, 4) if first <= tick <= last and tick == int(tick)]

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((step - first) / (last - first) if last > first else 0.5)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (min(max(value, low), high) - low) / (high - low)

    def line(c: Curve) -> Line:
        above = _path([(x(s), y(v)) for s, v in zip(c.steps, c.high, strict=True)])
        below = _path([(x(s), y(v)) for s, v in zip(reversed(c.steps), reversed(c.low), strict=True)])
        band = f"M{above}L{below}Z" if c.low != c.values else ""
        points = [(x(s), y(v)) for s, v in zip(c.steps, c.values, strict=True)]
        return Line(c.label, "M" + _path(points if len(points) > 1 else points * 2), band, number(c.values[-1]))

    return LineChart(
        name=chart.name,
        title=chart.title,
        unit=chart.unit,
        lines=[line(c) for c in panel.curves],
        bounds=[line(c) for c in panel.bounds],
        x_label=chart.x_label,
        x_ticks=[Tick(x(tick), f"{tick:,.0f}") for tick in x_values],
        y_ticks=[Tick(y(tick), number(tick)) for tick in y_values],
        notes=panel.notes,
        data={
            "from": first,
            "to": last,
            "curves": [
                {"label": c.label, "steps": c.steps, "values": [float(f"{v:.4g}") for v in c.values]}
                for c in (*panel.curves, *panel.bounds)
            ],
        },
    )


def arm_chart(arms: Arms, metric: str) -> ArmChart:
    """The coordinates of the interval chart of one metric, best arm on top."""
    names = arms.ordered(metric)
    estimates = [arms.estimates[name][metric] for name in names]
    ends = [e[key] for e in estimates for key in ("mean", "low", "high") if e[key] is not None]
    x_values = ticks(min(ends), max(ends), 4)
    low, high = min(*ends, x_values[0]), max(*ends, x_values[-1])

    def x(value: float) -> float:
        return round(LABEL + (WIDTH - LABEL - RIGHT) * (value - float(low)) / float(high - low), 1)

    rows = [
        ArmRow(
            name=spelled(name),
            kind=arms.kind(name),
            y=TOP + ROW * (index + 0.5),
            low=None if e["low"] is None else x(e["low"]),
            high=None if e["high"] is None else x(e["high"]),
            mean=x(e["mean"]),
            text=interval_text(e),
        )
        for index, (name, e) in enumerate(zip(names, estimates, strict=True))
    ]
    baseline = arms.estimates.get(arms.baseline, {}).get(metric)
    oracle = arms.best_oracle(metric)
    return ArmChart(
        metric=spelled(metric),
        unit=arms.unit(metric),
        height=TOP + ROW * len(rows) + BOTTOM,
        rows=rows,
        band=(x(baseline["low"]), x(baseline["high"])) if baseline and baseline["low"] is not None else None,
        oracle=None if oracle is None else x(oracle),
        x_ticks=[Tick(x(tick), number(tick)) for tick in x_values],
    )


def position_chart(positions: tuple[Sequence[float], Sequence[float]]) -> Panel:
    """Reward by position as a panel whose horizontal axis is the position: early steps against late ones."""
    chart = Chart("reward_by_position", "Reward by position", "nats per value token", (), x_label="position")
    curves = [
        Curve(label, list(range(1, len(values) + 1)), list(values), list(values), list(values), 0)
        for label, values in zip(("last tenth of the steps", "first tenth"), reversed(positions), strict=True)
    ]
    return Panel(chart, curves)


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers, about ``count`` of them, that cover ``low`` to ``high``.

    >>> ticks(0.0, 1.0, 4)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    >>> ticks(3.0, 3.0, 4)[0] < 3.0 < ticks(3.0, 3.0, 4)[-1]
    True
    """
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        margin = abs(low) / 10 or 1.0
        low, high = low - margin, high + margin
    magnitude = 10.0 ** math.floor(math.log10((high - low) / count))
    step = magnitude * min((m for m in (1, 2, 5, 10)), key=lambda m: abs((high - low) / (m * magnitude) - count))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = max(0, 1 - math.floor(math.log10(step)))
    return [round(k * step, digits) for k in range(first, last + 1)]


def number(value: float) -> str:
    """A number as a reader wants it: four significant digits at most, a true minus sign.

    >>> number(-0.25), number(12345.6), number(3)
    ('\N{MINUS SIGN}0.25', '12,346', '3')
    """
    text = f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.4g}"
    return text.replace("-", "\N{MINUS SIGN}")


def interval_text(estimate: Any) -> str:
    """``0.124 (0.08 to 0.171)``, or the mean alone where there is no interval."""
    if estimate["low"] is None:
        return f"{_three(estimate['mean'])} (no interval)"
    return f"{_three(estimate['mean'])} ({_three(estimate['low'])} to {_three(estimate['high'])})"


def _three(value: float) -> str:
    return number(float(f"{value:.3g}"))


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
