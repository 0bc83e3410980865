"""The table of arms for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from preceptor.report.arms import COUNTS, Arms, title_case

if TYPE_CHECKING:
    from rich.table import Table


def arms_table(arms: Arms, *, title: str | None = None) -> Table:
    """Arms by metrics, each with its interval, best first in the first metric; units stand in the headers.

    The columns are those of ``arms.table``, or all. The learned arm is bold, oracles are set in italics (they peek).
    Print it with ``rich.print``.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("arm", no_wrap=True)
    metrics = [metric for metric in arms.table if metric in arms.metrics] or arms.metrics
    for metric in metrics:
        table.add_column(Text(f"{title_case(metric)}\n{arms.unit(metric)}"), justify="right")
    ranked = arms.ordered(metrics[0]) if metrics else []
    for arm in [*ranked, *(arm for arm in arms.estimates if arm not in ranked)]:
        style = {"learned": "bold", "oracle": "italic"}.get(arms.kind(arm), "dim" if arm == arms.baseline else "")
        own = arms.estimates[arm]
        cells = [_cell(own[metric], count=metric in COUNTS) if metric in own else "-" for metric in metrics]
        table.add_row(Text(title_case(arm)), *(Text(cell) for cell in cells), style=style)
    return table


def _cell(estimate: Mapping[str, Any], *, count: bool) -> str:
    """``0.124 [0.080,0.171]``: one space, so that a narrow terminal breaks it before the bracket."""
    if count:
        return f"{estimate['mean']:,.0f}"
    if estimate["low"] is None:
        return f"{estimate['mean']:.3f}"
    return f"{estimate['mean']:.3f} [{estimate['low']:.3f},{estimate['high']:.3f}]"
