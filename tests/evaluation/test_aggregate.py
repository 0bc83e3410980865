from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from scipy import stats

from preceptor.errors import DataError
from preceptor.evaluation.aggregate import aggregate, improvement, scores_by_item, stratified_resamples
from preceptor.evaluation.intervals import crossed_p_value, expanded_tail, interquartile_mean
from preceptor.evaluation.summary import Comparison, compare
from preceptor.evaluation.verdict import claims, verdict

NUM_SEEDS, ITEMS = 10, ("a", "b", "c")
OURS = {item: list(np.random.default_rng(k).normal(0.3 * k, 1.0, NUM_SEEDS)) for k, item in enumerate(ITEMS, start=1)}
THEIRS = {item: list(np.random.default_rng(k).normal(0.0, 1.0, NUM_SEEDS)) for k, item in enumerate(ITEMS, start=7)}


def matrix(scores: dict[str, list[float]]) -> np.ndarray[Any, Any]:
    """rliable's form: runs by tasks."""
    return np.array([scores[item] for item in ITEMS]).T


def slow_improvement(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> float:
    total = 0.0
    for item in ITEMS:
        total += stats.mannwhitneyu(ours[item], theirs[item]).statistic / (len(ours[item]) * len(theirs[item]))
    return total / len(ITEMS)


def test_point_values_are_scipys() -> None:
    expected = stats.trim_mean(matrix(OURS).flatten(), 0.25)  # within 1e-12: float64 sums of 30 numbers about 1
    assert aggregate(OURS)["iqm"] == pytest.approx(expected, abs=1e-12)
    assert improvement(OURS, THEIRS)["probability"] == pytest.approx(slow_improvement(OURS, THEIRS), abs=1e-12)


def test_the_resamples_are_stratified_and_their_quantiles_a_slow_references() -> None:
    """Each item's seeds are drawn from that item alone; the ends agree with a plain loop over resamples."""
    strata = [np.asarray(OURS[item]) for item in ITEMS]
    resampled = stratified_resamples(strata, num_resamples=4_000, seed=1)
    for k, stratum in enumerate(strata):
        assert np.isin(resampled[:, k * NUM_SEEDS : (k + 1) * NUM_SEEDS], stratum).all()
    generator = np.random.default_rng(2)
    slow = [stats.trim_mean(np.concatenate([generator.choice(s, len(s)) for s in strata]), 0.25) for _ in range(4_000)]
    tail = expanded_tail(0.95, NUM_SEEDS - 1)
    got = aggregate(OURS, num_resamples=4_000)
    # Two Monte Carlo quantiles near 1 % of 4,000 draws of a statistic with standard deviation 0.2.
    assert (got["low"], got["high"]) == pytest.approx(tuple(np.quantile(slow, [tail, 1 - tail])), abs=0.06)


SIX_RUNS = {
    "a": [0.91, 0.63, 0.47, 0.88, 0.30, 0.76],
    "b": [2.14, 2.80, 2.39, 2.05, 2.97, 2.44],
    "c": [5.55, 5.22, 5.71, 5.60, 5.12, 5.83],
}
FIVE_RUNS = {
    "a": [0.41, 0.66, 0.47, 0.08, 0.20],
    "b": [2.24, 2.10, 2.59, 2.35, 2.67],
    "c": [5.35, 5.52, 5.11, 5.90, 5.42],
}


def test_point_values_are_rliables() -> None:
    """What rliable 1.2.0 gives for ``aggregate_iqm`` and ``probability_of_improvement``, a tie among them; in float64,
    so 1e-12 leaves room for the order of its sums and nothing else.
    """
    assert aggregate(SIX_RUNS)["iqm"] == pytest.approx(2.692, abs=1e-12)
    assert aggregate(FIVE_RUNS)["iqm"] == pytest.approx(2.6155555555555554, abs=1e-12)
    assert improvement(SIX_RUNS, FIVE_RUNS)["probability"] == pytest.approx(0.6611111111111111, abs=1e-12)


def test_stratified_intervals_are_rliables() -> None:
    """``get_interval_estimates`` of rliable 1.2.0 with arch 7.2.0: 50,000 resamples (20,000 for the improvement),
    ``random_state`` 0 and ``confidence_interval_size`` 1 − 2 · tail, where the tail is the expanded one of 5 and of 4
    degrees of freedom. Items lie far apart, so that resampling over them would show. Both sides are Monte Carlo
    quantiles at 0.2 and 0.1 %, of statistics in steps of about 0.01.
    """
    assert (expanded_tail(0.95, 5), expanded_tail(0.95, 4)) == pytest.approx((0.0024318, 0.00095410), rel=1e-4)
    for scores, low, high in ((SIX_RUNS, 2.48, 2.946), (FIVE_RUNS, 2.42522675, 2.80111111)):
        found = aggregate(scores, num_resamples=50_000)
        assert (found["low"], found["high"]) == pytest.approx((low, high), abs=0.015)
    better = improvement(SIX_RUNS, FIVE_RUNS, num_resamples=20_000)
    assert (better["low"], better["high"]) == pytest.approx((0.34444444, 0.94444444), abs=0.02)


def test_one_score_an_item_has_no_interval_and_none_is_refused() -> None:
    assert aggregate({"a": [1.0], "b": [2.0]}) == {"iqm": 1.5, "low": None, "high": None}
    assert improvement({"a": [1.0]}, {"a": [0.0]}) == {"probability": 1.0, "low": None, "high": None}
    for broken in ({}, {"a": []}, {"a": [float("nan")]}):
        with pytest.raises(DataError, match="at least one finite score"):
            aggregate(broken)
    with pytest.raises(DataError, match="share no item"):
        improvement({"a": [1.0]}, {"b": [1.0]})


def test_scores_come_in_the_order_of_seeds() -> None:
    records = [
        {"arm": "x", "item": item, "split": "train", "seed": seed, "m": float(seed)}
        for seed in (2, 0, 1)
        for item in ("b", "a")
    ]
    assert scores_by_item(records, arm="x", metric="m") == {"a": [0.0, 1.0, 2.0], "b": [0.0, 1.0, 2.0]}
    assert scores_by_item(records[::-1], arm="x", metric="m") == scores_by_item(records, arm="x", metric="m")


# ---- the test that a claim rests on ----


@pytest.mark.parametrize("num_seeds", [2, 5, 10, 31])
def test_with_one_item_the_p_value_is_scipys_paired_t_test(num_seeds: int) -> None:
    generator = np.random.default_rng(num_seeds)
    x, y = generator.normal(0.4, 1.0, num_seeds), generator.normal(size=num_seeds)
    cells = {(seed, "a"): float(d) for seed, d in enumerate(x - y)}
    assert crossed_p_value(cells) == pytest.approx(stats.ttest_rel(x, y).pvalue, rel=1e-9)


@pytest.mark.parametrize("num_items", [7, 4])
def test_the_crossed_p_value_by_a_slow_reference(num_items: int) -> None:
    """Satterthwaite's degrees of freedom over seven items; over four those of the items, 3."""
    table = np.random.default_rng(3).normal(0.5, 1.0, size=(6, num_items))
    parts = [(table.mean(1).var(ddof=1) / 6, 5), (table.mean(0).var(ddof=1) / num_items, num_items - 1)]
    variance = sum(part for part, _ in parts)
    degrees = 3 if num_items == 4 else int(variance**2 / sum(part**2 / degree for part, degree in parts))
    expected = 2 * stats.t.sf(abs(table.mean()) / np.sqrt(variance), degrees)
    got = crossed_p_value({(s, i): float(table[s, i]) for s in range(6) for i in range(num_items)})
    assert got == pytest.approx(expected, rel=1e-9)


def test_p_values_at_the_edges() -> None:
    assert crossed_p_value({(0, "a"): 0.3}) is None
    assert crossed_p_value({(seed, "a"): 0.0 for seed in range(5)}) == 1.0
    assert crossed_p_value({(seed, "a"): 0.25 for seed in range(5)}) == 2 / 2**5  # both ways of five equal signs


def test_equal_differences_are_tested_by_their_signs() -> None:
    """Ten differences of 0.1, one of them negative, by hand: 22 of 1,024 sign patterns have nine or ten alike."""
    nine = {(seed, "a"): 0.1 if seed else -0.1 for seed in range(10)}
    assert crossed_p_value(nine) == pytest.approx(22 / 1024)
    # What is equal but for rounding, as differences of two measured values are, is equal.
    rounded = {(seed, "a"): (0.1 * seed + 0.1) - 0.1 * seed for seed in range(5)}
    assert len(set(rounded.values())) > 1
    assert crossed_p_value(rounded) == pytest.approx(0.0625)
    # Twenty of one sign: too many patterns to try all, and p is the smallest that the drawn ones can give.
    assert crossed_p_value({(seed, "a"): 0.1 for seed in range(20)}) == 1 / 2**14


def test_two_valued_noise_claims_in_at_most_one_family_of_twenty() -> None:
    """Eight comparisons whose every difference is +0.1 or -0.1 by a fair coin."""
    generator = np.random.default_rng(23)
    for num_seeds in (5, 10):
        claimed = 0
        for signs in generator.choice([-0.1, 0.1], size=(300, 8, num_seeds)):
            cells = [{(seed, "a"): float(d) for seed, d in enumerate(row)} for row in signs]
            claimed += any(claims([_measured(grid) for grid in cells]))
        assert claimed <= 15


def test_a_grid_with_holes_is_not_tested_and_says_why() -> None:
    """One article with ten seeds and nine with one, of which 18 % were claimed without an effect."""
    unbalanced = {(seed, "a"): 0.1 + 0.01 * seed for seed in range(10)} | {(0, item): 0.1 for item in "bcdefghij"}
    assert crossed_p_value(unbalanced) is None
    measured = _measured(unbalanced)
    assert claims([measured]) == [False]
    assert "only 19 of 100 pairs of seed and item were measured" in verdict(
        [measured], lower_is_better=(), noun="article"
    )


@pytest.mark.parametrize(("num_seeds", "num_items"), [(5, 2), (10, 3), (5, 5), (10, 10)])
@pytest.mark.parametrize("scales", [(0.5, 1.0, 0.3), (1.0, 0.0, 1.0), (0.0, 1.0, 0.01), (1.0, 1.0, 0.3)])
def test_crosses_hold_their_level(num_seeds: int, num_items: int, scales: tuple[float, float, float]) -> None:
    """Whatever the seeds, the items and a cell alone add to a difference."""
    generator = np.random.default_rng(24)
    false = 0
    for _ in range(400):
        table = (
            scales[0] * generator.normal(size=(num_seeds, 1))
            + scales[1] * generator.normal(size=(1, num_items))
            + scales[2] * generator.normal(size=(num_seeds, num_items))
        )
        p_value = crossed_p_value({(s, i): float(table[s, i]) for s in range(num_seeds) for i in range(num_items)})
        false += p_value is not None and p_value <= 0.05
    assert false <= 30  # 20 expected at most, standard error 4.4


def _measured(cells: Mapping[tuple[int, str], float]) -> Comparison:
    records = [
        {"arm": arm, "item": item, "split": "train", "seed": seed, "m": d if arm == "ours" else 0.0}
        for (seed, item), d in cells.items()
        for arm in ("ours", "theirs")
    ]
    return compare(records, metric="m", arm="ours", baseline="theirs", unit="u", num_resamples=2)


def trial(generator: np.random.Generator, *, effect: float, num_items: int) -> list[bool]:
    """The claims of a comparison of one arm with two baselines over ten seeds, whose own noise has s.d. 1 a cell."""
    shared = generator.normal(size=(NUM_SEEDS, num_items))  # what a seed and an item do to every arm
    records = []
    for arm, shift in (("learned", effect), ("random", 0.0), ("untrained", 0.0)):
        noise = generator.normal(scale=np.sqrt(0.5), size=shared.shape)  # so that a difference has s.d. 1
        records += [
            {"arm": arm, "item": str(i), "split": "train", "seed": s, "m": float(shared[s, i] + noise[s, i] + shift)}
            for s in range(NUM_SEEDS)
            for i in range(num_items)
        ]
    return claims(
        [
            compare(records, metric="m", arm="learned", baseline=baseline, unit="u", num_resamples=2)
            for baseline in ("random", "untrained")
        ]
    )


@pytest.mark.parametrize("num_items", [1, 5])
def test_of_a_thousand_comparisons_without_an_effect_one_in_twenty_claims_something(num_items: int) -> None:
    generator = np.random.default_rng(20)
    false = sum(any(trial(generator, effect=0.0, num_items=num_items)) for _ in range(1_000))
    assert false <= 50


def test_an_effect_of_one_standard_deviation_is_found_in_four_of_five() -> None:
    """Of the paired difference, over ten seeds on one item: Student's test, the most powerful there is, has 80.3 %."""
    generator = np.random.default_rng(21)
    found = 0
    for _ in range(1_000):
        cells = {(seed, "a"): float(d) for seed, d in enumerate(generator.normal(1.0, 1.0, NUM_SEEDS))}
        found += crossed_p_value(cells) <= 0.05  # type: ignore[operator]
    assert found >= 800
    assert sum(all(trial(generator, effect=1.0, num_items=5)) for _ in range(200)) >= 160


def test_a_small_sample_is_not_claimed_more_often_than_said() -> None:
    """Five seeds, where the bootstrap interval alone excludes zero in 8 % of cases."""
    generator = np.random.default_rng(22)
    draws = generator.normal(size=(1_000, 5))
    rejected = sum(crossed_p_value({(s, "a"): float(v) for s, v in enumerate(row)}) <= 0.05 for row in draws)  # type: ignore[operator]
    assert rejected <= 65  # 50 expected, standard error 7


def test_interquartile_mean_over_the_last_axis() -> None:
    assert interquartile_mean(np.array([[0.0, 1.0, 2.0, 99.0], [4.0, 4.0, 4.0, 4.0]])).tolist() == [1.5, 4.0]
