"""``preceptor watch``: the numbers of a run at work, in a terminal or as plain rows."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from preceptor.cli.options import Folder
from preceptor.errors import ConfigError, short_repr

if TYPE_CHECKING:
    from rich.table import Table

    from preceptor.runs.watching import MetricsTail

WINDOW = 20
"""Last steps over which a mean is taken."""

CURVE = 24
"""Characters of a curve."""


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.01 <= value <= 3600:
        raise typer.BadParameter(f"must be a number from 0.01 to 3600, got {short_repr(text)}")
    return value


def watch(
    folder: Folder,
    *,
    every: Annotated[float, typer.Option("--every", metavar="S", parser=_seconds, help="Seconds between looks.")] = 1.0,
    metrics: Annotated[
        list[str] | None,
        typer.Option("--metrics", metavar="M", help="Only these.  [default: all]", show_default=False),
    ] = None,
) -> int:
    """Show the numbers of a run at work.

    They are the last, the mean of the last 20 steps, and the curve so far. It only reads metrics.jsonl, so it can be
    started and stopped at any time without the run noticing. It ends when the run does, or on Ctrl-C. Where the output
    is no terminal, it prints a line for each step.
    """
    from rich.console import Console

    from preceptor.runs.watching import MetricsTail

    if not (folder / "manifest.json").is_file():
        raise ConfigError(f"{folder} is not a run folder (no manifest.json); give the folder of a run")
    tail = MetricsTail(folder / "metrics.jsonl")
    console = Console()
    try:
        if console.is_terminal and not console.is_dumb_terminal:
            _show_live(folder, tail, console, metrics=metrics or [], every=every)
        else:
            _print_rows(folder, tail, metrics=metrics or [], every=every)
    except KeyboardInterrupt:
        return 0  # the watcher was dismissed; the run goes on
    print(_ending(folder, tail))
    return 0


def _show_live(folder: Path, tail: MetricsTail, console: Any, *, metrics: Sequence[str], every: float) -> None:
    from rich.live import Live

    with Live(console=console, auto_refresh=False) as live:
        while True:
            ended = _has_ended(folder)  # before the look, so that the last rows are shown
            if tail.look():
                live.update(_table(folder, tail.rows, metrics), refresh=True)
            if ended:
                return
            time.sleep(every)


def _print_rows(folder: Path, tail: MetricsTail, *, metrics: Sequence[str], every: float) -> None:
    from preceptor.runs.watching import numbers

    last = -1
    while True:
        ended = _has_ended(folder)
        if tail.look():
            # Steps went back: the run was resumed from a checkpoint and has rewritten its log from there.
            if tail.rows and tail.rows[-1]["step"] < last:
                last = int(tail.rows[-1]["step"])
                print(f"resumed after step {last}")
            for row in (row for row in tail.rows if row["step"] > last):
                figures = [f"{name} {value:.5g}" for name, value in numbers(row).items() if _wanted(name, metrics)]
                print("  ".join([f"step {row['step']}", *figures]))
                last = row["step"]
            # Flushed each round, so that `| grep` sees rows as they come.
            sys.stdout.flush()
        if ended:
            return
        time.sleep(every)


def _has_ended(folder: Path) -> bool:
    from preceptor.runs.watching import is_at_work

    return not is_at_work(folder)


def _ending(folder: Path, tail: MetricsTail) -> str:
    step = tail.rows[-1]["step"] if tail.rows else 0
    if (folder / "result.json").is_file():
        return f"finished at step {step}; results: {folder}"
    return f"not at work; last step {step}; go on with: preceptor resume {folder}"


def _table(folder: Path, rows: Sequence[Mapping[str, Any]], wanted: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from preceptor.runs.watching import numbers, planned_steps

    step, total = rows[-1]["step"] if rows else 0, planned_steps(folder)
    place = f"step {step}" if total is None else f"step {step} of {total}"
    table = Table(title=Text(f"{folder.name}: {place}"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("metric")
    for header in ("last", f"mean of {WINDOW}"):
        table.add_column(header, justify="right")
    table.add_column("so far", no_wrap=True)
    columns: dict[str, list[float]] = {}
    for row in rows:
        for name, value in numbers(row).items():
            if _wanted(name, wanted):
                columns.setdefault(name, []).append(value)
    for name, values in columns.items():
        # A mean of the last steps next to the last value, since single rewards are noisy.
        recent = values[-WINDOW:]
        mean = sum(recent) / len(recent)
        table.add_row(Text(name), f"{values[-1]:.5g}", f"{mean:.5g}", curve(values))
    return table


def _wanted(name: str, wanted: Sequence[str]) -> bool:
    return not wanted or name in wanted


def curve(values: Sequence[float], width: int = CURVE) -> str:
    """``values`` as a line of at most ``width`` block characters, from their least to their greatest.

    >>> curve([0.0, 1.0, 2.0, 4.0])
    '▁▂▄█'
    """
    # As many means as characters, over slices that differ in length by at most one.
    edges = [round(k * len(values) / min(width, len(values))) for k in range(min(width, len(values)) + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    blocks = "▁▂▃▄▅▆▇█"
    # The full block is for the greatest value alone.
    return "".join(blocks[int(7 * (mean - low) / (high - low))] if high > low else blocks[0] for mean in means)
