"""What the page shows of a surgery run: every surgeon's edits over layers and matrices, and what was committed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preceptor.report.arms import title_case
from preceptor.report.decisions import decisions_section
from preceptor.report.drawing import number
from preceptor.report.run_folder import JsonObject, RunFolder, is_finite, read_rows
from preceptor.report.sections import GENERAL_LINES, Action, Figure, Matrix, Section, Squares

LEAD = (
    "Columns are edits, in order. A square is one number of an edit: its area is the size, filled above zero, hollow "
    "below. \N{BLACK UP-POINTING TRIANGLE} marks what passed the test and was committed."
)
MAXIMUM_GROUPS = 48
"""Matrices of a student that a table has room for."""
REPAIR_LEAD = (
    "One damage of each unseen student. A row is what one number of an edit scales; the columns show it after the "
    "damage and after each edit of the surgeon, which sees neither."
)
LARGEST = 2.0
"""ln of the largest factor that a matrix shows; a wiped head would be far below."""
ROLES = ("query", "key", "value", "output")
"""In the order in which an action edits them, layer by layer."""


def sections(run: RunFolder) -> list[Section]:
    """The edits of every surgeon, the curves and the decisions."""
    config = (run.result or {}).get("config") or run.manifest.get("config") or {}
    if config.get("training") == "amortised":
        return [*_repair_sections(run), *decisions_section(run)]
    figures = edit_figures(run.decisions, config) if run.decisions is not None else []
    edits = [Section("Edits by layer and matrix", figures, lead=LEAD)] if figures else []
    return [*edits, Section("Training", GENERAL_LINES), *decisions_section(run)]


def _repair_sections(run: RunFolder) -> list[Section]:
    """The first damage of every unseen student and kind of damage, site by site, and what each edit left of it."""
    figures = []
    shown = set()
    for _, row in read_rows(run.decisions) if run.decisions is not None else ():
        if "after_damage" not in row or row["item"] in shown or len(row["sites"]) > MAXIMUM_GROUPS:
            continue
        shown.add(row["item"])
        columns = [key for key in row if key.startswith("after_")]
        zip(*(row[column] for column in columns), strict=True)  # [site][column]
        figures.append(
            Matrix(
                f"{row['item']}: damage 1",
                "ln of the norm over the undamaged one; 0 is healed",
                rows=[" ".join(site) for site in row["sites"]],
                columns=[column.replace("_", " ") for column in columns],
                values=[
                    [min(max(value, -LARGEST), LARGEST) for value in site]
                    for site in zip(*(row[column] for column in columns), strict=True)
                ],
                low=-LARGEST,
                high=LARGEST,
            )
        )
    return [Section("Damage, and what each edit left of it", figures, lead=REPAIR_LEAD)] if figures else []


def is_edit(row: Mapping[str, Any]) -> bool:
    """Whether a row of ``decisions.jsonl`` is an edit."""
    action = row.get("action")
    return "committed" in row and isinstance(action, list) and bool(action) and all(is_finite(a) for a in action)


def edit_figures(decisions: Path, config: Mapping[str, Any]) -> list[Figure]:
    """A diagram of each surgeon's edits, and their mean size by surgeon and matrix; nothing where there are no edits.

    ``config`` is the run's: its ``edit`` says which numbers of an action belong to which matrix.

    Raises:
        DataError: a malformed row, naming its line.
    """
    by_surgeon: dict[str, list[JsonObject]] = {}
    for _, row in read_rows(decisions):
        if is_edit(row):
            by_surgeon.setdefault(str(row.get("arm", "")), []).append(row)
    if not by_surgeon:
        return []
    own = [rows for rows in by_surgeon.values() if "sites" not in rows[0]] or list(by_surgeon.values())
    size = max(len(row["action"]) for rows in own for row in rows)
    names = action_names(size, config)
    figures: list[Figure] = [
        _squares(surgeon, rows, [tuple(site) for site in rows[0].get("sites", names)], first=index == 0)
        for index, (surgeon, rows) in enumerate(by_surgeon.items())
    ]
    by_surgeon = {surgeon: rows for surgeon, rows in by_surgeon.items() if "sites" not in rows[0]}
    groups: dict[str, list[int]] = {}
    for index, (group, _) in enumerate(names):
        groups.setdefault(group, []).append(index)
    if by_surgeon and len(groups) <= MAXIMUM_GROUPS:
        figures.append(
            Matrix(
                "Mean size of the edits by matrix",
                "share of the largest that is allowed",
                rows=[title_case(surgeon) for surgeon in by_surgeon],
                columns=list(groups),
                values=[[_mean_size(rows, kept) for kept in groups.values()] for rows in by_surgeon.values()],
                low=0.0,
                high=1.0,
            )
        )
    return figures


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


def _squares(surgeon: str, rows: Sequence[JsonObject], names: Sequence[tuple[str, str]], *, first: bool) -> Squares:
    num_committed = sum(bool(row["committed"]) for row in rows)
    return Squares(
        title=f"{title_case(surgeon)}: {num_committed} of {len(rows)} committed",
        rows=names,
        actions=[
            Action(row["action"], str(row.get("edit", "")), _described(row), marked=bool(row["committed"]))
            for row in rows
        ],
        unfolded=first or num_committed > 0,
    )


def _described(row: Mapping[str, Any]) -> str:
    reward = f", reward {number(row['reward'])}" if is_finite(row.get("reward")) else ""
    return f"edit {row.get('edit', '')}{reward}, {'committed' if row['committed'] else 'undone'}"


def _mean_size(rows: Sequence[JsonObject], kept: Sequence[int]) -> float:
    sizes = [abs(row["action"][k]) for row in rows for k in kept if k < len(row["action"])]
    return sum(sizes) / len(sizes) if sizes else math.nan
