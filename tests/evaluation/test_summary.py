from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from preceptor.errors import DataError
from preceptor.evaluation.intervals import paired_bootstrap
from preceptor.evaluation.summary import compare, gap_closed, percentile_among, query_text, summarise

UNITS = {"order_gain": "nats per value token", "model_calls": "calls"}


def record(arm: str, item: str, seed: int | None, split: str = "train", **metrics: Any) -> dict[str, Any]:
    return {"arm": arm, "item": item, "split": split, "seed": seed, **metrics}


def grid(arm: str, values: dict[tuple[int | None, str], float], metric: str = "order_gain") -> list[dict[str, Any]]:
    return [record(arm, item, seed, **{metric: value}) for (seed, item), value in values.items()]


def test_summarise_by_hand() -> None:
    records = [
        record("learned", "a", 0, order_gain=0.2, model_calls=10),
        record("learned", "a", 1, order_gain=0.4, model_calls=20),
        record("random", "a", 0, order_gain=0.0),
        record("learned", "b", 0, "held_out", order_gain=9.0),
    ]
    summary = summarise(records, units=UNITS)
    assert list(summary) == ["learned", "random"]
    assert list(summary["learned"]) == ["order_gain", "model_calls"]
    assert summary["learned"]["order_gain"] == pytest.approx(
        {"mean": 0.3, "low": 0.2, "high": 0.4, "unit": "nats per value token", "n": 2}
    )
    assert summary["random"] == {
        "order_gain": {"mean": 0.0, "low": None, "high": None, "unit": "nats per value token", "n": 1}
    }
    assert summarise(records, units=UNITS, split="held_out")["learned"]["order_gain"]["mean"] == 9.0


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"arm": "x", "item": "a", "seed": 0, "order_gain": 1.0}, "lacks split"),
        (record("x", "a", 0, "test", order_gain=1.0), "allowed: train, held_out"),
        (record("x", "a", 0, order_gain=math.nan), "must be a finite number, got nan"),
        (record("x", "a", 0, order_gain=None), "must be a finite number, got None"),
        (record("x", "a", 0, order_gian=1.0), "did you mean 'order_gain'"),
        (record("learned", "a", 0, order_gain=1.0), "measured once"),
    ],
)
def test_malformed_records_are_refused(broken: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        summarise([record("learned", "a", 0, order_gain=0.0), broken], units=UNITS)


def test_compare_pairs_cells_and_leaves_out_what_only_one_arm_has() -> None:
    learned = {(s, a): 0.1 * s + (1.0 if a == "a" else 5.0) for s in range(5) for a in "ab"}
    random = {cell: value - 0.3 for cell, value in learned.items()} | {(9, "a"): 100.0}
    result = compare(
        grid("learned", learned) + grid("random", random),
        metric="order_gain",
        arm="learned",
        baseline="random",
        unit="nats",
    )
    # The item's level (1 against 5) cancels in every pair.
    assert (result["mean"], result["low"], result["high"]) == pytest.approx((0.3, 0.3, 0.3))
    assert (result["n"], result["num_seeds"], result["num_items"]) == (10, 5, 2)
    assert result["share_improved"] == 1.0


def test_a_record_without_seed_pairs_with_every_seed() -> None:
    learned = {(s, a): float(s) for s in range(3) for a in "ab"}
    document: dict[tuple[int | None, str], float] = {(None, "a"): 1.0, (None, "b"): 0.0}
    records = grid("learned", learned) + grid("document", document)
    result = compare(records, metric="order_gain", arm="learned", baseline="document", unit="nats")
    assert result["mean"] == pytest.approx(((-1 + 0 + 1) + (0 + 1 + 2)) / 6)
    assert (result["n"], result["num_seeds"]) == (6, 3)
    both = compare(
        records + grid("reverse", document), metric="order_gain", arm="document", baseline="reverse", unit="nats"
    )
    assert (both["mean"], both["n"], both["num_seeds"]) == (0.0, 2, 1)


def test_arms_without_a_common_cell_are_refused() -> None:
    records = grid("learned", {(0, "a"): 1.0}) + grid("random", {(1, "a"): 1.0})
    with pytest.raises(DataError, match="share no"):
        compare(records, metric="order_gain", arm="learned", baseline="random", unit="nats")


def gap_records(oracle: str = "exhaustive") -> list[dict[str, Any]]:
    """Two items with gaps 1 and 0.001, of which 0.8 and -0.05 are gained: 0.75 / 1.001 of the gap by sums."""
    return (
        grid("random", {(0, "a"): -6.0, (0, "b"): -3.0})
        + grid("learned", {(0, "a"): -5.2, (0, "b"): -3.05})
        + grid(oracle, {(None, "a"): -5.0, (None, "b"): -2.999})
    )


def test_gap_closed_is_a_ratio_of_sums() -> None:
    result = gap_closed(gap_records(), metric="order_gain")
    assert result["mean"] == pytest.approx(0.75 / 1.001)
    mean_of_ratios = (0.8 / 1.0 - 0.05 / 0.001) / 2
    assert mean_of_ratios < -20  # what one flat item would have done to the headline
    assert (result["oracle"], result["reason"], result["n"]) == ("exhaustive optimum", None, 2)


def test_an_oracle_that_is_not_the_optimum_is_called_a_lower_bound() -> None:
    records = gap_records("greedy") + grid("beam", {(None, "a"): -4.0, (None, "b"): -9.0})
    result = gap_closed(records, metric="order_gain")
    assert result["mean"] == pytest.approx(0.75 / 2.001)  # the better oracle of each item: beam on a, greedy on b
    assert result["oracle"] == "best of beam, greedy: a lower bound of the optimum"
    partly = gap_closed(records + grid("exhaustive", {(None, "a"): -4.0}), metric="order_gain")
    assert partly["oracle"].endswith("a lower bound of the optimum")


def test_a_gap_that_is_no_gap_is_null_with_its_reason() -> None:
    records = grid("random", {(0, "a"): 1.0}) + grid("learned", {(0, "a"): 2.0}) + grid("exhaustive", {(0, "a"): 1.0})
    result = gap_closed(records, metric="order_gain")
    assert result["mean"] is None
    assert result["low"] is None
    assert result["reason"] == "the oracle is not above random (0 on average): no gap to close"


def test_a_gap_whose_sign_is_uncertain_has_no_interval() -> None:
    cells = {(s, "a"): v for s, v in enumerate([2.0, -1.5, 1.0, -1.0, 0.5, -0.8])}
    records = (
        grid("random", dict.fromkeys(cells, 0.0))
        + grid("learned", {c: 0.5 * v for c, v in cells.items()})
        + grid("beam", cells)
    )
    result = gap_closed(records, metric="order_gain")
    assert result["mean"] == pytest.approx(0.5)
    assert result["low"] is None
    assert result["reason"] is not None
    assert "vanishes in" in result["reason"]


def test_one_cell_has_a_share_but_no_interval() -> None:
    records = [r for r in gap_records() if r["item"] == "a"]
    result = gap_closed(records, metric="order_gain")
    assert result["mean"] == pytest.approx(0.8)
    assert (result["low"], result["high"]) == (None, None)
    assert result["reason"] == "one seed on one item has no interval"


def test_the_gap_interval_of_equal_gaps_is_that_of_the_mean() -> None:
    """Where every cell has a gap of 2, the ratio is half the mean gain, and so is its interval."""
    generator = np.random.default_rng(0)
    gains = {(s, a): float(generator.normal(1.0, 0.4)) for s in range(6) for a in "abcde"}
    records = (
        grid("random", dict.fromkeys(gains, -1.0))
        + grid("learned", {c: v - 1.0 for c, v in gains.items()})
        + grid("exhaustive", dict.fromkeys(gains, 1.0))
    )
    result = gap_closed(records, metric="order_gain")
    low, high = paired_bootstrap(gains)
    assert (result["low"], result["high"]) == pytest.approx((low / 2, high / 2))  # type: ignore[operator]


def test_a_gap_without_an_oracle_is_refused() -> None:
    with pytest.raises(DataError, match="a gap needs an oracle"):
        gap_closed(gap_records("nobody"), metric="order_gain")


def test_query_text_is_what_the_gain_loses_without_the_queries() -> None:
    records = [
        record(
            arm, a, s, reward=(0.5 if arm == "learned" else 0.0) + 0.01 * s, bare=0.1 * s if arm == "learned" else 0.0
        )
        for arm in ("learned", "untrained")
        for s in range(3)
        for a in "ab"
    ]
    split = query_text(
        records, with_queries="reward", without_queries="bare", arm="learned", baseline="untrained", unit="nats"
    )
    assert split["with_queries"]["mean"] == pytest.approx(0.5)
    assert split["without_queries"]["mean"] == pytest.approx(0.1)
    assert split["query_text"]["mean"] == pytest.approx(0.4)


def test_percentile_among() -> None:
    assert percentile_among(5.0, [1.0, 2.0]) == 100.0
    assert percentile_among(0.0, [1.0, 2.0]) == 0.0
    assert percentile_among(1.0, [1.0, 1.0]) == 50.0
    with pytest.raises(DataError):
        percentile_among(0.0, [])
