"""``result.json`` of an amortised teacher: the success of every rule's students on sets of tasks that it never saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from preceptor.evaluation.summary import Comparison, compare, summarise
from preceptor.evaluation.verdict import MINIMUM_SEEDS, claims, opening
from preceptor.systems.curriculum.tasks.result import curve_at, mean_success

METRIC = "mean_success"
UNITS = {
    METRIC: "share of answers",
    "last_success": "share of answers",
    "groups_that_teach": "share of groups",
    "rollout_tokens": "tokens",
}
TABLE = (METRIC, "last_success", "groups_that_teach", "rollout_tokens")
_SPLIT = "held_out"


def judged_records(outcomes: Sequence[Mapping[str, Any]], *, seed: int) -> list[dict[str, Any]]:
    """One record per unseen set and rule.

    - ``mean_success``: mean over the measurements on the way (after the first), each a mean over the levels that count;
    - ``last_success``: at the last of them.
    """
    records = []
    for outcome in outcomes:
        curve = [mean_success(rates, outcome["counted"]) for _, rates in outcome["curve"]]
        counts = outcome["counts"]
        records.append(
            {
                "arm": outcome["rule"],
                "item": outcome["set"],
                "split": _SPLIT,
                "seed": seed,
                METRIC: sum(curve[1:]) / max(len(curve) - 1, 1),
                "last_success": curve[-1],
                "groups_that_teach": counts["groups_that_teach"] / max(counts["groups"], 1),
                "rollout_tokens": counts["rollout_tokens"],
            }
        )
    return records


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
    rules = summarise(records, units=UNITS, split=_SPLIT)
    comparisons = [
        compare(records, metric=METRIC, arm="learned", baseline=rule, unit=UNITS[METRIC], split=_SPLIT)
        for rule in rules
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
        "verdict": judged_verdict(comparisons, rules),
        "charts": judged_charts(outcomes),
        "records": list(records),
    }


def judged_verdict(comparisons: Sequence[Comparison], rules: Mapping[str, Any]) -> str:
    """A paragraph: the learned rule against every other, all differences claimed as one family."""
    if not comparisons:
        return "Nothing was compared with the learned rule, so no difference can be claimed."
    claimed = claims(comparisons)
    first = next((number for number, c in enumerate(comparisons) if c["baseline"] == "uniform"), 0)
    happened = opening(
        comparisons[first],
        subject="the learned teacher",
        claimed=claimed[first],
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
        if (learned := of_item.get("learned")) is None:
            continue
        for title, unit, rows in (
            ("Success by level", "share of answers", learned["curve"]),
            ("Weights of the levels", "share of draws", learned["weights"]),
        ):
            charts.append(
                {
                    "kind": "series",
                    "title": f"{title}, learned: {item}",
                    "unit": unit,
                    "x_label": "answer tokens",
                    "x": [tokens for tokens, _ in rows],
                    "lines": {
                        name: [values[index] for _, values in rows] for index, name in enumerate(learned["names"])
                    },
                }
            )
    return charts
