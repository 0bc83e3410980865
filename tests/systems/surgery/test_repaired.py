"""What the verdict of an amortised surgeon claims: of students of trained sizes and of others, as one family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from preceptor.comparison.result import comparison_of, merged_result
from preceptor.comparison.runs import FinishedRun, Group
from preceptor.systems.surgery.repaired import BUDGET, DECIDING, RIVALS, result

CONFIG = {"amortised": {"sizes": ["2x4x64"], "damages": ["head_scale"]}}
TRAINED_SIZE, STARTER = "unseen_0_2x4x64/head_scale", "starter/head_scale"
MARKS = {"amortised": (1, 3), "shuffled": (1, 3), "gradient": (1, 3), "norms": (1,)}


def records(num_seeds: int, gains: dict[str, float], generator: np.random.Generator) -> list[dict[str, Any]]:
    """Shares repaired by every method: noise, and what the surgeon has above it on each student."""
    return [
        {"arm": arm, "item": item, "split": "held_out", "seed": seed, "damage": 0.3}
        | {
            f"repaired_{mark}": 0.5 + 0.1 * generator.normal() + (gain if arm == "amortised" else 0.0)
            for mark in MARKS.get(arm, (1, 3, 10))
        }
        for seed in range(num_seeds)
        for item, gain in gains.items()
        for arm in ("amortised", *RIVALS)
    ]


def said(num_seeds: int, gains: dict[str, float], *, seed: int = 0) -> dict[str, Any]:
    made = records(num_seeds, gains, np.random.default_rng(seed))
    return result(made, config=CONFIG, seeds=list(range(num_seeds)))


def test_each_student_has_its_own_claim() -> None:
    found = said(10, {TRAINED_SIZE: 0.4, STARTER: 0.0})
    of_trained, of_starter = found["verdict"].split("On starter it is ")
    assert "that is above search and shuffled rewards" in of_trained
    assert "cannot be claimed" in of_starter
    assert found["repair"]["amortised"]["1"]["mean"] == pytest.approx(0.9, abs=0.1)
    assert [c["baseline"] for c in found["comparisons_by_item"][STARTER]] == list(RIVALS)
    # Within 10 forward passes: three edits, ten evaluations.
    edits = [r for r in found["records"] if r["arm"] == "amortised" and r["item"] == STARTER]
    assert all(r[BUDGET] == r["repaired_3"] for r in edits)


def test_kinds_of_damage_are_named_where_a_student_has_several() -> None:
    gains = {TRAINED_SIZE: 0.4, STARTER: 0.0, "starter/round_2": 0.0}
    made = records(5, gains, np.random.default_rng(0))
    config = {"amortised": {"sizes": ["2x4x64"], "damages": ["head_scale", "round_2"]}}
    verdict = result(made, config=config, seeds=list(range(5)))["verdict"]
    assert "On starter under head_scale it is " in verdict
    assert "On starter under round_2 it is " in verdict


def test_a_sweep_compares_students_of_a_kind_and_says_of_each_other_one_what_may_be_claimed() -> None:
    """Pooled with a damage that nothing repairs, seeds would differ by the item and not by the method."""
    made = records(10, {TRAINED_SIZE: 0.4, STARTER: 0.4}, np.random.default_rng(0))
    hopeless = [
        {**record, "item": "unseen_0_2x4x64/wiped_head", "repaired_3": -9.0 * record["seed"]}
        for record in made
        if record["item"] == TRAINED_SIZE
    ]
    runs = [
        FinishedRun(
            *(Path(f"seed{seed}"), "surgery", CONFIG, seed, "c0ffee", {}),
            [record for record in (*made, *hopeless) if record["seed"] == seed],
            1.0,
        )
        for seed in range(10)
    ]
    group = Group("", runs)
    compared = comparison_of([group], merged_result([group], result))
    assert compared["verdict"].count("that is above search and shuffled rewards") == 2
    assert compared["verdict"] == merged_result([group], result)["verdict"]
    assert [comparison["claimed"] for comparison in compared["comparisons"]] == [True] * len(RIVALS)
    assert list(compared["comparisons_by_item"]) == [STARTER]
    assert [comparison["claimed"] for comparison in compared["comparisons_by_item"][STARTER]] == [True] * len(RIVALS)


def test_other_students_make_the_family_larger() -> None:
    """What one student's comparisons may claim, two students' may not, though nothing is true of one."""
    gains = {TRAINED_SIZE: 0.12}
    alone, beside = [], []
    for seed in (6, 12, 19):  # draws whose p-values lie near the edge
        made = records(6, {**gains, STARTER: 0.0}, np.random.default_rng(seed))
        for found, kept in ((alone, [r for r in made if r["item"] == TRAINED_SIZE]), (beside, made)):
            runs = [
                FinishedRun(
                    *(Path(f"seed{run}"), "surgery", CONFIG, run, "c0ffee", {}),
                    [record for record in kept if record["seed"] == run],
                    1.0,
                )
                for run in range(6)
            ]
            group = Group("", runs)
            compared = comparison_of([group], merged_result([group], result))
            found.append(sum(comparison["claimed"] for comparison in compared["comparisons"]))
    assert all(few < many for few, many in zip(beside, alone, strict=True))


def test_few_seeds_prove_nothing() -> None:
    assert "1 seed proves nothing yet" in said(1, {TRAINED_SIZE: 0.4})["verdict"]
    assert "4 seeds prove nothing yet" in said(4, {TRAINED_SIZE: 0.4})["verdict"]


def test_nothing_is_claimed_by_chance() -> None:
    """Five seeds without a difference: at most one of twelve texts claims something."""
    texts = [said(5, {TRAINED_SIZE: 0.0, STARTER: 0.0}, seed=seed)["verdict"] for seed in range(12)]
    assert sum("that is above" in text for text in texts) <= 1
    assert len(DECIDING) == 3
