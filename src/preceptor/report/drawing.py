"""The geometry of the page's drawings: numbers in, coordinates and path strings out. The templates write the SVG."""

from __future__ import annotations

import itertools
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from preceptor.report.arms import Arms, title_case
from preceptor.report.curves import Curve, Panel

# Units of a viewBox: the browser scales the drawing, so proportions matter here and pixels do not.
WIDTH, HEIGHT = 340, 204
LEFT, RIGHT, TOP, BOTTOM = 46, 18, 10, 38
ROW, FOOT = 22, 24
LEAST_LABEL, MOST_LABEL, CHARACTER = 64, 170, 6.4
"""Room left of the arms, by the length of the longest name."""
LINE_OF_NAME = 24
"""Characters; a longer name has several lines, LEADING apart."""
LEADING = 12
LEAST_SHARE_SPAN = 0.05
SHARES = ("share", "probability")
"""Units whose axis stays within 0 and 1 where the numbers do."""


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
    lines: list[Tick]
    """The name in lines; ``at`` is each line's base."""
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
    label: float
    height: float
    rows: list[ArmRow]
    band: tuple[float, float] | None
    oracle: float | None
    zero: float | None
    """Where no difference lies, in a chart of differences."""
    x_ticks: list[Tick]


def line_chart(panel: Panel, name: str) -> LineChart:
    """The coordinates of a curve panel; the page's script finds its data by ``name``."""
    # Everything that is drawn decides the range: the band's ends, and the bounds as well.
    ends = [end for c in panel.curves for end in (*c.low, *c.high)] + [v for c in panel.bounds for v in c.values]
    low, high = panel.limits or (min(ends), max(ends))
    y_values = ticks(low, high, 4)
    # The unit may say more than its kind ("share of 12 articles"); its first word is the kind.
    if panel.unit.partition(" ")[0] in SHARES and low >= 0 and high <= 1:
        y_values = _share_ticks(y_values)
    # Round ticks may lie outside the data; the axis goes out to them.
    low, high = min(low, y_values[0]), max(high, y_values[-1])
    steps = [step for c in panel.curves for step in c.steps]
    first, last = min(steps), max(steps)
    # Steps are whole numbers, and a tick before the first or after the last step names no step.
    x_values = [tick for tick in ticks(first, last, 4) if first <= tick <= last and tick == int(tick)]

    def x(step: float) -> float:
        # A single step has no span to divide by; it stands in the middle.
        return LEFT + (WIDTH - LEFT - RIGHT) * ((step - first) / (last - first) if last > first else 0.5)

    def y(value: float) -> float:
        # SVG counts y downwards. Clamped, because fixed limits may leave points outside the axis.
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (min(max(value, low), high) - low) / (high - low)

    def line(c: Curve) -> Line:
        # Along the upper ends and back along the lower ones, closed with Z: one filled area.
        above = _path([(x(s), y(v)) for s, v in zip(c.steps, c.high, strict=True)])
        below = _path([(x(s), y(v)) for s, v in zip(reversed(c.steps), reversed(c.low), strict=True)])
        band = f"M{above}L{below}Z" if c.low != c.values else ""
        # A path of one point draws nothing; the same point twice is a dot, with a round line cap.
        points = [(x(s), y(v)) for s, v in zip(c.steps, c.values, strict=True)]
        return Line(
            title_case(c.label), "M" + _path(points if len(points) > 1 else points * 2), band, number(c.values[-1])
        )

    return LineChart(
        name=name,
        title=panel.title,
        unit=panel.unit,
        lines=[line(c) for c in panel.curves],
        bounds=[line(c) for c in panel.bounds],
        x_label=panel.x_label,
        x_ticks=[Tick(x(tick), f"{tick:,.0f}") for tick in x_values],
        y_ticks=[Tick(y(tick), text) for tick, text in zip(y_values, tick_labels(y_values), strict=True)],
        notes=panel.notes,
        data={
            "from": first,
            "to": last,
            "curves": [
                # Four digits are all that the pointer shows, and they keep the page small.
                {"label": title_case(c.label), "steps": c.steps, "values": [float(f"{v:.4g}") for v in c.values]}
                for c in (*panel.curves, *panel.bounds)
            ],
        },
    )


def arm_chart(arms: Arms, metric: str) -> ArmChart:
    """The coordinates of the interval chart of one metric, best arm on top."""
    names = arms.ordered(metric)
    baseline = arms.estimates.get(arms.baseline, {}).get(metric)
    return _intervals(
        title_case(metric),
        arms.unit(metric),
        [(title_case(name), arms.kind(name), arms.estimates[name][metric]) for name in names],
        baseline=baseline if len(names) > 1 else None,
        oracle=arms.best_oracle(metric),
    )


def difference_chart(title: str, unit: str, rows: Sequence[tuple[str, bool, Mapping[str, Any]]]) -> ArmChart:
    """Differences (name, whether one may be claimed, estimate) about zero."""
    # The classes of arms, so that a difference which may be claimed looks like a learned arm.
    named = [(name, "learned" if claimed else "control", estimate) for name, claimed, estimate in rows]
    return _intervals(title, unit, named, zero=True)


def _intervals(
    title: str,
    unit: str,
    named: Sequence[tuple[str, str, Mapping[str, Any]]],
    *,
    baseline: Mapping[str, Any] | None = None,
    oracle: float | None = None,
    zero: bool = False,
) -> ArmChart:
    # A chart of differences always shows 0, without which they mean little.
    ends = [e[key] for _, _, e in named for key in ("mean", "low", "high") if e[key] is not None] + [0.0] * zero
    x_values = ticks(min(ends), max(ends), 4)
    if unit.partition(" ")[0] in SHARES and min(ends) >= 0 and max(ends) <= 1:
        x_values = _share_ticks(x_values)
    low, high = min(*ends, x_values[0]), max(*ends, x_values[-1])
    wrapped = [textwrap.wrap(name, LINE_OF_NAME) or [name] for name, _, _ in named]
    longest = max(len(line) for lines in wrapped for line in lines)
    label = min(MOST_LABEL, max(LEAST_LABEL, 12 + CHARACTER * longest))
    # Edges between the rows; a name of several lines makes its row taller.
    tops = [TOP, *itertools.accumulate((ROW + LEADING * (len(lines) - 1) for lines in wrapped), initial=TOP)][1:]

    def x(value: float) -> float:
        return round(label + (WIDTH - label - RIGHT) * (value - float(low)) / float(high - low), 1)

    middles = [(above + below) / 2 for above, below in pairwise(tops)]
    rows = [
        ArmRow(
            name=name,
            lines=[
                # Lines of a name are centred on the row's middle; 4 puts the base line under the middle of a character.
                Tick(middle + 4 + LEADING * (place - (len(lines) - 1) / 2), line)
                for place, line in enumerate(lines)
            ],
            kind=kind,
            y=middle,
            low=None if e["low"] is None else x(e["low"]),
            high=None if e["high"] is None else x(e["high"]),
            mean=x(e["mean"]),
            text=interval_text(e),
        )
        for (name, kind, e), lines, middle in zip(named, wrapped, middles, strict=True)
    ]
    return ArmChart(
        metric=title,
        unit=unit,
        label=label,
        height=tops[-1] + FOOT,
        rows=rows,
        # An arm without an interval has no band: with one seed there is nothing to draw.
        band=(x(baseline["low"]), x(baseline["high"])) if baseline and baseline["low"] is not None else None,
        oracle=None if oracle is None else x(oracle),
        zero=x(0.0) if zero else None,
        x_ticks=_apart([Tick(x(tick), text) for tick, text in zip(x_values, tick_labels(x_values), strict=True)]),
    )


def _share_ticks(values: list[float]) -> list[float]:
    """The ticks of an axis of shares: within 0 and 1, and all of that range where the shares hardly differ."""
    within = [value for value in values if 0 <= value <= 1]
    return within if len(within) > 1 and within[-1] - within[0] >= LEAST_SHARE_SPAN else [0.0, 0.25, 0.5, 0.75, 1.0]


def tick_labels(values: Sequence[float]) -> list[str]:
    """``values`` as text, with as many digits as keep them apart.

    >>> tick_labels([0.0, 0.5, 1.0]), tick_labels([0.50031, 0.50032])
    (['0', '0.5', '1'], ['0.50031', '0.50032'])
    """
    labels = [number(value) for value in values]
    digits = 5
    # Nearly equal ticks would have equal labels; take more digits until they differ (float64 has about 16).
    while len(set(labels)) < len(set(values)) and digits < 16:
        labels = [f"{value:,.{digits}g}".replace("-", "\N{MINUS SIGN}") for value in values]
        digits += 1
    return labels


def _apart(x_ticks: list[Tick]) -> list[Tick]:
    """Every tick, but where two names would touch only every second name."""
    room = min((after.at - before.at for before, after in pairwise(x_ticks)), default=WIDTH)
    if max((CHARACTER * len(tick.label) for tick in x_ticks), default=0) <= room:
        return x_ticks
    return [Tick(tick.at, "" if index % 2 else tick.label) for index, tick in enumerate(x_ticks)]


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers, about ``count`` of them, that cover ``low`` to ``high``.

    >>> ticks(0.0, 1.0, 4)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    >>> ticks(3.0, 3.0, 4)[0] < 3.0 < ticks(3.0, 3.0, 4)[-1]
    True
    """
    # Constant data has no range: a tenth of its size on both sides, or 1 around 0.
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        margin = abs(low) / 10 or 1.0
        low, high = low - margin, high + margin
    # Steps of 1, 2, 5 or 10 times a power of ten, whichever comes nearest to `count` ticks.
    magnitude = 10.0 ** math.floor(math.log10((high - low) / count))
    step = magnitude * min((m for m in (1, 2, 5, 10)), key=lambda m: abs((high - low) / (m * magnitude) - count))
    # 1e-9 lets a value that is a tick but for rounding count as one.
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = max(0, 1 - math.floor(math.log10(step)))
    # Rounded, so that 3 · 0.1 is the label 0.3 and not 0.30000000000000004.
    return [round(k * step, digits) for k in range(first, last + 1)]


def number(value: float) -> str:
    """A number as a reader wants it: four significant digits at most, a true minus sign.

    >>> number(-0.25), number(12345.6), number(3)
    ('\N{MINUS SIGN}0.25', '12,346', '3')
    """
    text = f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.4g}"
    return text.replace("-", "\N{MINUS SIGN}")


def fixed(value: float, span: float) -> str:
    """A number with as many decimals as tell numbers apart that lie ``span`` apart at most.

    >>> fixed(0.5, 1.0), fixed(3.2e-7, 1.0), fixed(4.6622, 6.2), fixed(12345.6, 9000.0)
    ('0.500', '<0.001', '4.662', '12,346')
    """
    if span <= 0:
        return _three(value)
    # Three digits below the span: neighbours that differ by a thousandth of it stay apart.
    digits = min(12, max(0, 3 - math.floor(math.log10(span))))
    least: float = 10.0**-digits
    if 0 < abs(value) < least / 2:
        return f"<{least:.{digits}f}" if value > 0 else f">\N{MINUS SIGN}{least:.{digits}f}"
    return f"{value:,.{digits}f}".replace("-", "\N{MINUS SIGN}")


def interval_text(estimate: Any) -> str:
    """A mean and its interval, with the decimals that tell the ends apart, or the mean alone.

    >>> interval_text({"mean": -4.49712, "low": -4.5142, "high": -4.4781})
    '\N{MINUS SIGN}4.497 (\N{MINUS SIGN}4.514 to \N{MINUS SIGN}4.478)'
    """
    mean, low, high = (estimate[key] for key in ("mean", "low", "high"))
    if low is None:
        return f"{number(mean)} (no interval)"
    # Digits follow from the interval, since decimals below a hundredth of its width say nothing.
    span = 100 * (high - low) or 10 * abs(mean)
    return f"{fixed(mean, span)} ({fixed(low, span)} to {fixed(high, span)})"


def _three(value: float) -> str:
    return number(float(f"{value:.3g}"))


def _path(points: Sequence[tuple[float, float]]) -> str:
    # One decimal: a tenth of a unit is less than a pixel.
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def clipped(text: object, maximum: int = 2_000) -> str:
    """A text cut to ``maximum`` characters, an ellipsis saying so; an article may hold a line of a megabyte."""
    string = str(text)
    return string if len(string) <= maximum else string[: maximum - 1] + "\N{HORIZONTAL ELLIPSIS}"


def unique_name(title: str, taken: set[str]) -> str:
    """``title`` in small letters and hyphens, numbered where it is in ``taken`` already; it is added there.

    >>> names: set[str] = set()
    >>> unique_name("Loss/Gain", names), unique_name("loss gain", names)
    ('loss-gain', 'loss-gain-2')
    """
    # Letters, digits and hyphens are safe in a file's name, an id and a URL.
    stem = name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:60] or "figure"
    number = 2
    while name in taken:
        name, number = f"{stem}-{number}", number + 1
    taken.add(name)
    return name
