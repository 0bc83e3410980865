"""Signed numbers of many actions as a Hinton diagram, which is read without colour.

Every action is a column, every number of it a square: its area is the number's size, filled above zero and hollow
below. What is marked has a triangle below its column.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from preceptor.report.curves import evenly_spaced
from preceptor.report.drawing import Tick
from preceptor.report.sections import Action, Squares

MAXIMUM_ACTIONS = 80
MAXIMUM_NUMBERS = 96
"""Of one action."""
CELL, LEFT, TOP, FOOT = 11, 132, 6, 34


@dataclass(frozen=True)
class ActionColumn:
    """One action: where its column begins, what a pointer reads off it, and whether it is marked."""

    x: float
    text: str
    marked: bool


@dataclass(frozen=True)
class SquareChart:
    """Everything that the SVG of a :class:`Squares` needs: path strings, coordinates and labels."""

    title: str
    left: float
    """Where the squares begin."""
    width: float
    height: float
    bottom: float
    labels: list[Tick]
    """``at`` is the base line of each row's name."""
    lines: list[float]
    """Heights of the lines between groups of rows."""
    columns: list[ActionColumn]
    above: str
    below: str
    x_ticks: list[Tick]
    note: str
    unfolded: bool


def square_chart(squares: Squares) -> SquareChart:
    """The coordinates of ``squares``: at most ``MAXIMUM_ACTIONS`` columns, evenly spaced, marked ones by preference."""
    actions, rows = squares.actions, squares.rows[:MAXIMUM_NUMBERS]
    drawn = _chosen(actions)
    bottom = TOP + CELL * len(rows)
    # One path string for all filled squares and one for all hollow ones: thousands of elements would slow the page.
    above: list[str] = []
    below: list[str] = []
    for column, action in enumerate(drawn):
        for line, value in enumerate(action.values[: len(rows)]):
            # The area is the number's size, so the side is its root.
            side = (CELL - 2) * math.sqrt(min(1.0, abs(value)))
            x, y = LEFT + CELL * (column + 0.5) - side / 2, TOP + CELL * (line + 0.5) - side / 2
            square = f"M{x:.1f} {y:.1f}h{side:.1f}v{side:.1f}h{-side:.1f}Z"
            (above if value > 0 else below).append(square)
    labels = [
        Tick(TOP + CELL * (line + 1) - 2, f"{group} {part}" if line == 0 or rows[line - 1][0] != group else part)
        for line, (group, part) in enumerate(rows)
    ]
    # Rows of one layer stay together: "layer 0 query" and "layer 0 output" differ in their last word.
    groups = [group.rsplit(" ", 1)[0] for group, _ in rows]
    num_left_out = len(squares.rows) - len(rows)
    notes = [squares.note] if squares.note else []
    if len(drawn) < len(actions):
        notes.append(f"{len(drawn)} are drawn, evenly spaced, marked ones by preference")
    if num_left_out > 0:
        notes.append(f"the last {num_left_out} numbers of each are left out")
    # About eight labels, however many columns there are.
    every = max(1, round(len(drawn) / 8))
    return SquareChart(
        title=squares.title,
        left=LEFT,
        width=LEFT + CELL * len(drawn) + 16,
        height=bottom + FOOT,
        bottom=bottom,
        labels=labels,
        lines=[TOP + CELL * k for k in range(1, len(rows)) if groups[k] != groups[k - 1] and groups[k] != "number"],
        columns=[ActionColumn(LEFT + CELL * k, action.text, action.marked) for k, action in enumerate(drawn)],
        above="".join(above),
        below="".join(below),
        x_ticks=[Tick(LEFT + CELL * (k + 0.5), drawn[k].name) for k in range(0, len(drawn), every)],
        note="; ".join(notes),
        unfolded=squares.unfolded,
    )


def _chosen(actions: Sequence[Action]) -> list[Action]:
    marked = [k for k, action in enumerate(actions) if action.marked]
    # Half the columns at most for marked actions, so that the unmarked ones are seen too; the rest is filled evenly.
    kept = {marked[k] for k in evenly_spaced(len(marked), MAXIMUM_ACTIONS // 2)}
    others = [k for k in range(len(actions)) if k not in kept]
    kept |= {others[k] for k in evenly_spaced(len(others), MAXIMUM_ACTIONS - len(kept))}
    return [actions[k] for k in sorted(kept)]
