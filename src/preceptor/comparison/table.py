"""The tables of a comparison for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from preceptor.comparison.result import COSTS
from preceptor.report.arms import title_case

if TYPE_CHECKING:
    from rich.table import Table


def comparison_tables(comparison: Mapping[str, Any]) -> Iterator[Table]:
    """A table for each compared metric: what every arm reaches, and by how much the first is above each other one.

    ``comparison`` is what ``comparison.json`` holds. A difference that may be claimed is bold. Print them with
    ``rich.print``.
    """
    rows = comparison["comparisons"]
    for metric, split in dict.fromkeys((row["metric"], row["split"]) for row in rows):
        of_metric = [row for row in rows if (row["metric"], row["split"]) == (metric, split)]
        yield _table(of_metric, comparison["arms"][split])


def _table(rows: Sequence[Mapping[str, Any]], arms: Mapping[str, Mapping[str, Any]]) -> Table:
    # Rich is imported inside: `--help` and the shell's completion should not wait for it.
    from rich import box
    from rich.table import Table
    from rich.text import Text

    first = rows[0]
    reference, metric = first["arm"], first["metric"]
    costs = [cost for cost in COSTS if any(cost in arms[arm] for arm in (reference, *(r["baseline"] for r in rows)))]
    held_out = ", held out" if first["split"] == "held_out" else ""
    table = Table(
        title=f"{title_case(metric)}{held_out}, {first['unit']}",
        title_justify="left",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("arm", overflow="fold")
    headers = (
        "mean",
        "inter-\nquartile\nmean",
        f"{title_case(reference)}\nless arm",
        f"P({title_case(reference)}\nis above)",
    )
    for header in (*headers, *(title_case(cost).replace(" ", "\n") for cost in costs)):
        table.add_column(Text(header), justify="right", overflow="fold")

    def add(arm: str, *compared: Text) -> None:
        cells = [title_case(arm), *_reached(arms[arm][metric])]
        # Text, since rich would read a bracket as its markup.
        table.add_row(*map(Text, cells), *compared, *map(Text, _cost(arms[arm], costs)))

    add(reference, Text(), Text())  # the reference has nothing to be compared with
    for row in rows:
        difference = Text(_interval(row, "mean"), style="bold" if row["claimed"] else "")
        add(row["baseline"], difference, Text(_interval(row["improvement"], "probability", digits=2)))
    return table


def _reached(estimate: Mapping[str, Any]) -> tuple[str, str]:
    """The mean alone, so that a row fits 80 columns, and the interquartile mean with its interval."""
    return f"{estimate['mean']:.3f}", _interval(estimate["interquartile_mean"], "iqm")


def _interval(estimate: Mapping[str, Any], key: str, *, digits: int = 3) -> str:
    """``0.124`` and below it ``[0.080, 0.171]``, so that a narrow terminal cuts neither."""
    value = f"{estimate[key]:.{digits}f}"
    if estimate["low"] is None:
        return value
    return f"{value}\n[{estimate['low']:.{digits}f}, {estimate['high']:.{digits}f}]"


def _cost(metrics: Mapping[str, Any], costs: Sequence[str]) -> list[str]:
    return [f"{metrics[cost]['mean']:,.0f}" if cost in metrics else "-" for cost in costs]
