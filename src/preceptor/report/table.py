"""The table of arms for the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from preceptor.report.arms import COUNTS, Arms, title_case

if TYPE_CHECKING:
    from rich.table import Table


def arms_tables(arms: Arms, *, title: str | None = None, width: int = 80) -> list[Table]:
    """Arms by metrics, each with its interval, best first in the first metric; units stand in the headers.

    The columns are those of ``arms.table``, or all, in as many tables as keep every word whole in ``width`` characters.
    The learned arm is bold, oracles are set in italics (they peek). Print them with ``rich.print``.
    """
    metrics = [metric for metric in arms.table if metric in arms.metrics] or arms.metrics
    ranked = arms.ordered(metrics[0]) if metrics else []
    rows = [*ranked, *(arm for arm in arms.estimates if arm not in ranked)]
    from rich.console import Console

    def measured(chosen: Sequence[str], *, narrow: bool) -> int:
        return console.measure(_table(arms, rows, chosen, narrow=narrow)).maximum

    console = Console(width=10_000)  # what is measured must not be bounded by the terminal at hand
    narrow = measured(metrics, narrow=False) > width
    blocks: list[list[str]] = [[]]
    for metric in metrics:
        wider = [*blocks[-1], metric]
        if blocks[-1] and measured(wider, narrow=narrow) > width:
            blocks.append([metric])
        else:
            blocks[-1] = wider
    return [
        _table(arms, rows, block, narrow=narrow, title=None if index else title) for index, block in enumerate(blocks)
    ]


def _table(arms: Arms, rows: Sequence[str], metrics: Sequence[str], *, narrow: bool, title: str | None = None) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("arm", no_wrap=True)
    columns = [_column(arms, rows, metric, narrow=narrow) for metric in metrics]
    for header, _ in columns:
        table.add_column(Text(header), justify="right")
    for number, arm in enumerate(rows):
        style = {"learned": "bold", "oracle": "italic"}.get(arms.kind(arm), "dim" if arm == arms.baseline else "")
        table.add_row(Text(title_case(arm)), *(Text(cells[number]) for _, cells in columns), style=style)
    return table


def _column(arms: Arms, rows: Sequence[str], metric: str, *, narrow: bool) -> tuple[str, list[str]]:
    """Header (the metric, its unit below) and cells; ``narrow`` breaks them so that the longest word sets the width."""
    name, unit, cells = title_case(metric), arms.unit(metric), [_cell(arms, arm, metric) for arm in rows]
    if narrow:
        unit = unit.replace("/", "/ ")
        cells = [cell.replace(" ", "\n") for cell in cells]
        longest = max(len(word) for text in (name, unit, *cells) for word in text.split())
        name, unit = (textwrap.fill(text, longest) for text in (name, unit))
    return f"{name}\n{unit}", cells


def _cell(arms: Arms, arm: str, metric: str) -> str:
    """``0.124 [0.080,0.171]``: one space, so that a narrow terminal breaks it before the bracket."""
    if (estimate := arms.estimates[arm].get(metric)) is None:
        return "-"
    if metric in COUNTS:
        return f"{estimate['mean']:,.0f}"
    if estimate["low"] is None:
        return f"{estimate['mean']:.3f}"
    return f"{estimate['mean']:.3f} [{estimate['low']:.3f},{estimate['high']:.3f}]"
