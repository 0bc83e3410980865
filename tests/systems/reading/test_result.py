"""``result.json`` from hand-made records, with the arithmetic shown."""

from __future__ import annotations

import json
from typing import Any

import pytest

from preceptor.systems.reading.result import reading_result


def record(
    arm: str, reward: float, *, article: str = "a", split: str = "train", seed: int = 0, **more: float
) -> dict[str, Any]:
    return {
        "arm": arm, "item": article, "split": split, "seed": seed, "reward": reward,
        "order_gain": reward + 5.0, "order_gain_with_queries": reward + 5.1, "model_calls": 0.0, **more,
    }  # fmt: skip


RECORDS = [
    record("random", -5.0, order_gain_with_queries=0.0),
    record("untrained", -4.9),
    record("learned", -4.4, model_calls=80.0),
    record("beam", -4.0),
    record("local_search", -3.8),
    record("random", -6.0, article="b", order_gain_with_queries=0.0),
    record("untrained", -6.0, article="b"),
    record("learned", -5.8, article="b", model_calls=80.0),
    record("beam", -5.2, article="b"),
    record("local_search", -5.2, article="b"),
]
HELD_OUT = [
    record("random", -7.0, article="c", split="held_out", order_gain_with_queries=0.0),
    record("untrained", -7.0, article="c", split="held_out"),
    record("learned", -6.9, article="c", split="held_out"),
    record("beam", -6.0, article="c", split="held_out"),
]


def test_the_gap_is_a_ratio_of_sums_to_the_best_oracle() -> None:
    result = reading_result([*RECORDS, *HELD_OUT], config={}, seeds=[0])
    # (0.6 + 0.2) / (1.2 + 0.8)
    gap = result["gap_closed"]["train"]
    assert gap["mean"] == pytest.approx(0.4)
    assert "lower bound" in gap["oracle"]
    assert result["gap_closed"]["held_out"]["mean"] == pytest.approx(0.1)


def test_an_exhaustive_optimum_is_called_one() -> None:
    records = [*RECORDS[:5], record("exhaustive", -3.5)]
    gap = reading_result(records, config={}, seeds=[0])["gap_closed"]["train"]
    assert gap["mean"] == pytest.approx(0.6 / 1.5)
    assert "optimum" in gap["oracle"]
    assert "bound" not in gap["oracle"]


def test_arms_have_means_units_and_counts_and_held_out_metrics_a_prefix() -> None:
    result = reading_result([*RECORDS, *HELD_OUT], config={"seed": 0}, seeds=[0])
    learned = result["arms"]["learned"]
    assert learned["reward"]["mean"] == pytest.approx((-4.4 - 5.8) / 2)
    assert (learned["reward"]["n"], learned["reward"]["unit"]) == (2, "nats/value token")
    assert learned["held_out_reward"]["mean"] == pytest.approx(-6.9)
    assert learned["held_out_reward"]["n"] == 1
    assert learned["model_calls"]["mean"] == 80.0
    assert "held_out_reward" not in result["arms"]["local_search"]
    assert (result["system"], result["status"], result["config"], result["seeds"]) == (
        "reading", "finished", {"seed": 0}, [0],
    )  # fmt: skip


def test_comparisons_and_query_text() -> None:
    result = reading_result([*RECORDS, *HELD_OUT], config={}, seeds=[0])
    means = {(c["split"], c["baseline"]): c["mean"] for c in result["comparisons"] if c["metric"] == "reward"}
    assert means["train", "random"] == pytest.approx(0.4)
    assert means["train", "untrained"] == pytest.approx((0.5 + 0.2) / 2)
    assert means["held_out", "random"] == pytest.approx(0.1)
    # learned − untrained is the same with and without queries, so none of it is query text
    assert result["query_text"]["query_text"]["mean"] == pytest.approx(0.0, abs=1e-9)
    assert result["query_text"]["with_queries"]["mean"] == pytest.approx(0.35)


def test_without_held_out_articles_the_result_says_so() -> None:
    result = reading_result(RECORDS, config={}, seeds=[0])
    assert result["gap_closed"]["held_out"]["mean"] is None
    assert "no such articles" in result["gap_closed"]["held_out"]["reason"]
    assert "no difference can be claimed" in result["verdict"]  # one seed is not enough
    json.dumps(result, allow_nan=False)
