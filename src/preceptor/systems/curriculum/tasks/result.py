"""The result of RL on tasks: tokens to a success, rules × metrics with intervals, and charts by level."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from preceptor.evaluation.summary import Comparison, compare, summarise
from preceptor.evaluation.verdict import MINIMUM_SEEDS, claims, opening
from preceptor.systems.curriculum.result import first_reached

LEVELS = (0.5, 0.8)
"""Mean success rates whose cost is reported."""

UNITS = {
    "success": "share of answers",
    **{f"tokens_to_{level}": "tokens" for level in LEVELS},
    **{f"reached_{level}": "share of seeds" for level in LEVELS},
    **{f"log_tokens_to_{level}": "log tokens" for level in LEVELS},
    "groups_that_teach": "share of groups",
    "rollout_tokens": "tokens",
    "steps": "steps",
}
TABLE = ("success", *(f"tokens_to_{level}" for level in LEVELS), "reached_0.8", "groups_that_teach", "rollout_tokens")
_ITEM, _SPLIT = "all tasks", "held_out"


@dataclass
class TaskOutcome:
    """What a rule achieved and what it cost, as plain values.

    Attributes:
        curve: (answer tokens so far, success rate of each source) at each validation.
        weights: (answer tokens so far, weights of the sources) at each validation.
        drawn: nominal tokens drawn of each source.
        counts: ``rollout_tokens`` sampled for training (and by the oracle), ``steps`` taken, ``groups`` drawn and
            ``groups_that_teach``, those with right and wrong answers both.
    """

    curve: list[tuple[int, list[float]]] = field(default_factory=list)
    weights: list[tuple[int, list[float]]] = field(default_factory=list)
    drawn: list[float] = field(default_factory=list)
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("rollout_tokens", "steps", "groups", "groups_that_teach"), 0)
    )


def mean_success(rates: Sequence[float], counted: Sequence[bool]) -> float:
    """Over the sources that count."""
    return sum(rate for rate, counts in zip(rates, counted, strict=True) if counts) / sum(counted)


def success_curve(outcome: TaskOutcome, counted: Sequence[bool]) -> list[tuple[int, float]]:
    """(answer tokens, mean success over the sources that count) at each validation."""
    return [(tokens, mean_success(rates, counted)) for tokens, rates in outcome.curve]


def records_of(outcomes: Mapping[str, TaskOutcome], *, counted: Sequence[bool], seed: int) -> list[dict[str, Any]]:
    """One record per rule.

    - ``tokens_to_S``: answer tokens at which the mean success first reaches S, interpolated between validations; those
      spent in all where it never does, and then ``reached_S`` is 0;
    - ``log_tokens_to_S``: their logarithm, whose paired difference is the logarithm of a ratio;
    - ``success``: at the last validation.
    """
    records = []
    for rule, outcome in outcomes.items():
        curve = success_curve(outcome, counted)
        record: dict[str, Any] = {"arm": rule, "item": _ITEM, "split": _SPLIT, "seed": seed, "success": curve[-1][1]}
        for level in LEVELS:
            # first_reached looks for a fall; success rises.
            reached = first_reached([(tokens, -success) for tokens, success in curve], -level)
            tokens = max(curve[-1][0] if reached is None else reached, 1.0)
            record |= {
                f"tokens_to_{level}": float(tokens),
                f"reached_{level}": float(reached is not None),
                f"log_tokens_to_{level}": math.log(tokens),
            }
        counts = outcome.counts
        record["groups_that_teach"] = counts["groups_that_teach"] / max(counts["groups"], 1)
        record |= {"rollout_tokens": counts["rollout_tokens"], "steps": counts["steps"]}
        records.append(record)
    return records


def task_result(
    records: Sequence[Mapping[str, Any]], *, config: Mapping[str, Any], seeds: Sequence[int]
) -> dict[str, Any]:
    """``result.json`` of one run, or of several runs of the same rules, from their records.

    ``steps_to`` has the answer tokens to each success with their interval, and ``tokens_ratio`` the same as a ratio to
    uniform's: the geometric mean of the ratios within each seed.
    """
    units = {name: unit for name, unit in UNITS.items() if any(name in record for record in records)}
    rules = summarise(records, units=units, split=_SPLIT)
    pairs = [(rule, f"log_tokens_to_{level}") for rule in rules if rule != "uniform" for level in LEVELS]
    comparisons = [
        compare(records, metric=metric, arm=rule, baseline="uniform", unit=units[metric], split=_SPLIT)
        for rule, metric in pairs
        if "uniform" in rules
    ]
    return {
        "system": "curriculum",
        "status": "finished",
        "config": config,
        "seeds": list(seeds),
        "arms": rules,
        "table": list(TABLE),
        "baseline": "uniform",
        "lower_is_better": [f"{prefix}tokens_to_{level}" for level in LEVELS for prefix in ("", "log_")],
        "comparisons": comparisons,
        "steps_to": {
            rule: {
                str(level): {end: metrics[f"tokens_to_{level}"][end] for end in ("mean", "low", "high")}
                for level in LEVELS
            }
            for rule, metrics in rules.items()
        },
        "tokens_ratio": tokens_ratio(comparisons),
        "verdict": task_verdict(comparisons, rules),
        "records": list(records),
    }


def tokens_ratio(comparisons: Sequence[Comparison]) -> dict[str, dict[str, dict[str, float | None]]]:
    """``{rule: {success: {"mean", "low", "high"}}}``: tokens over uniform's, from differences of logarithms."""
    ratios: dict[str, dict[str, dict[str, float | None]]] = {}
    for comparison in comparisons:
        level = comparison["metric"].removeprefix("log_tokens_to_")
        ends = {"mean": comparison["mean"], "low": comparison["low"], "high": comparison["high"]}
        ratios.setdefault(comparison["arm"], {})[level] = {
            end: None if value is None else math.exp(value) for end, value in ends.items()
        }
    return ratios


def task_verdict(comparisons: Sequence[Comparison], rules: Mapping[str, Any]) -> str:
    """A paragraph: the tokens to a mean success of 0.8, relative to uniform's, all rules claimed as one family."""
    decisive = [c for c in comparisons if c["metric"] == "log_tokens_to_0.8"]
    claimed = {c["arm"]: claim for c, claim in zip(decisive, claims(decisive), strict=True)}
    parts = []
    for rule, levels in tokens_ratio(comparisons).items():
        ratio = levels["0.8"]
        interval = "" if ratio["low"] is None else f" ({ratio['low']:.2f} to {ratio['high']:.2f})"
        reached = rules[rule]["reached_0.8"]["mean"]
        stuck = "" if reached == 1 else f", reached by {100 * reached:.0f} % of seeds"
        if decisive[0]["num_seeds"] >= MINIMUM_SEEDS and not claimed[rule]:
            stuck += ", not to be told from chance"
        parts.append(f"{rule.replace('_', ' ')} {ratio['mean']:.2f}{interval}{stuck}")
    if not parts:
        return "Nothing was compared with uniform, so no difference can be claimed."
    seeds = comparisons[0]["num_seeds"]
    first = decisive[0]
    happened = opening(
        first, subject=first["arm"].replace("_", " "), claimed=claimed[first["arm"]], lower_is_better=True
    )
    return (
        f"{happened} Answer tokens to a mean success of 0.8, as a ratio to uniform's ({seeds} "
        f"seed{'s' * (seeds != 1)}, geometric mean): {'; '.join(parts)}."
    )


def task_charts(
    outcomes: Mapping[str, TaskOutcome], *, names: Sequence[str], counted: Sequence[bool]
) -> list[dict[str, Any]]:
    """Charts for the page: mean success of every rule; of each rule success and weight by level, over tokens."""
    ticks = sorted({tokens for outcome in outcomes.values() for tokens, _ in outcome.curve})
    charts = [
        {
            "kind": "series",
            "title": "Mean success",
            "unit": "share of answers",
            "x_label": "answer tokens",
            "x": ticks,
            "lines": {rule: curve_at(success_curve(outcome, counted), ticks) for rule, outcome in outcomes.items()},
        }
    ]
    for rule, outcome in outcomes.items():
        charts += level_charts(rule.replace("_", " "), outcome.curve, outcome.weights, names=names)
    return charts


def level_charts(
    of: str,
    curve: Sequence[tuple[int, Sequence[float]]],
    weights: Sequence[tuple[int, Sequence[float]]],
    *,
    names: Sequence[str],
) -> list[dict[str, Any]]:
    """Two charts: success of every level, and what was drawn, over tokens; ``of`` says under which rule, and where."""
    return [
        {
            "kind": "series",
            "title": f"{title}: {of}",
            "unit": unit,
            "x_label": "answer tokens",
            "x": [tokens for tokens, _ in rows],
            "lines": {name: [values[index] for _, values in rows] for index, name in enumerate(names)},
        }
        for title, unit, rows in (
            ("Success by level", "share of answers", curve),
            ("Weights of the levels", "share of draws", weights),
        )
    ]


def curve_at(curve: Sequence[tuple[int, float]], ticks: Sequence[int]) -> list[float | None]:
    """The curve's last value at or before each tick; None past its end."""
    values: list[float | None] = []
    for tick in ticks:
        before = [value for tokens, value in curve if tokens <= tick]
        values.append(before[-1] if before and tick <= curve[-1][0] else None)
    return values
