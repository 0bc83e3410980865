"""``result.json``: arms × metrics with intervals, the share of the gap that is closed, and a verdict in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from preceptor.evaluation.summary import SPLITS, Comparison, Gap, compare, gap_closed, query_text, summarise
from preceptor.evaluation.verdict import verdict
from preceptor.systems.reading.evaluate import ORACLES, UNITS

TABLE = ("order_gain", "order_gain_with_queries", "selection_gain", "progress_auc", "random_percentile", "model_calls")
"""Metrics that the terminal shows; the page shows all."""

NOT_MEASURED = {"mean": None, "low": None, "high": None, "n": 0, "reason": "no such articles were given"}


def reading_result(
    records: Sequence[Mapping[str, Any]], *, config: Mapping[str, Any], seeds: Sequence[int]
) -> dict[str, Any]:
    """The result of one run, or of several over the same arms, from their records.

    Args:
        records: of every arm, article and seed (:class:`~preceptor.systems.reading.evaluate.Evaluation`).
        config: the resolved configuration.
        seeds: of the runs.
    """
    splits = [split for split in SPLITS if any(record["split"] == split for record in records)]
    comparisons: list[Comparison] = []
    gaps: dict[str, Gap] = {}
    for split in splits:
        for baseline in ("random", "untrained"):
            comparisons.append(
                compare(
                    records, metric="reward", arm="learned", baseline=baseline, unit=UNITS["order_gain"], split=split
                )
            )
        gaps[split] = gap_closed(records, metric="reward", upper=ORACLES, split=split)
    arms = _arms(records, splits)
    text = query_text(
        records,
        with_queries="order_gain_with_queries",
        without_queries="order_gain",
        arm="learned",
        baseline="untrained",
        unit=UNITS["order_gain"],
        split=splits[0],
    )
    return {
        "system": "reading",
        "status": "finished",
        "config": config,
        "seeds": list(seeds),
        "arms": arms,
        "table": list(TABLE),
        "oracles": [arm for arm in arms if arm.startswith((*ORACLES, "probe_greedy"))],
        "baseline": "random",
        "comparisons": comparisons,
        "gap_closed": {split: gaps.get(split) or NOT_MEASURED for split in SPLITS},
        "query_text": text,
        "verdict": verdict(comparisons, gaps=gaps, query_text=text, noun="article"),
        "records": list(records),
    }


def _arms(records: Sequence[Mapping[str, Any]], splits: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Every arm's metrics; those of held-out articles carry the prefix ``held_out_``."""
    arms: dict[str, dict[str, Any]] = {}
    for split in splits:
        prefix = "held_out_" if split == "held_out" else ""
        for arm, metrics in summarise(records, units=UNITS, split=split).items():
            arms.setdefault(arm, {}).update({prefix + metric: estimate for metric, estimate in metrics.items()})
    return arms
