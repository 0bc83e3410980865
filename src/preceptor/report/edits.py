"""The edits of a surgeon over layers and matrices, drawn from ``decisions.jsonl``.

Every edit is a column, every number of its action a square: its area is the number's size, filled above zero and
hollow below (a Hinton diagram), so that it is read without colour. What was committed is marked below its column.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preceptor.report.arms import title_case
from preceptor.report.charts import Matrix, matrices
from preceptor.report.curves import evenly_spaced
from preceptor.report.drawing import Tick, number
from preceptor.report.run_folder import JsonObject, is_finite, read_rows

MAXIMUM_EDITS = 80
"""Of one arm."""
MAXIMUM_NUMBERS = 96
"""Of one action."""
CELL, LEFT, TOP, FOOT = 11, 132, 6, 34
ROLES = ("query", "key", "value", "output")
"""In the order in which an action edits them, layer by layer."""


@dataclass(frozen=True)
class EditColumn:
    """One edit: where its column begins, what a pointer reads off it, and whether it stayed."""

    x: float
    text: str
    committed: bool


@dataclass(frozen=True)
class EditMap:
    """Every number of an arm's edits as path strings of squares."""

    arm: str
    left: float
    """Where the squares begin."""
    width: float
    height: float
    bottom: float
    labels: list[Tick]
    """``at`` is the base line of each row's name."""
    lines: list[float]
    """Heights of the lines between layers."""
    columns: list[EditColumn]
    above: str
    below: str
    x_ticks: list[Tick]
    num_edits: int
    num_committed: int
    left_out: str
    """What of the action is not drawn."""


def is_edit(row: Mapping[str, Any]) -> bool:
    """Whether a row of ``decisions.jsonl`` is an edit."""
    action = row.get("action")
    return "committed" in row and isinstance(action, list) and bool(action) and all(is_finite(a) for a in action)


def edit_maps(decisions: Path, config: Mapping[str, Any]) -> tuple[list[EditMap], list[Matrix]]:
    """A map of each arm's edits, and their mean size by arm and matrix; nothing where the rows are no edits.

    ``config`` is the run's: its ``edit`` says which numbers of an action belong to which matrix.

    Raises:
        DataError: a malformed row, naming its line.
    """
    by_arm: dict[str, list[JsonObject]] = {}
    for _, row in read_rows(decisions):
        if is_edit(row):
            by_arm.setdefault(str(row.get("arm", "")), []).append(row)
    if not by_arm:
        return [], []
    size = max(len(row["action"]) for rows in by_arm.values() for row in rows)
    names = action_names(size, config)
    maps = [_edit_map(arm, rows, names) for arm, rows in by_arm.items()]
    groups: dict[str, list[int]] = {}
    for index, (group, _) in enumerate(names):
        groups.setdefault(group, []).append(index)
    values = [[_mean_size(rows, kept) for kept in groups.values()] for rows in by_arm.values()]
    table = {
        "kind": "matrix",
        "title": "Mean size of the edits by matrix",
        "unit": "share of the largest that is allowed",
        "rows": [title_case(arm) for arm in by_arm],
        "columns": list(groups),
        "values": values,
        "low": 0.0,
        "high": 1.0,
    }
    return maps, matrices([table]) if len(groups) <= MAXIMUM_NUMBERS // 2 else []


def action_names(size: int, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(matrix, part of it) of each number of an action of ``size`` numbers; plain numbers where they do not fit.

    >>> edit = {"edit": {"kind": "head_scale", "roles": ["output"], "layers": []}, "student": {"num_heads": 2}}
    >>> action_names(4, edit)[1:3]
    [('layer 0 output', 'head 2'), ('layer 1 output', 'head 1')]
    """
    edit = config.get("edit") or {}
    roles = [role for role in ROLES if role in (edit.get("roles") or ())]
    rank = int(edit.get("rank") or 0)
    heads = int((config.get("student") or {}).get("num_heads") or 0)
    parts = {
        "singular_values": [f"\N{GREEK SMALL LETTER SIGMA}{k + 1}" for k in range(rank)],
        "head_scale": [f"head {k + 1}" for k in range(heads)],
        "low_rank": [f"{row + 1}, {column + 1}" for row in range(rank) for column in range(rank)],
    }.get(str(edit.get("kind")), [])
    of_layer = len(roles) * len(parts)
    num_layers = size // of_layer if of_layer and size % of_layer == 0 else 0
    layers = list(edit.get("layers") or range(num_layers))
    if not num_layers or len(layers) != num_layers:
        return [(f"number {k + 1}", "") for k in range(size)]
    return [(f"layer {layer} {role}", part) for layer in layers for role in roles for part in parts]


def _edit_map(arm: str, rows: Sequence[JsonObject], names: Sequence[tuple[str, str]]) -> EditMap:
    committed = [k for k, row in enumerate(rows) if row["committed"]]
    kept = {committed[k] for k in evenly_spaced(len(committed), MAXIMUM_EDITS // 2)}
    others = [k for k in range(len(rows)) if k not in kept]
    kept |= {others[k] for k in evenly_spaced(len(others), MAXIMUM_EDITS - len(kept))}
    drawn = [rows[k] for k in sorted(kept)]
    names = names[:MAXIMUM_NUMBERS]
    bottom = TOP + CELL * len(names)
    above: list[str] = []
    below: list[str] = []
    for column, row in enumerate(drawn):
        for line, value in enumerate(row["action"][: len(names)]):
            side = (CELL - 2) * math.sqrt(min(1.0, abs(value)))
            x, y = LEFT + CELL * (column + 0.5) - side / 2, TOP + CELL * (line + 0.5) - side / 2
            square = f"M{x:.1f} {y:.1f}h{side:.1f}v{side:.1f}h{-side:.1f}Z"
            (above if value > 0 else below).append(square)
    labels = [
        Tick(TOP + CELL * (line + 1) - 2, f"{group} {part}" if line == 0 or names[line - 1][0] != group else part)
        for line, (group, part) in enumerate(names)
    ]
    layers = [group.rsplit(" ", 1)[0] for group, _ in names]
    num_left_out = len(rows[0]["action"]) - len(names)
    every = max(1, round(len(drawn) / 8))
    return EditMap(
        arm=arm,
        left=LEFT,
        width=LEFT + CELL * len(drawn) + 16,
        height=bottom + FOOT,
        bottom=bottom,
        labels=labels,
        lines=[TOP + CELL * k for k in range(1, len(names)) if layers[k] != layers[k - 1] and layers[k] != "number"],
        columns=[
            EditColumn(LEFT + CELL * column, _described(row), bool(row["committed"]))
            for column, row in enumerate(drawn)
        ],
        above="".join(above),
        below="".join(below),
        x_ticks=[
            Tick(LEFT + CELL * (column + 0.5), str(drawn[column].get("edit", "")))
            for column in range(0, len(drawn), every)
        ],
        num_edits=len(rows),
        num_committed=len(committed),
        left_out=f"the last {num_left_out} numbers of each" if num_left_out > 0 else "",
    )


def _described(row: Mapping[str, Any]) -> str:
    reward = f", reward {number(row['reward'])}" if is_finite(row.get("reward")) else ""
    return f"edit {row.get('edit', '')}{reward}, {'committed' if row['committed'] else 'undone'}"


def _mean_size(rows: Sequence[JsonObject], kept: Sequence[int]) -> float:
    sizes = [abs(row["action"][k]) for row in rows for k in kept if k < len(row["action"])]
    return sum(sizes) / len(sizes) if sizes else math.nan
