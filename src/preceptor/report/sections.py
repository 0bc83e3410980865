"""What a system puts on the page of its runs: titled sections of figures, as plain data.

A system builds sections from a :class:`~preceptor.report.run_folder.RunFolder`; the page draws them and knows no
system. ``result.json`` may ask for figures of its own, in ``charts``, a list of objects with a ``kind``:

``{"kind": "lines", "title", "unit", "columns": {column: label}, "constants": {label: value}}``
    :class:`Lines`;
``{"kind": "series", "title", "unit", "x_label", "x": [...], "lines": {label: [...]}, "bands": {label: [low, high]}}``
    :class:`Series`;
``{"kind": "matrix", "title", "unit", "rows": [...], "columns": [...], "values": [[...]], "low", "high"}``
    :class:`Matrix`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from preceptor.errors import DataError
from preceptor.report.run_folder import JsonObject

Number: TypeAlias = float | None
"""A number of a figure; None where there is none or it is not finite."""


@dataclass(frozen=True)
class Lines:
    """Columns of ``metrics.jsonl`` over the steps, smoothed, in one panel.

    Attributes:
        title: of the panel.
        unit: of all its columns.
        columns: column → label; ``a.b`` is the entry ``b`` of the column ``a``.
        maximum: (column, label) of a curve that bounds the others, drawn dotted.
        limits: the range of the axis, where the quantity has one.
        constants: label → value of level lines, drawn dotted.
        split_by: a column of text by whose values a curve is drawn apart ("bandit"), in a panel of one column.
        about_the_machine: speed or memory, which no two runs share, so that comparisons leave it out.
    """

    title: str
    unit: str
    columns: Mapping[str, str]
    maximum: tuple[str, str] | None = None
    limits: tuple[float, float] | None = None
    constants: Mapping[str, float] = field(default_factory=dict)
    split_by: str | None = None
    about_the_machine: bool = False


@dataclass(frozen=True)
class Series:
    """Curves whose numbers are given.

    Attributes:
        title: of the panel.
        unit: of the curves.
        x_label: what ``x`` counts.
        x: places along the axis.
        lines: label → a number for each place.
        bands: label → the lower and the upper end of a band, for the lines that have one.
    """

    title: str
    unit: str
    x_label: str
    x: Sequence[float]
    lines: Mapping[str, Sequence[Number]]
    bands: Mapping[str, Sequence[Sequence[Number]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Matrix:
    """A table of numbers, shaded from ``low`` to ``high`` (from the least to the greatest where they are None)."""

    title: str
    unit: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[Number]]
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Action:
    """One column of :class:`Squares`: numbers in [−1, 1], a mark below it, and what a pointer reads off it."""

    values: Sequence[float]
    name: str
    text: str
    marked: bool = False


@dataclass(frozen=True)
class Squares:
    """Signed numbers of many actions as a Hinton diagram: areas are sizes, filled above zero and hollow below.

    Attributes:
        title: of the diagram, which can be folded away.
        rows: (group, part) of each number of an action, such as ("layer 0 output", "head 2").
        actions: the columns.
        note: below it.
        unfolded: shown at once.
    """

    title: str
    rows: Sequence[tuple[str, str]]
    actions: Sequence[Action]
    note: str = ""
    unfolded: bool = True


@dataclass(frozen=True)
class Table:
    """Rows of text under named columns."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Passages:
    """A text in the order in which it was read: (place in the article, key, value) of each passage."""

    title: str
    rows: Sequence[tuple[int, str, str]]
    note: str = ""


@dataclass(frozen=True)
class Episodes:
    """Episodes to be stepped through: what was asked, the probabilities, what was read and what it earned.

    At most one figure of a page may be of this kind. The entries of ``episodes`` and ``articles`` are those of
    ``preceptor.systems.reading.report``.
    """

    episodes: Sequence[JsonObject]
    num_episodes: int
    articles: Mapping[str, JsonObject]


Figure: TypeAlias = Lines | Series | Matrix | Squares | Table | Passages | Episodes


@dataclass(frozen=True)
class Section:
    """A titled part of the page, with a line that says how to read it."""

    title: str
    figures: Sequence[Figure]
    lead: str = ""


GENERAL_LINES = (
    Lines("Reward", "", {"reward": "reward"}),
    Lines("KL to the reference", "nats", {"kl": "KL"}),
    Lines("Policy loss", "dimensionless", {"policy_loss": "loss"}),
    Lines("Gradient norm", "dimensionless", {"gradient_norm": "norm"}),
    Lines("Speed", "tokens per second", {"tokens_per_second": "speed"}, about_the_machine=True),
    Lines("Peak memory", "MiB", {"peak_memory_mib": "memory"}, about_the_machine=True),
)
"""The curves of a system that names none of its own."""

_NEEDED = {"lines": ("columns",), "series": ("x_label", "x", "lines"), "matrix": ("rows", "columns", "values")}


def declared_figures(charts: Sequence[Any]) -> list[Lines | Series | Matrix]:
    """The figures that ``charts`` of a ``result.json`` ask for; raises ``DataError`` for what is no such object."""
    return [_declared(chart) for chart in charts]


def _declared(chart: Any) -> Lines | Series | Matrix:
    kind = chart.get("kind") if isinstance(chart, Mapping) else None
    # `title` and `unit` for all, and what the kind needs besides.
    missing = [key for key in ("title", "unit", *_NEEDED.get(str(kind), ())) if key not in chart] if kind else []
    if kind not in _NEEDED or missing:
        lack = f"lacks {', '.join(missing)}" if missing else f"is of no kind of {', '.join(_NEEDED)}"
        raise DataError(f"a chart of result.json {lack}, got {str(chart)[:200]}.")
    title, unit = str(chart["title"]), str(chart["unit"])
    if kind == "lines":
        columns = {str(column): str(label) for column, label in chart["columns"].items()}
        constants = {str(label): float(value) for label, value in chart.get("constants", {}).items()}
        return Lines(title, unit, columns, constants=constants)
    if kind == "series":
        return Series(title, unit, str(chart["x_label"]), chart["x"], chart["lines"], chart.get("bands", {}))
    return Matrix(
        title, unit, chart["rows"], chart["columns"], chart["values"], low=chart.get("low"), high=chart.get("high")
    )
