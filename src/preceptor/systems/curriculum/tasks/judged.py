"""``result.json`` of an amortised teacher: the success of every rule's students on sets of tasks that it never saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from preceptor.evaluation.summary import Comparison, compare, summarise
from preceptor.evaluation.verdict import MINIMUM_SEEDS, claims, opening
from preceptor.systems.curriculum.tasks.result import curve_at, level_charts, mean_success

METRIC = "mean_success"
UNITS = {
    METRIC: "share of answers",
    "last_success": "share of answers",
    "groups_that_teach": "share of groups",
    "rollout_tokens": "tokens",
}
TABLE = (METRIC, "last_success", "groups_that_teach", "rollout_tokens")
SUBJECT = "the learned teacher"
_SPLIT = "held_out"


def judged_records(outcomes: Sequence[Mapping[str, Any]], *, seed: int) -> list[dict[str, Any]]:
    """One record per unseen set and rule.

    - ``mean_success``: on the way, over the student's tokens, each a mean over the levels that count;
    - ``last_success``: at the last measurement.
    """
    records = []
    for outcome in outcomes:
        curve = [(tokens, mean_success(rates, outcome["counted"])) for tokens, rates in outcome["curve"]]
        counts = outcome["counts"]
        records.append(
            {
                "arm": outcome["rule"],
                "item": outcome["set"],
                "split": _SPLIT,
                "seed": seed,
                METRIC: success_area(curve, max_tokens=outcome["max_tokens"]),
                "last_success": curve[-1][1],
                "groups_that_teach": counts["groups_that_teach"] / max(counts["groups"], 1),
                "rollout_tokens": counts["rollout_tokens"],
            }
        )
    return records


def success_area(curve: Sequence[tuple[int, float]], *, max_tokens: int) -> float:
    """Mean height of (tokens, success) up to ``max_tokens``, by trapezoids; a batch may go a little beyond it.

    >>> success_area([(0, 0.0), (50, 0.5), (150, 1.0)], max_tokens=100)  # 12.5 to 50, then 31.25 from 0.5 to 0.75
    0.4375
    """
    area = 0.0
    for (begin, low), (end, high) in pairwise(curve):
        if begin >= max_tokens:
            break
        until = min(end, max_tokens)
        at_end = low + (high - low) * (until - begin) / max(end - begin, 1)
        area += (until - begin) * (low + at_end) / 2
    return area / max(min(curve[-1][0], max_tokens), 1)


def over_sets(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One record a rule and seed, the mean over the unseen sets.

    Sets share tasks, so they are no independent sample of anything; what is claimed is about these sets alone, over
    seeds.
    """
    cells: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for record in records:
        cells.setdefault((record["arm"], record["seed"]), []).append(record)
    return [
        {
            "arm": arm,
            "item": "all unseen sets",
            "split": _SPLIT,
            "seed": seed,
            **{metric: sum(record[metric] for record in of_cell) / len(of_cell) for metric in UNITS},
        }
        for (arm, seed), of_cell in cells.items()
    ]


def judged_result(
    records: Sequence[Mapping[str, Any]],
    *,
    config: Mapping[str, Any],
    seeds: Sequence[int],
    outcomes: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """``result.json`` of one run, or of several, from their records.

    ``taught`` holds ``{SET: {RULE: {"mean", "low", "high"}}}``, the mean success of every rule's students by set.

    Args:
        records: of every rule, unseen set and seed.
        config: the resolved configuration.
        seeds: of the runs.
        outcomes: of one run, for the charts.
    """
    averaged = over_sets(records)
    rules = summarise(averaged, units=UNITS, split=_SPLIT)
    # Uniform first, which the verdict opens with: it is the teacher before training.
    comparisons = [
        compare(averaged, metric=METRIC, arm="learned", baseline=rule, unit=UNITS[METRIC], split=_SPLIT)
        for rule in sorted(rules, key=lambda rule: rule != "uniform")
        if rule != "learned"
    ]
    taught = {}
    for item in dict.fromkeys(record["item"] for record in records):
        of_item = summarise([record for record in records if record["item"] == item], units=UNITS, split=_SPLIT)
        taught[item] = {
            rule: {end: metrics[METRIC][end] for end in ("mean", "low", "high")} for rule, metrics in of_item.items()
        }
    return {
        "system": "curriculum",
        "status": "finished",
        "config": config,
        "seeds": list(seeds),
        "arms": rules,
        "table": list(TABLE),
        "baseline": "uniform",
        "lower_is_better": [],
        "comparisons": comparisons,
        "taught": taught,
        "subject": SUBJECT,
        "verdict": judged_verdict(comparisons, rules),
        "charts": judged_charts(outcomes),
        "records": list(records),
        "paired_records": averaged,
    }


def judged_verdict(comparisons: Sequence[Comparison], rules: Mapping[str, Any]) -> str:
    """A paragraph: the learned rule against every other, all differences claimed as one family."""
    if not comparisons:
        return "Nothing was compared with the learned rule, so no difference can be claimed."
    claimed = claims(comparisons)
    happened = opening(
        comparisons[0],
        subject=SUBJECT,
        claimed=claimed[0],
        lower_is_better=False,
        place="on tasks it never saw",
    )
    parts = []
    for comparison, may_claim in zip(comparisons, claimed, strict=True):
        interval = "" if comparison["low"] is None else f" ({comparison['low']:+.3f} to {comparison['high']:+.3f})"
        words = "" if may_claim or comparison["num_seeds"] < MINIMUM_SEEDS else ", not to be told from chance"
        parts.append(f"{comparison['baseline'].replace('_', ' ')} {comparison['mean']:+.3f}{interval}{words}")
    own = rules["learned"][METRIC]["mean"]
    return f"{happened} Mean success on the way {own:.3f}; above " + "; ".join(parts) + "."


def judged_charts(outcomes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of every unseen set the success under every rule, and what the learned rule drew, over tokens."""
    charts = []
    for item in dict.fromkeys(outcome["set"] for outcome in outcomes):
        of_item = {outcome["rule"]: outcome for outcome in outcomes if outcome["set"] == item}
        curves = {
            rule: [(tokens, mean_success(rates, outcome["counted"])) for tokens, rates in outcome["curve"]]
            for rule, outcome in of_item.items()
        }
        ticks = sorted({tokens for curve in curves.values() for tokens, _ in curve})
        charts.append(
            {
                "kind": "series",
                "title": f"Mean success: {item}",
                "unit": "share of answers",
                "x_label": "answer tokens",
                "x": ticks,
                "lines": {rule: curve_at(curve, ticks) for rule, curve in curves.items()},
            }
        )
        if (learned := of_item.get("learned")) is not None:
            charts += level_charts(f"learned, {item}", learned["curve"], learned["weights"], names=learned["names"])
    return charts
