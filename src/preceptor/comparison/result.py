"""``comparison.json``: arms with their intervals, paired differences against one arm, and a verdict in words.

Nothing in it depends on when, how often interrupted or on how busy a machine the runs were made: a sweep that was
killed and started again gives the same bytes as one that ran through. Seconds are told apart from it
(``seconds.json``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from preceptor.comparison.runs import Group, merged_records, shared_config
from preceptor.errors import ConfigError, did_you_mean
from preceptor.evaluation.aggregate import aggregate, improvement, scores_by_item
from preceptor.evaluation.summary import SPLITS, compare, summarise
from preceptor.evaluation.verdict import claims, family, verdict

COSTS = ("tokens", "model_calls", "flops", "gflops")
"""Counted costs: shown for every arm and never compared."""

Records = Sequence[Mapping[str, Any]]
MakeResult = Callable[..., dict[str, Any]]
"""A system's ``<name>_result(records, *, config, seeds)``."""


def merged_result(groups: Sequence[Group], make_result: MakeResult) -> dict[str, Any]:
    """What ``result.json`` of all runs together says, so that the page of a run shows a comparison too.

    One group is the system's own result over all records. Several give the arms of each group under names with the
    group's label, since what differs between them is more than chance.
    """
    results = [
        make_result(merged_records(group), config=shared_config(group.runs), seeds=group.seeds) for group in groups
    ]
    # A single configuration needs no labels: its result is the system's own.
    if len(groups) == 1:
        return results[0]
    labelled = list(zip(groups, results, strict=True))
    return {
        "system": groups[0].runs[0].system,
        "status": "finished",
        "config": shared_config(groups[0].runs),
        # Seeds of all groups, once each: groups may have been run with different ones.
        "seeds": sorted({seed for group in groups for seed in group.seeds}),
        # Same-named arms of two groups would be merged as if they were seeds of one; the label keeps them apart.
        "arms": {
            _labelled(arm, group.label): metrics
            for group, result in labelled
            for arm, metrics in result["arms"].items()
        },
        "table": results[0].get("table", []),
        "lower_is_better": results[0].get("lower_is_better", []),
        "oracles": [_labelled(arm, group.label) for group, result in labelled for arm in result.get("oracles", ())],
        "comparisons": results[0].get("comparisons", []),
        "records": [
            {**record, "arm": _labelled(record["arm"], group.label)}
            for group, result in labelled
            for record in _paired(result)
        ],
    }


def _paired(result: Mapping[str, Any]) -> Records:
    """The records that are compared: a system whose items are no sample of others gives them averaged."""
    paired: Records = result.get("paired_records", result["records"])
    return paired


def comparison_of(
    groups: Sequence[Group], merged: Mapping[str, Any], *, arms: Sequence[str] = (), noun: str = "", level: float = 0.95
) -> dict[str, Any]:
    """The first of ``arms`` against each of the others, on every metric that the system itself compares.

    Args:
        groups: the finished runs.
        merged: :func:`merged_result` of them.
        arms: by name; none takes those that the system compares, or with several groups its learned arm in each. Over
            several groups a name stands for that arm of every group.
        noun: what an item is called ("article").
        level: of all intervals.

    Raises:
        ConfigError: an arm that no run has, or fewer than two.
    """
    # 1. What is compared: arms, metrics, splits.
    records = _paired(merged)
    units = _units(merged)
    chosen = _chosen(groups, merged, arms)
    reference, *others = chosen
    # Each metric once, in the order in which the system names them.
    metrics = list(dict.fromkeys(comparison["metric"] for comparison in merged.get("comparisons", ())))
    if not metrics:
        raise ConfigError(f"runs of {merged['system']} compare no arms in their result; there is nothing to compare")
    splits = [split for split in SPLITS if any(record["split"] == split for record in records)]
    # 2. The first arm against each other one, paired by item.
    comparisons = []
    for split in splits:
        for metric in metrics:
            ours = scores_by_item(records, arm=reference, metric=metric, split=split)
            for other in others:
                theirs = scores_by_item(records, arm=other, metric=metric, split=split)
                # Paired differences need common items; arms that share none are left out here and reported below.
                if ours.keys() & theirs.keys():
                    comparisons.append(
                        {
                            **compare(
                                records,
                                metric=metric,
                                arm=reference,
                                baseline=other,
                                unit=units[metric],
                                split=split,
                                level=level,
                            ),
                            "improvement": improvement(ours, theirs, level=level),
                        }
                    )
    if not comparisons:
        raise ConfigError(
            f"arm {reference!r} shares no item with {', '.join(others)}; compare runs over the same inputs"
        )
    # What the system itself concludes is about its own arms, so that of several groups it says nothing.
    own = merged if len(groups) == 1 else {}
    conclusions, text = own.get("conclusions", ()), own.get("query_text")
    # Items that are no sample of the others are compared by the system itself, and claimed in the same family.
    by_item = {} if arms else own.get("comparisons_by_item", {})
    elsewhere = [comparison for of_item in by_item.values() for comparison in of_item]
    members = family(comparisons, conclusions, text)  # type: ignore[arg-type]  # each has one key more
    decided = claims([*members, *elsewhere], level=level)
    claimed, rest = decided[: len(comparisons)], iter(decided[len(members) :])
    by_item = {item: [{**c, "claimed": next(rest)} for c in of_item] for item, of_item in by_item.items()}
    said = verdict(
        comparisons,  # type: ignore[arg-type]
        conclusions=conclusions,
        query_text=text,
        gaps={split: gap for split, gap in own.get("gap_closed", {}).items() if gap["n"]},
        measured=own.get("measured", ()),
        noun=noun,
        subject=_subject(merged, reference),
        lower_is_better=merged.get("lower_is_better", ()),
        level=level,
    )
    runs = [run for group in groups for run in group.runs]
    return {
        "system": merged["system"],
        "status": "finished",
        "level": level,
        "seeds": merged["seeds"],
        "runs": [run.path.name for run in runs],
        "groups": [{"label": group.label, "runs": [run.path.name for run in group.runs]} for group in groups],
        # A set of commits: more than one says that the runs were not made by the same code.
        "code": sorted({run.code for run in runs}),
        "config": merged["config"],
        "table": list(merged.get("table", [])),
        "arms": {split: _arms(records, chosen, units, split, level) for split in splits},
        "comparisons": [{**c, "claimed": claim} for c, claim in zip(comparisons, claimed, strict=True)],
        **({"comparisons_by_item": by_item} if by_item else {}),
        "verdict": own["verdict"] if by_item else said,
    }


def _arms(
    records: Records, arms: Sequence[str], units: Mapping[str, str], split: str, level: float
) -> dict[str, dict[str, Any]]:
    """Every metric of each arm: its mean and, beside it, its interquartile mean; of a cost the mean alone."""
    chosen = [record for record in records if record["arm"] in arms]
    found: dict[str, dict[str, Any]] = {}
    for arm, metrics in summarise(chosen, units=units, split=split, level=level).items():
        found[arm] = {}
        for metric, estimate in metrics.items():
            own: dict[str, Any] = dict(estimate)
            if metric not in COSTS:
                scores = scores_by_item(records, arm=arm, metric=metric, split=split)
                own["interquartile_mean"] = aggregate(scores, level=level)
            found[arm][metric] = own
    # In the order that was asked for; `summarise` has its own.
    return {arm: found[arm] for arm in arms if arm in found}


def _chosen(groups: Sequence[Group], merged: Mapping[str, Any], arms: Sequence[str]) -> list[str]:
    present = list(dict.fromkeys(str(record["arm"]) for record in merged["records"]))
    own = list(dict.fromkeys(str(record["arm"]) for record in groups[0].records))
    if not arms:
        compared = merged.get("comparisons", ())
        arms = (
            # Within one configuration the system's own comparisons; across several, what differs is the learned arm.
            [name for c in compared for name in (c["arm"], c["baseline"])] if len(groups) == 1 else [compared[0]["arm"]]
        )
    names: list[str] = []
    for arm in arms:
        if arm not in [*present, *own]:
            raise ConfigError(f"no run has an arm {arm!r}{did_you_mean(arm, own) or '; there are ' + ', '.join(own)}")
        # A name without a label stands for that arm of every group.
        names += [arm] if arm in present else [name for name in present if name in _names(arm, groups)]
    names = list(dict.fromkeys(names))
    if len(names) < 2:
        raise ConfigError(f"a comparison needs at least two arms, got {', '.join(names)}; give --arms A,B")
    return names


def _subject(merged: Mapping[str, Any], reference: str) -> str:
    """What the system calls its own arm in words; another arm, or that of one group among several, has its name."""
    own = merged["comparisons"][0]["arm"]
    return str(merged.get("subject", "")) if reference == own else reference.replace("_", " ")


def _names(arm: str, groups: Sequence[Group]) -> set[str]:
    return {_labelled(arm, group.label) for group in groups}


def _labelled(arm: str, label: str) -> str:
    return f"{arm} ({label})" if label else arm


def _units(merged: Mapping[str, Any]) -> dict[str, str]:
    """The unit of every metric; held-out ones carry a prefix among the arms of a result, and none in the records."""
    return {
        metric.removeprefix("held_out_"): estimate["unit"]
        for metrics in merged["arms"].values()
        for metric, estimate in metrics.items()
    }
