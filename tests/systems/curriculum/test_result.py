"""Records of made-up curves, worked by hand, and what the result makes of them."""

from __future__ import annotations

from typing import Any

import pytest

from preceptor.systems.curriculum.result import (
    MACRO,
    UNITS,
    Outcome,
    charts,
    macro_mean,
    outcome_records,
    result,
    units_of,
)

TARGETS = {"a": True, "b": True, "noise": False}


def outcome(*points: tuple[int, float, float], rewards: list[dict[str, float]] | None = None) -> Outcome:
    """Losses of a and b at each step; that of noise is 9."""
    return Outcome(
        curve=[(step, {"a": a, "b": b, "noise": 9.0}) for step, a, b in points],
        rewards=rewards or [],
        mixtures=[[0.2, 0.3, 0.5], [0.4, 0.3, 0.3]],
        counts={"tokens": 100, "rollout_tokens": 0, "model_calls": 7, "forward_passes": 21},
    )


OUTCOMES = {
    "learning_progress": outcome((0, 4.0, 6.0), (10, 3.0, 3.0), (20, 1.0, 2.0)),
    "uniform": outcome((0, 4.0, 6.0), (10, 3.0, 4.0), (20, 2.0, 3.0)),
    "static_no_noise": outcome((0, 4.0, 6.0), (10, 3.0, 4.0), (20, 1.0, 1.0)),
}


def macro(method: str, *, seed: int = 0) -> dict[str, Any]:
    records = outcome_records(OUTCOMES, targets=TARGETS, seed=seed)
    return next(record for record in records if record["arm"] == method and record["item"] == MACRO)


def test_the_macro_mean_leaves_out_what_is_no_target() -> None:
    assert macro_mean({"a": 2.0, "b": 3.0, "noise": 9.0}, TARGETS) == 2.5
    assert macro("uniform")["macro_loss"] == 2.5
    assert macro("uniform")["loss_fall"] == 2.5  # from 5
    assert macro("uniform")["worst_loss"] == 3.0


def test_the_area_is_the_mean_on_the_way() -> None:
    assert macro("learning_progress")["loss_auc"] == pytest.approx(((5 + 3) / 2 + (3 + 1.5) / 2) / 2)


def test_steps_until_uniforms_last_loss() -> None:
    # 2.5 lies a third of the way from 3 at step 10 to 1.5 at step 20.
    assert macro("learning_progress")["steps_to_uniform"] == pytest.approx(10 + 10 / 3)
    assert macro("learning_progress")["reached_uniform"] == 1.0
    slow = OUTCOMES | {"learning_progress": outcome((0, 4.0, 6.0), (20, 3.0, 3.0))}
    record = outcome_records(slow, targets=TARGETS, seed=0)[0]
    assert (record["steps_to_uniform"], record["reached_uniform"]) == (20.0, 0.0)


def test_every_dataset_has_a_record_noise_too() -> None:
    records = outcome_records(OUTCOMES, targets=TARGETS, seed=3)
    assert len(records) == 3 * (1 + 3)
    assert {"arm": "uniform", "split": "held_out", "seed": 3, "item": "noise", "dataset_loss": 9.0} in records


def test_rewards_after_and_their_gain() -> None:
    rows = [
        {"step": 0, "reward": -1.0, "kl": 0.0, "repetition": -0.5},
        {"step": 9, "reward": 1.0, "kl": 0.1, "repetition": -0.1},
    ]
    record = outcome_records({"x": outcome((0, 1, 1), (9, 1, 1), rewards=rows)}, targets=TARGETS, seed=0)[0]
    assert (record["reward"], record["reward_gain"]) == (1.0, 2.0)
    assert (record["repetition"], record["repetition_gain"]) == (-0.1, pytest.approx(0.4))
    assert record["kl"] == 0.1
    assert units_of([record])["repetition_gain"] == "reward"
    assert units_of([record])["kl"] == UNITS["kl"]


def test_the_share_of_the_gap() -> None:
    # Falls: uniform 2.5, the rule 3.5, the best static mixture 4: two thirds of the gap.
    records = [r for seed in range(5) for r in outcome_records(OUTCOMES, targets=TARGETS, seed=seed)]
    found = result(records, config={}, seeds=list(range(5)))
    gap = found["static_gap_closed"]["learning_progress"]
    assert gap["mean"] == pytest.approx(2 / 3)
    assert "learning progress 67 % (67 to 67)" in found["verdict"]
    assert "learning progress +1 (+1 to +1)" in found["verdict"]
    assert found["arms"]["uniform"]["tokens"]["mean"] == 100
    compared = {(c["arm"], c["baseline"], c["metric"]): c["mean"] for c in found["comparisons"]}
    assert compared["learning_progress", "uniform", "loss_fall"] == pytest.approx(1.0)
    assert compared["static_no_noise", "uniform", "loss_fall"] == pytest.approx(1.5)


def test_one_seed_claims_nothing() -> None:
    found = result(outcome_records(OUTCOMES, targets=TARGETS, seed=0), config={}, seeds=[0])
    assert found["verdict"].startswith(
        "Learning progress beats uniform by 1 nats per token; one seed proves nothing yet. "
    )
    assert " With 1 seed no difference can be claimed" in found["verdict"]


def test_no_gap_to_close_is_said() -> None:
    without = {name: OUTCOMES[name] for name in ("learning_progress", "uniform")}
    found = result(outcome_records(without, targets=TARGETS, seed=0), config={}, seeds=[0])
    assert found["static_gap_closed"]["learning_progress"]["mean"] is None
    assert found["static_gap_closed"]["learning_progress"]["reason"] == "no static mixture but uniform was run"
    assert "the best static mixture" not in found["verdict"]  # it would speak of an oracle that never ran
    worse = without | {"static_a": outcome((0, 4.0, 6.0), (20, 3.0, 4.0))}
    found = result(outcome_records(worse, targets=TARGETS, seed=0), config={}, seeds=[0])
    assert "learning progress is undefined (the oracle is not above uniform" in found["verdict"]


def test_the_policy_gradient_is_measured_against_the_frozen_policy_and_against_none() -> None:
    before, after = {"step": 0, "reward": -1.0, "kl": 0.0}, {"step": 20, "reward": 1.0, "kl": 0.1}
    outcomes = {
        "uniform+ppo": outcome((0, 4, 6), (20, 3, 3), rewards=[before, after]),
        "frozen_policy": outcome((0, 4, 6), (20, 4, 6), rewards=[before, before]),
        "uniform": OUTCOMES["uniform"],
    }
    found = result(outcome_records(outcomes, targets=TARGETS, seed=0), config={}, seeds=[0])
    compared = {(c["arm"], c["baseline"], c["metric"]): c["mean"] for c in found["comparisons"]}
    assert compared["uniform+ppo", "frozen_policy", "reward"] == 2.0
    assert compared["uniform+ppo", "uniform", "loss_fall"] == -0.5
    assert "uniform+ppo in reward +2" in found["verdict"]


def test_charts_hold_what_was_outcome() -> None:
    drawn = charts(OUTCOMES, TARGETS, mixed=list(TARGETS))
    assert [chart["kind"] for chart in drawn] == ["series", "matrix", "series", "series", "series"]
    assert drawn[0]["lines"]["uniform"] == [5.0, 3.5, 2.5]
    assert drawn[1]["values"][0] == [1.0, 2.0, 9.0]
    assert drawn[2]["lines"]["noise"] == [0.5, 0.3]
    for chart in drawn:
        for values in chart.get("lines", {}).values():
            assert len(values) == len(chart["x"])
