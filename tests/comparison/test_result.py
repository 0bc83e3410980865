"""Comparisons of several arms, seeds and splits, from made records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from preceptor.comparison import write
from preceptor.comparison.result import comparison_of, merged_result
from preceptor.comparison.runs import FinishedRun, Group, merged_records
from preceptor.comparison.table import comparison_tables
from preceptor.evaluation.summary import compare, summarise
from preceptor.evaluation.verdict import claimable, claims

ARMS = {"learned": 0.55, "random": 0.0, "untrained": 0.2, "document": 0.5}
SPLITS = ("train", "held_out")


def group(num_seeds: int = 5) -> Group:
    """One run for each seed, each with four arms on two splits; one arm is the same under every seed."""
    generator = np.random.default_rng(1)
    runs = []
    for seed in range(num_seeds):
        records = [
            {
                "arm": arm, "item": "bees", "split": split, "seed": None if arm == "document" else seed,
                "score": level + (split == "held_out") + (arm != "document") * float(generator.normal(scale=0.2)),
            }
            for arm, level in ARMS.items() for split in SPLITS
        ]  # fmt: skip
        runs.append(FinishedRun(Path(f"seed{seed}"), "toy", {"steps": 3}, seed, "c0ffee", {}, records, 1.0))
    return Group("", runs)


def toy_result(records: Any, *, config: Any, seeds: Any) -> dict[str, Any]:
    comparisons = [
        compare(records, metric="score", arm="learned", baseline=baseline, unit="points")
        for baseline in ARMS
        if baseline != "learned"
    ]
    arms: dict[str, dict[str, Any]] = {}
    for split in SPLITS:
        for arm, metrics in summarise(records, units={"score": "points"}, split=split).items():
            arms.setdefault(arm, {}).update(
                {("" if split == "train" else "held_out_") + k: v for k, v in metrics.items()}
            )
    return {
        "system": "toy", "config": config, "seeds": list(seeds), "arms": arms, "comparisons": comparisons,
        "records": list(records),
    }  # fmt: skip


def test_records_of_both_splits_are_kept_and_what_every_seed_shares_is_taken_once() -> None:
    """To catch: a cell without its split, which would drop the second one."""
    merged = merged_records(group())
    assert len(merged) == 3 * 2 * 5 + 2
    cells = [(r["arm"], r["split"], r["seed"]) for r in merged]
    assert len(set(cells)) == len(cells)
    assert {(r["split"], r["score"]) for r in merged if r["arm"] == "document"} == {("train", 0.5), ("held_out", 1.5)}


def test_all_arms_on_all_splits_are_claimed_as_one_family() -> None:
    """To catch: each difference claimed as if it were alone."""
    groups = [group()]
    comparison = comparison_of(groups, merged_result(groups, toy_result))
    rows = comparison["comparisons"]
    assert [(row["baseline"], row["split"]) for row in rows] == [
        (baseline, split) for split in SPLITS for baseline in ("random", "untrained", "document")
    ]
    claimed = [row["claimed"] for row in rows]
    assert claimed == claims(rows)
    alone = [claimable(row) for row in rows]
    assert sum(claimed) < sum(alone), "the records are such that the family makes a difference"
    assert any(claimed)
    for row in rows:
        says = f"learned is {row['mean']:.3g} points above {row['baseline']} in score"
        assert (says in comparison["verdict"]) == row["claimed"]


def test_each_split_has_its_own_figures() -> None:
    groups = [group()]
    comparison = comparison_of(groups, merged_result(groups, toy_result))
    for split, shift in (("train", 0.0), ("held_out", 1.0)):
        arms = comparison["arms"][split]
        assert list(arms) == list(ARMS)
        assert arms["document"]["score"]["mean"] == pytest.approx(0.5 + shift)
        assert arms["learned"]["score"]["mean"] == pytest.approx(0.55 + shift, abs=0.3)
        assert arms["learned"]["score"]["n"] == 5


def test_chosen_arms_are_compared_with_the_first() -> None:
    groups = [group()]
    merged = merged_result(groups, toy_result)
    comparison = comparison_of(groups, merged, arms=["untrained", "random", "document"])
    assert [(row["arm"], row["baseline"]) for row in comparison["comparisons"]] == [
        ("untrained", "random"), ("untrained", "document"),
    ] * 2  # fmt: skip
    assert comparison["verdict"].startswith(("Untrained ", "Over 5 seeds untrained "))


def test_what_the_system_concludes_is_said_of_one_group_and_not_of_several() -> None:
    groups = [group()]

    def concluding(records: Any, **options: Any) -> dict[str, Any]:
        found = toy_result(records, **options)
        large = {**found["comparisons"][0], "mean": 0.5, "p_value": 1e-6, "metric": "another"}
        says = {"comparisons": [large], "claimed": "It holds.", "otherwise": "It is open."}
        return {**found, "conclusions": [says], "measured": ["That was measured."]}

    said = comparison_of(groups, merged_result(groups, concluding))["verdict"]
    assert said.endswith("That was measured. It holds.")
    several = [groups[0]._replace(label=label) for label in ("steps=3", "steps=4")]
    said = comparison_of(several, merged_result(several, concluding))["verdict"]
    assert "It holds." not in said
    assert "That was measured." not in said


def test_charts_of_one_group_are_drawn_over_its_seeds_and_inputs() -> None:
    """To catch: keys in which runs agree taken for those in which they differ."""
    runs = [
        run._replace(config={"seed": run.seed, "steps": steps, "input": name})
        for run, steps, name in zip(group().runs, (3, 3, 4, 4, 4), "abcab", strict=True)
    ]
    labelled = {"groups": [{"label": "steps=3"}, {"label": "steps=4"}]}
    assert write._inputs(labelled, runs) == ["seed", "input"]
    assert write._inputs({"groups": [{"label": ""}]}, runs[:2]) == ["seed", "input"]


def test_tables_name_the_split_and_hold_intervals_where_there_are_some() -> None:
    def estimate(mean: float, low: float | None, high: float | None) -> dict[str, Any]:
        return {"mean": mean, "interquartile_mean": {"iqm": mean, "low": low, "high": high}}

    row = {"metric": "score", "unit": "points", "arm": "learned", "baseline": "random", "claimed": True}
    rows = [
        {**row, "split": "train", "mean": 0.5, "low": 0.25, "high": 0.75,
         "improvement": {"probability": 0.9, "low": 0.8, "high": 1.0}},
        {**row, "split": "held_out", "mean": 0.5, "low": None, "high": None,
         "improvement": {"probability": 0.9, "low": None, "high": None}},
    ]  # fmt: skip
    arms = {
        split: {arm: {"score": estimate(1.0, low, high)} for arm in ("learned", "random")}
        for split, low, high in (("train", 0.9, 1.1), ("held_out", None, None))
    }
    first, second = comparison_tables({"comparisons": rows, "arms": arms})
    assert (first.title, second.title) == ("score, points", "score, held out, points")
    shown = [[str(cell) for column in table.columns for cell in column.cells] for table in (first, second)]
    assert {"0.500\n[0.250, 0.750]", "0.90\n[0.80, 1.00]", "1.000\n[0.900, 1.100]"} <= set(shown[0])
    assert {"0.500", "0.90", "1.000"} <= set(shown[1])
    assert not any("[" in cell for cell in shown[1])
