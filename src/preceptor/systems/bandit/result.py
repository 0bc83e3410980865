"""``result.json``: arms × metrics with intervals, what crossed between contexts, and a verdict in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from preceptor.evaluation.summary import SPLITS, Comparison, Estimate, compare, summarise
from preceptor.evaluation.verdict import verdict
from preceptor.systems.bandit.crossing import PREFERS, UNITS

TABLE = ("best_word", "reward", "regret", "value", "winner", "prompt")
"""Metrics that the terminal shows; the page shows all."""

EXPLANATIONS = ("value", "winner", "prompt")
CROSSING = ("first_word", "first_word_named_first", "first_word_named_second", "template_spread")

COMPARED = (
    ("best_word", "pretrained"),
    ("reward", "uniform"),
    ("reward", "thompson"),
    ("optimal_share", "uniform"),
    ("optimal_share", "pretrained"),
)
"""(metric, arm that the learned one is compared with), where both were measured."""


def bandit_result(
    records: Sequence[Mapping[str, Any]], *, config: Mapping[str, Any], seeds: Sequence[int]
) -> dict[str, Any]:
    """The result of one run, or of several over the same bandits, from their records.

    Args:
        records: of every arm, bandit or pair of words, split and seed.
        config: the resolved configuration.
        seeds: of the runs.
    """
    splits = [split for split in SPLITS if any(record["split"] == split for record in records)]
    averaged = _over_items(records)
    arms: dict[str, dict[str, Any]] = {}
    for split in splits:
        prefix = "held_out_" if split == "held_out" else ""
        for arm, metrics in summarise(averaged, units=UNITS, split=split).items():
            arms.setdefault(arm, {}).update({prefix + metric: estimate for metric, estimate in metrics.items()})
    comparisons: list[Comparison] = [
        compare(averaged, metric=metric, arm="learned", baseline=baseline, unit=UNITS[metric], split=split)
        for split in splits
        for metric, baseline in COMPARED
        if {"learned", baseline} <= {r["arm"] for r in averaged if r["split"] == split and metric in r}
    ]
    crossing = _crossing(records, splits)
    text = verdict(comparisons)
    if crossing:
        text += " " + _explained(arms["learned"], num_pairs=len({row["pair"] for row in crossing}))
    return {
        "system": "bandit",
        "status": "finished",
        "config": config,
        "seeds": list(seeds),
        "arms": arms,
        "table": list(TABLE),
        "oracles": ["optimum"],
        "baseline": "uniform",
        "lower_is_better": ["regret"],
        "comparisons": comparisons,
        "crossing": crossing,
        "verdict": text,
        "records": list(records),
    }


def _over_items(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One record for every arm, split and seed: each metric's mean over the bandits, or the pairs, that have it.

    Bandits and pairs are given, not drawn from a population, so the intervals are over seeds alone.
    """
    cells: dict[tuple[Any, ...], dict[str, list[float]]] = {}
    for record in records:
        cell = cells.setdefault((record["arm"], record["split"], record["seed"]), {})
        for metric in UNITS:
            if metric in record:
                cell.setdefault(metric, []).append(record[metric])
    return [
        {"arm": arm, "item": "all", "split": split, "seed": seed}
        | {metric: sum(values) / len(values) for metric, values in metrics.items()}
        for (arm, split, seed), metrics in cells.items()
    ]


def _crossing(records: Sequence[Mapping[str, Any]], splits: Sequence[str]) -> list[dict[str, Any]]:
    """Every crossed pair under every model and split, with intervals over seeds alone."""
    rows = []
    for pair in dict.fromkeys(record["item"] for record in records if "first_word" in record):
        of_pair = [record for record in records if record["item"] == pair]
        for split in splits:
            for arm, metrics in summarise(of_pair, units=UNITS, split=split).items():
                kept: dict[str, Estimate] = {name: metrics[name] for name in (*CROSSING, *EXPLANATIONS)}
                rows.append({"pair": pair, "split": split, "arm": arm, **kept})
    return rows


def _explained(learned: Mapping[str, Estimate], *, num_pairs: int) -> str:
    """The sentence about the three explanations, on the templates that were trained on."""
    shares = []
    for name in EXPLANATIONS:
        estimate = learned[name]
        low, high = estimate["low"], estimate["high"]
        interval = "" if low is None or high is None else f" ({100 * low:.0f} to {100 * high:.0f})"
        shares.append((estimate["mean"], f"{name} {100 * estimate['mean']:.0f} %{interval}"))
    best = max(mean for mean, _ in shares)
    leading = [name for name, (mean, _) in zip(EXPLANATIONS, shares, strict=True) if mean == best]
    conclusion = (
        "none of the three explains a pair"
        if best == 0
        else f"{' and '.join(leading)} explain{'s' if len(leading) == 1 else ''} most"
    )
    return (
        f"Across {num_pairs} crossed pairs of words (preferred above {PREFERS:g}) the explanations fit this share of "
        f"them: {', '.join(text for _, text in shares)}; {conclusion}."
    )
