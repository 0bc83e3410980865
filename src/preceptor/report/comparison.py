"""What ``comparison.json`` says, for the page: differences with their intervals, as figures and as tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from preceptor.report.arms import COUNTS, title_case
from preceptor.report.drawing import ArmChart, difference_chart, interval_text, number
from preceptor.report.run_folder import is_finite


@dataclass(frozen=True)
class Contrast:
    """One metric on one split: the reference arm against each other one."""

    title: str
    unit: str
    chart: ArmChart
    costs: list[str]
    rows: list[list[str]]
    """arm, mean, interquartile mean, difference, probability of improvement, may be claimed, seeds, costs."""
    reference: str
    short: str
    """The reference without its configuration."""


def contrasts(comparison: Mapping[str, Any]) -> list[Contrast]:
    """A figure and a table for each compared metric of ``comparison.json``."""
    compared = comparison.get("comparisons", [])
    found = []
    for metric, split in dict.fromkeys((c["metric"], c["split"]) for c in compared):
        rows = [c for c in compared if (c["metric"], c["split"]) == (metric, split)]
        reference, unit, arms = str(rows[0]["arm"]), str(rows[0]["unit"]), comparison["arms"][split]
        short = title_case(reference).partition(" (")[0]
        named = [(title_case(str(c["baseline"])), bool(c["claimed"]), c) for c in rows]
        title = title_case(metric) + (", held out" if split == "held_out" else "")
        costs = [cost for cost in COUNTS if any(cost in arms.get(arm, {}) for arm in (reference, *_baselines(rows)))]
        table = [
            _row(arms, reference, metric, costs, None),
            *(_row(arms, c["baseline"], metric, costs, c) for c in rows),
        ]
        found.append(
            Contrast(
                title=title,
                unit=unit,
                chart=difference_chart(f"{short} less each arm, {title}", unit, named),
                costs=[title_case(cost) for cost in costs],
                rows=table,
                reference=title_case(reference),
                short=short,
            )
        )
    return found


def durations(seconds: Mapping[str, Any] | None, groups: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(run, its group, seconds of its steps) of every run that ``seconds.json`` names."""
    taken = (seconds or {}).get("runs", {})
    return [
        (str(name), groups.get(name, ""), f"{value:,.1f}" if is_finite(value) else "\N{EN DASH}")
        for name, value in taken.items()
    ]


def group_labels(comparison: Mapping[str, Any]) -> dict[str, str]:
    """run -> the label of its group, "" where there is one group."""
    return {str(run): str(group["label"]) for group in comparison.get("groups", []) for run in group["runs"]}


def _baselines(rows: list[Mapping[str, Any]]) -> list[str]:
    return [str(row["baseline"]) for row in rows]


def _row(
    arms: Mapping[str, Any], arm: str, metric: str, costs: list[str], compared: Mapping[str, Any] | None
) -> list[str]:
    own = arms[arm]
    interquartile = own[metric].get("interquartile_mean")
    cells = [title_case(arm), interval_text(own[metric])]
    cells.append(interval_text({**interquartile, "mean": interquartile["iqm"]}) if interquartile else "")
    if compared is None:
        cells += ["", "", "", ""]
    else:
        improvement = compared["improvement"]
        cells += [
            interval_text(compared),
            interval_text({**improvement, "mean": improvement["probability"]}),
            "yes" if compared["claimed"] else "no",
            number(compared["num_seeds"]),
        ]
    return [*cells, *(f"{own[cost]['mean']:,.0f}" if cost in own else "\N{EN DASH}" for cost in costs)]
