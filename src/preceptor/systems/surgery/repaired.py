"""``result.json`` of an amortised surgeon: the share of the damage that each way of repair takes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from preceptor.evaluation.summary import Comparison, Estimate, compare, summarise
from preceptor.evaluation.verdict import MINIMUM_SEEDS, claims
from preceptor.systems.surgery.search import EVALUATIONS

BUDGET = "repaired_within_10_passes"
"""After what 10 forward passes buy: 3 edits or gradient steps, which have backward passes, or 10 evaluations."""

UNITS = {
    **{f"repaired_{mark}": "share of the damage" for mark in EVALUATIONS},
    BUDGET: "share of the damage",
    "damage": "nats/token",
}
TABLE = (*(f"repaired_{mark}" for mark in EVALUATIONS), "damage")
RIVALS = (
    "shuffled", "evolution", "cma_es", "norms", "gradient", "sac",
    "calibration", "calibration_norms", "calibration_outputs", "tuning",
)  # fmt: skip
DECIDING = ("shuffled", "evolution", "cma_es")
"""Baselines that the surgeon must beat before the verdict says that it repairs better than search."""

_AT_BUDGET = {
    "amortised": 3, "shuffled": 3, "gradient": 3, "tuning": 3, "norms": 1, "calibration": 1, "calibration_norms": 1,
    "calibration_outputs": 1, "evolution": 10, "cma_es": 10, "sac": 10,
}  # fmt: skip
_TRAINING_COLUMNS = {"amortised": "SAC", "shuffled": "shuffled rewards"}


def result(records: Sequence[Mapping[str, Any]], *, config: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
    """``result.json`` of one amortised run, or of several, from their records.

    ``repair`` holds ``{METHOD: {EVALUATIONS: {"mean", "low", "high"}}}`` over the unseen students of sizes that the
    surgeon was trained on, under kinds of damage that it was trained on; ``repair_by_item`` the same of every unseen
    student and kind of damage by itself. ``comparisons`` and, for the other students under these kinds of damage,
    ``comparisons_by_item`` are one family.

    Args:
        records: of every method, item and seed.
        config: the resolved configuration.
        seeds: of the runs.
    """
    records = [_with_budget(record) for record in records]
    main = [record for record in records if is_main(record["item"], config)]
    comparisons = _comparisons(main)
    arms = summarise(main, units=UNITS, split="held_out")
    by_item, elsewhere = {}, {}
    for item in dict.fromkeys(record["item"] for record in records):
        of_item = [record for record in records if record["item"] == item]
        by_item[item] = _repair(summarise(of_item, units=UNITS, split="held_out"))
        if not is_main(item, config) and item.rpartition("/")[2] in config["amortised"]["damages"]:
            elsewhere[item] = _comparisons(of_item)
    return {
        "system": "surgery",
        "status": "finished",
        "config": config,
        "seeds": list(seeds),
        "arms": arms,
        "table": list(TABLE),
        "baseline": "no_edit",
        "lower_is_better": [],
        "comparisons": comparisons,
        "repair": _repair(arms),
        "repair_by_item": by_item,
        "comparisons_by_item": elsewhere,
        "verdict": _verdict(arms, comparisons, by_item, elsewhere),
        "charts": _charts(arms, by_item),
        "records": records,
        # What a sweep compares: other students and kinds are no sample of these, and have comparisons of their own.
        "paired_records": main,
    }


def is_main(item: str, config: Mapping[str, Any]) -> bool:
    """Whether ``item`` is an unseen student of a size, and a kind of damage, that the surgeon was trained on."""
    student, _, kind = item.rpartition("/")
    options = config["amortised"]
    of_size = student.startswith("unseen_") and student.rpartition("_")[2] in options["sizes"]
    return of_size and kind in options["damages"]


def _with_budget(record: Mapping[str, Any]) -> dict[str, Any]:
    mark = _AT_BUDGET.get(record["arm"])
    # Equal cost: what each method had when 10 forward passes were spent.
    within = record.get(f"repaired_{mark}")
    return dict(record) if within is None else {**record, BUDGET: within}


def _repair(arms: Mapping[str, Mapping[str, Estimate]]) -> dict[str, dict[str, dict[str, float | None]]]:
    return {
        method: {
            str(mark): {end: metrics[f"repaired_{mark}"][end] for end in ("mean", "low", "high")}
            for mark in EVALUATIONS
            if f"repaired_{mark}" in metrics
        }
        for method, metrics in arms.items()
    }


def _comparisons(records: Sequence[Mapping[str, Any]]) -> list[Comparison]:
    """The surgeon against every rival that these records hold, within 10 forward passes."""
    arms = {record["arm"] for record in records if BUDGET in record}
    return [
        compare(records, metric=BUDGET, arm="amortised", baseline=rival, unit=UNITS[BUDGET], split="held_out")
        for rival in RIVALS
        if {"amortised", rival} <= arms
    ]


def _verdict(
    arms: Mapping[str, Mapping[str, Estimate]],
    comparisons: Sequence[Comparison],
    by_item: Mapping[str, Mapping[str, Mapping[str, Any]]],
    elsewhere: Mapping[str, Sequence[Comparison]],
) -> str:
    """What is claimed of the students of trained sizes and of each other one, all of it as one family."""
    if "amortised" not in arms:
        return "No amortised surgeon was judged on an unseen student of a size that it was trained on."
    shares = {mark: arms["amortised"][f"repaired_{mark}"] for mark in (1, 3)}
    sentences = [
        f"On unseen students the surgeon repairs {_percent(shares[1])} of unseen damage in one edit and "
        f"{_percent(shares[3])} in three."
    ]
    if not comparisons:
        return sentences[0]
    claimed = claims([*comparisons, *(c for each in elsewhere.values() for c in each)])
    sentences.append(_against(comparisons, claimed[: len(comparisons)]))
    first = len(comparisons)
    for item, compared in elsewhere.items():
        if compared:
            edits = by_item[item]["amortised"]
            student, _, kind = item.rpartition("/")
            if sum(other.rpartition("/")[0] == student for other in elsewhere) > 1:
                student = f"{student} under {kind}"
            sentences.append(
                f"On {student} it is {_percent(edits['1'])} and {_percent(edits['3'])}. "
                + _against(compared, claimed[first : first + len(compared)])
            )
        first += len(compared)
    return " ".join(sentences)


def _against(comparisons: Sequence[Comparison], claimed: Sequence[bool]) -> str:
    """One sentence: whether the surgeon is above search and shuffled rewards, with every difference measured."""
    measured = ", ".join(f"{c['baseline']} {c['mean']:+.2f}" for c in comparisons)
    num_seeds = min(comparison["num_seeds"] for comparison in comparisons)
    # Above some rivals is no success: it takes search and shuffled rewards, all of them.
    deciding = [(c, claim) for c, claim in zip(comparisons, claimed, strict=True) if c["baseline"] in DECIDING]
    if num_seeds < MINIMUM_SEEDS:
        return (
            f"Within 10 forward passes its share less that of {measured}; {num_seeds} "
            f"seed{' proves' if num_seeds == 1 else 's prove'} nothing yet."
        )
    if len(deciding) == len(DECIDING) and all(claim and c["mean"] > 0 for c, claim in deciding):
        return f"Within 10 forward passes that is above search and shuffled rewards: its share less that of {measured}."
    return f"That it is above search and shuffled rewards within 10 forward passes cannot be claimed: {measured}."


def _percent(estimate: Mapping[str, Any]) -> str:
    low, high = estimate["low"], estimate["high"]
    spread = "" if low is None or high is None else f" [{100 * low:.0f}, {100 * high:.0f}]"
    return f"{100 * estimate['mean']:.0f} %{spread}"


def _mean(metrics: Mapping[str, Estimate], mark: int) -> float | None:
    estimate = metrics.get(f"repaired_{mark}")
    return None if estimate is None else estimate["mean"]


def _charts(
    arms: Mapping[str, Mapping[str, Estimate]], by_item: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    searched = {
        method: [_mean(metrics, mark) for mark in EVALUATIONS]
        for method, metrics in arms.items()
        if method != "no_edit"
    }
    methods = list(arms)
    return [
        {
            "kind": "lines",
            "title": "Training: reward of an edit",
            "unit": "nats per token",
            "columns": {f"{name}.reward": label for name, label in _TRAINING_COLUMNS.items()},
        },
        {
            "kind": "lines",
            "title": "Training: policy entropy",
            "unit": "nats",
            "columns": {f"{name}.surgeon_entropy": label for name, label in _TRAINING_COLUMNS.items()},
        },
        {
            "kind": "series",
            "title": "Share of the damage repaired, unseen students",
            "unit": "share",
            "x_label": "evaluations",
            "x": list(EVALUATIONS),
            "lines": searched,
        },
        {
            "kind": "matrix",
            "title": "Share repaired at a method's first and last evaluation, by student and damage",
            "unit": "share of the damage",
            "rows": list(by_item),
            "columns": [f"{method} {which}" for method in methods for which in ("first", "last")],
            "values": [
                [
                    None if not (marks := list(of_item.get(method, {}).values())) else marks[place]["mean"]
                    for method in methods
                    for place in (0, -1)
                ]
                for of_item in by_item.values()
            ],
            "low": 0.0,
            "high": 1.0,
        },
    ]
