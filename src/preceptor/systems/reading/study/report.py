"""What the page shows of a study: every method's gain and share of the gap, what was read, and the curves."""

from __future__ import annotations

import itertools
import json
from typing import Any

from preceptor.report.decisions import decisions_section
from preceptor.report.run_folder import RunFolder, read_rows
from preceptor.report.sections import Figure, Lines, Passages, Section, Table

MAXIMUM_READINGS = 6
"""Held-out cases whose greedy reading is written out."""

LINES = (
    Lines("Gain of a reading", "nats per value token", {"reward": "gain"}),
    Lines("Gap closed, training", "share", {"gap_closed_train": "gap closed"}),
    Lines("On the target article", "share of what is read", {"on_target": "on target"}, limits=(0.0, 1.0)),
    Lines("Selection entropy", "share of ln(remaining)", {"selection_entropy": "entropy"}, limits=(0.0, 1.0)),
    Lines("Temperature", "standard deviations", {"temperature": "temperature"}),
    Lines("Gradient norm", "dimensionless", {"gradient_norm": "policy", "model_gradient_norm": "model"}),
)


def sections(run: RunFolder) -> list[Section]:
    """Tables of both modes, some readings, the curves, and the decisions."""
    study = (run.result or {}).get("study") or {}
    titles = {"asked": "Asked about an article", "seed": "One sentence of an article read"}
    found = [
        Section(
            titles.get(mode, mode),
            [_table(methods)],
            lead="Articles never seen in training. Gain over reading nothing; share of the gap from random to oracle.",
        )
        for mode, methods in study.items()
    ]
    if readings := _readings(run):
        found.append(Section("What the policy reads", readings, lead="Held-out cases, the likeliest choice each time."))
    curves: list[Figure] = [*LINES]
    return [*found, Section("Training", curves), *decisions_section(run)]


def _table(methods: dict[str, Any]) -> Table:
    rows = []
    for name, entry in sorted(methods.items(), key=lambda item: -item[1]["gain"]["mean"]):
        rows.append(
            [name.replace("_", " "), _interval(entry["gain"]), _interval(entry["share"]), str(entry["scorings"])]
        )
    return Table(
        "Methods", ["method", "gain, nats per value token", "share of the gap", "scorings of a new case"], rows
    )


def _interval(entry: dict[str, Any]) -> str:
    if entry["mean"] is None:
        return ""
    if entry["low"] is None:
        return f"{entry['mean']:.3f}"
    return f"{entry['mean']:.3f} ({entry['low']:.3f} to {entry['high']:.3f})"


def _readings(run: RunFolder) -> list[Passages]:
    path = run.path / "pools.json"
    if run.decisions is None or not path.is_file():
        return []
    pools = json.loads(path.read_bytes()).get("judge", {})
    rows = (row for _, row in read_rows(run.decisions) if row.get("arm") == "learned_greedy")
    found = []
    for row in itertools.islice(rows, MAXIMUM_READINGS):
        pool_name, mode, target, indices = str(row["case"]).split("/")
        pool = pools[pool_name]
        held_out = pool["held_out"][int(target)]
        context = [held_out[int(index)][0] for index in indices.split("-")] if mode == "asked" else [held_out[0][1]]
        passages = [(index, *pool["candidates"][index]) for index in row["order"]]
        sources = [pool["articles"][pool["sources"][index]] for index in row["order"]]
        found.append(Passages(f"{row['article']}: {' '.join(context)}", passages, note=f"From: {', '.join(sources)}."))
    return found
