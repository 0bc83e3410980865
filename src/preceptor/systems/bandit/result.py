"""``result.json``: methods × metrics with intervals, what transfers between contexts, and a verdict in words."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from preceptor.evaluation.intervals import crossed_degrees_of_freedom, crossed_sums, percentile_interval
from preceptor.evaluation.summary import SPLITS, Comparison, Estimate, compare, summarise
from preceptor.evaluation.verdict import Conclusion, verdict
from preceptor.systems.bandit.evaluate import PREFERS, UNITS
from preceptor.systems.bandit.unseen import unit_of

_KEYS = ("arm", "item", "split", "seed")

TABLE = ("best_word", "reward", "regret", "value", "winner", "prompt")
"""Metrics that the terminal shows; the page shows all."""

EXPLANATIONS = ("value", "winner", "prompt")
SUBJECT = "the trained model"
"""Who the verdict opens with."""

CROSSING = ("first_word", "first_word_named_first", "first_word_named_second", "template_spread")

LOWER_IS_BETTER = ("regret",)
IN_CONTEXT_LOWER_IS_BETTER = (*LOWER_IS_BETTER, "suffix_failure")

COMPARED = (
    ("best_word", "pretrained"),
    ("reward", "uniform"),
    ("reward", "thompson"),
    ("optimal_share", "uniform"),
    ("optimal_share", "pretrained"),
)
"""(metric, method that the learned policy is compared with), where both were measured."""


def result(records: Sequence[Mapping[str, Any]], *, config: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
    """The result of one run, or of several over the same bandits, from their records.

    Args:
        records: one for each method, bandit or pair of words, split and seed.
        config: the resolved configuration.
        seeds: of the runs.
    """
    if config.get("mode") == "in-context":
        return _in_context_result(records, config=config, seeds=seeds)
    splits = [split for split in SPLITS if any(record["split"] == split for record in records)]
    averaged = _over_items(records)
    # Training templates and held-out ones side by side; the latter carry a prefix.
    methods: dict[str, dict[str, Any]] = {}
    for split in splits:
        prefix = "held_out_" if split == "held_out" else ""
        for method, metrics in summarise(averaged, units=UNITS, split=split).items():
            methods.setdefault(method, {}).update({prefix + metric: estimate for metric, estimate in metrics.items()})
    comparisons: list[Comparison] = [
        compare(averaged, metric=metric, arm="learned", baseline=baseline, unit=UNITS[metric], split=split)
        for split in splits
        for metric, baseline in COMPARED
        # Only where both methods have the metric: baselines have no words to prefer.
        if {"learned", baseline} <= {r["arm"] for r in averaged if r["split"] == split and metric in r}
    ]
    crossing = _crossed_pairs(records, splits)
    scores = word_scores(records)
    measured, conclusions = [], []
    if crossing:
        conclusions = explanation_conclusions(averaged)
        num_pairs = len({row["pair"] for row in crossing})
        measured = [
            _explanations_sentence(methods["learned"], num_pairs=num_pairs),
            _scores_sentence(scores["learned"]),
        ]
    return {
        "system": "bandit",
        "status": "finished",
        "config": config,
        "seeds": list(seeds),
        "arms": methods,
        "table": list(TABLE),
        "oracles": ["optimum"],
        "baseline": "uniform",
        "lower_is_better": [*LOWER_IS_BETTER],
        "comparisons": comparisons,
        "crossing": crossing,
        "word_scores": scores,
        "subject": SUBJECT,
        "conclusions": conclusions,
        "measured": measured,
        "verdict": verdict(
            comparisons, lower_is_better=LOWER_IS_BETTER, conclusions=conclusions, measured=measured, subject=SUBJECT
        ),
        "records": list(records),
        "paired_records": averaged,
    }


def _in_context_result(
    records: Sequence[Mapping[str, Any]], *, config: Mapping[str, Any], seeds: Sequence[int]
) -> dict[str, Any]:
    """The result of learning to explore: regrets on unseen bandits, with intervals over seeds and bandits."""
    units = {metric: unit_of(metric) for record in records for metric in record.keys() - {*_KEYS}}
    methods: dict[str, dict[str, Any]] = {}
    for split, prefix in (("train", ""), ("held_out", "held_out_")):
        for method, metrics in summarise(records, units=units, split=split).items():
            methods.setdefault(method, {}).update({prefix + metric: estimate for metric, estimate in metrics.items()})
    regret: dict[str, dict[str, Any]] = {}
    for method, metrics in methods.items():
        for metric, estimate in metrics.items():
            if (found := re.fullmatch(r"regret_at_(\d+)", metric)) is not None:
                ends = {end: estimate[end] for end in ("mean", "low", "high")}
                regret.setdefault(method, {})[found[1]] = ends
        if method in regret:  # in the order of the rounds
            regret[method] = dict(sorted(regret[method].items(), key=lambda pair: int(pair[0])))
    baselines = [name for name in ("thompson", "greedy", "uniform", "optimal") if "regret" in methods.get(name, {})]
    comparisons = [
        compare(records, metric="regret", arm="learned", baseline=baseline, unit="reward") for baseline in baselines
    ]
    ratios = {
        metric: regret_ratio(records, metric=metric)
        for metric in sorted(units)
        if metric == "regret" or re.fullmatch(r"regret_(\d+x|[a-z_]+)", metric)
        if {"learned", "thompson"} <= {record["arm"] for record in records if metric in record}
    }
    ratio = ratios["regret"]
    return {
        "system": "bandit",
        "status": "finished",
        "config": config,
        "seeds": list(seeds),
        "arms": methods,
        "table": ["regret", "suffix_failure", "greediness", "optimal_share"],
        "oracles": ["optimal"],
        "baseline": "thompson",
        "subject": SUBJECT,
        "lower_is_better": [*IN_CONTEXT_LOWER_IS_BETTER],
        "comparisons": comparisons,
        "regret": regret,
        "of_thompson": ratios,
        "verdict": verdict(comparisons, lower_is_better=IN_CONTEXT_LOWER_IS_BETTER, subject=SUBJECT)
        + f" Regret of Thompson sampling's: {_ratio_text(ratio)}.",
        "records": list(records),
        "paired_records": list(records),
    }


def regret_ratio(records: Sequence[Mapping[str, Any]], *, metric: str, baseline: str = "thompson") -> dict[str, Any]:
    """The learned model's regret over the baseline's, a ratio of sums; seeds and blocks of bandits are resampled."""
    learned, theirs = (
        {
            (record["seed"], record["item"]): float(record[metric])
            for record in records
            if record["arm"] == method and record["split"] == "train" and metric in record
        }
        for method in ("learned", baseline)
    )
    ratio = sum(learned.values()) / sum(theirs.values())
    sums, of_baseline = crossed_sums(learned, theirs, num_resamples=10_000, seed=0)
    residuals = {cell: value - ratio * theirs[cell] for cell, value in learned.items()}
    low, high = percentile_interval(
        sums / of_baseline, level=0.95, degrees_of_freedom=crossed_degrees_of_freedom(residuals)
    )
    return {"mean": ratio, "low": low, "high": high, "unit": "share", "n": len(learned)}


def _ratio_text(ratio: Mapping[str, Any]) -> str:
    return f"{ratio['mean']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def _over_items(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One record for each method, split and seed: each metric's mean over the bandits, or the pairs, that have it.

    Bandits and pairs are fixed, not drawn from a population, so the intervals are over seeds alone.
    """
    cells: dict[tuple[Any, ...], dict[str, list[float]]] = {}
    for record in records:
        cell = cells.setdefault((record["arm"], record["split"], record["seed"]), {})
        for metric in UNITS:
            if metric in record:
                cell.setdefault(metric, []).append(record[metric])
    return [
        {"arm": method, "item": "all", "split": split, "seed": seed}
        | {metric: sum(values) / len(values) for metric, values in metrics.items()}
        for (method, split, seed), metrics in cells.items()
    ]


def explanation_conclusions(averaged: Sequence[Mapping[str, Any]]) -> list[Conclusion]:
    """For each explanation, that it fits a larger share of the crossed pairs than either other one, over seeds."""
    shares = [
        {"arm": name, "item": "all", "split": "train", "seed": record["seed"], "share of crossed pairs": record[name]}
        for record in averaged
        if record["arm"] == "learned" and record["split"] == "train"
        for name in EXPLANATIONS
        if name in record
    ]
    return [
        Conclusion(
            comparisons=[
                compare(shares, metric="share of crossed pairs", arm=name, baseline=other, unit="share of pairs")
                for other in EXPLANATIONS
                if other != name
            ],
            claimed=f"Of the explanations of the crossed pairs, {name} explains most.",
            otherwise="",
        )
        for name in EXPLANATIONS
    ]


def _crossed_pairs(records: Sequence[Mapping[str, Any]], splits: Sequence[str]) -> list[dict[str, Any]]:
    """Each crossed pair under each model and split, with intervals over seeds alone."""
    rows = []
    for pair in dict.fromkeys(record["item"] for record in records if "first_word" in record):
        of_pair = [record for record in records if record["item"] == pair]
        for split in splits:
            for method, metrics in summarise(of_pair, units=UNITS, split=split).items():
                estimates: dict[str, Estimate] = {name: metrics[name] for name in (*CROSSING, *EXPLANATIONS)}
                rows.append({"pair": pair, "split": split, "arm": method, **estimates})
    return rows


def word_scores(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """A score for each word such that the log-odds of a crossed pair are the difference of its words' scores.

    Least squares over the pairs of each seed, on training templates; the scores of a seed sum to 0. If each word had
    the same score in every context, the fit would be exact: ``explained`` is the share of the log-odds' sum of squares
    that it accounts for. Each entry has its mean and interval over seeds, in nats and as a share.
    """
    scores_of: dict[str, dict[str, Any]] = {}
    crossed = [record for record in records if "first_word" in record and record["split"] == "train"]
    words = list(dict.fromkeys(word for record in crossed for word in record["item"].split(" / ")))
    # Fitted for each seed alone, so that the interval over seeds includes the error of the fit.
    for method in dict.fromkeys(record["arm"] for record in crossed):
        fitted: list[dict[str, Any]] = []
        for seed in dict.fromkeys(record["seed"] for record in crossed if record["arm"] == method):
            own = [record for record in crossed if record["arm"] == method and record["seed"] == seed]
            # [pairs, words]: +1 for the pair's first word, −1 for its second.
            design = np.array([[_side(word, record["item"]) for word in words] for record in own], dtype=float)
            odds = np.array([_log_odds(record["first_word"]) for record in own])
            scores = np.linalg.lstsq(design, odds, rcond=None)[0]  # the shortest solution, whose sum is 0
            left = float(((odds - design @ scores) ** 2).sum())
            # All log-odds 0: the scores are 0 and explain everything.
            total = float((odds**2).sum())
            cells = {**dict(zip(words, scores.tolist(), strict=True)), "explained": 1 - left / total if total else 1.0}
            fitted.append({"arm": method, "item": "all", "split": "train", "seed": seed, **cells})
        units = {**dict.fromkeys(words, "nats"), "explained": "share"}
        scores_of[method] = summarise(fitted, units=units)[method]
    return scores_of


def _side(word: str, pair: str) -> int:
    first, second = pair.split(" / ")
    return int(word == first) - int(word == second)


def _log_odds(probability: float) -> float:
    """In nats; a probability is kept at least 1e-12 away from 0 and 1.

    >>> [round(_log_odds(probability), 1) for probability in (0.0, 0.5, 1.0)]
    [-27.6, 0.0, 27.6]
    """
    clipped = min(max(probability, 1e-12), 1 - 1e-12)
    return math.log(clipped / (1 - clipped))


def _scores_sentence(scores: Mapping[str, Estimate]) -> str:
    words = sorted((word for word in scores if word != "explained"), key=lambda word: -scores[word]["mean"])
    listed = ", ".join(f"{word} {scores[word]['mean']:+.1f}" for word in words)
    return (
        f"One score a word ({listed} nats) explains {100 * scores['explained']['mean']:.0f} % of the log-odds of the "
        "crossed pairs."
    )


def _explanations_sentence(learned: Mapping[str, Estimate], *, num_pairs: int) -> str:
    """The sentence about the three explanations, on training templates."""
    shares = []
    for name in EXPLANATIONS:
        estimate = learned[name]
        low, high = estimate["low"], estimate["high"]
        interval = "" if low is None or high is None else f" ({100 * low:.0f} to {100 * high:.0f})"
        shares.append(f"{name} {100 * estimate['mean']:.0f} %{interval}")
    return (
        f"Across {num_pairs} crossed pairs of words (preferred above {PREFERS:g}) the explanations fit this share of "
        f"them: {', '.join(shares)}."
    )
