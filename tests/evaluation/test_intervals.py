from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from preceptor.errors import DataError
from preceptor.evaluation.intervals import (
    Interval,
    bootstrap_interval,
    crossed_degrees_of_freedom,
    crossed_sums,
    expanded_tail,
    interquartile_mean,
    paired_bootstrap,
    probability_of_improvement,
)

VALUES = [0.31, -0.12, 0.44, 0.08, 0.27, 0.19, 0.52, -0.05, 0.33, 0.21, 0.02, 0.40]


@pytest.mark.parametrize(("level", "degrees"), [(0.95, d) for d in (1, 2, 3, 4, 9, 30, 200, 5000)] + [(0.8, 6)])
def test_expanded_tail_uses_the_student_quantile_of_scipy(level: float, degrees: int) -> None:
    n = degrees + 1
    expected = stats.norm.cdf(-math.sqrt(n / degrees) * stats.t.ppf((1 + level) / 2, degrees))
    # 2e-3 relative: above 1,000 degrees the normal quantile stands in for Student's.
    assert expanded_tail(level, degrees) == pytest.approx(expected, rel=2e-3 if degrees > 1000 else 1e-8)


@pytest.mark.parametrize("statistic", ["mean", "interquartile_mean"])
def test_interval_agrees_with_scipy_at_the_expanded_level(statistic: str) -> None:
    """SciPy's percentile bootstrap, asked for the level that the expansion amounts to, gives the same ends."""
    ours, theirs = {
        "mean": (None, np.mean),
        "interquartile_mean": (interquartile_mean, lambda x, axis: stats.trim_mean(x, 0.25, axis=axis)),
    }[statistic]
    level = 1 - 2 * stats.norm.cdf(-math.sqrt(12 / 11) * stats.t.ppf(0.975, 11))
    expected = stats.bootstrap(
        (VALUES,), theirs, confidence_level=level, n_resamples=40_000, method="percentile", rng=np.random.default_rng(3)
    ).confidence_interval
    got = bootstrap_interval(VALUES, num_resamples=40_000, **({} if ours is None else {"statistic": ours}))
    # Two Monte Carlo quantiles near 1 % of 40,000 draws: their standard error is about 0.002.
    assert got == pytest.approx((expected.low, expected.high), abs=0.01)


def test_interval_covers_at_five_values() -> None:
    """Over normal samples of five the interval covers 0 in about 92 %, where a plain percentile interval has 83 %."""
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(400):
        low, high = bootstrap_interval(generator.normal(size=5), num_resamples=500, seed=trial)
        covered += low < 0 < high  # type: ignore[operator]
    assert 0.88 <= covered / 400 <= 0.97


def test_one_value_has_no_interval_and_equal_values_have_no_width() -> None:
    assert bootstrap_interval([0.3]) == Interval(None, None)
    assert paired_bootstrap({(0, "a"): 0.3}) == Interval(None, None)
    assert bootstrap_interval([0.5, 0.5, 0.5]) == Interval(0.5, 0.5)


def test_two_values_give_their_whole_range() -> None:
    assert bootstrap_interval([1.0, 3.0]) == Interval(1.0, 3.0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=12), st.integers(0, 5))
def test_interval_is_deterministic_bounded_and_shifts_with_the_data(values: list[float], seed: int) -> None:
    low, high = bootstrap_interval(values, num_resamples=200, seed=seed)
    assert bootstrap_interval(values, num_resamples=200, seed=seed) == (low, high)
    assert low is not None
    assert high is not None
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    shifted = bootstrap_interval([v + 10 for v in values], num_resamples=200, seed=seed)
    assert shifted == pytest.approx((low + 10, high + 10), abs=1e-9)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf], [[1.0, 2.0]]])
def test_unusable_values_are_refused(values: list[float]) -> None:
    with pytest.raises(DataError, match="values must be"):
        bootstrap_interval(values)


@pytest.mark.parametrize("level", [0.0, 1.0, 95])
def test_a_level_outside_the_unit_interval_is_refused(level: float) -> None:
    with pytest.raises(DataError, match=r"level must lie in \(0, 1\)"):
        bootstrap_interval(VALUES, level=level)


def test_interquartile_mean_is_scipys_trimmed_mean() -> None:
    for n in range(1, 14):
        values = np.random.default_rng(n).normal(size=n)
        assert float(interquartile_mean(values)) == pytest.approx(stats.trim_mean(values, 0.25), abs=1e-12)


def test_probability_of_improvement_is_mann_whitney() -> None:
    x, y = [3.0, 1.0, 4.0, 1.0, 5.0], [2.0, 1.0, 0.0]
    assert probability_of_improvement(x, y) == pytest.approx(stats.mannwhitneyu(x, y).statistic / 15)


def test_crossed_sums_resample_seeds_and_articles_jointly() -> None:
    """A 2 x 2 grid has nine weightings of known probability; the slow sum over them gives the mean and the variance."""
    grid = {(0, "a"): 1.0, (0, "b"): 2.0, (1, "a"): 4.0, (1, "b"): 8.0}
    counts = [((2, 0), 0.25), ((1, 1), 0.5), ((0, 2), 0.25)]
    outcomes = [
        (p * q, sum(s[i] * a[j] * grid[i, "ab"[j]] for i in (0, 1) for j in (0, 1)))
        for s, p in counts
        for a, q in counts
    ]
    mean = sum(p * total for p, total in outcomes)
    variance = sum(p * (total - mean) ** 2 for p, total in outcomes)
    sums, doubled = crossed_sums(grid, {cell: 2 * v for cell, v in grid.items()}, num_resamples=40_000, seed=1)
    assert set(np.unique(sums)) == {total for _, total in outcomes}
    assert sums.mean() == pytest.approx(mean, rel=0.02)
    assert sums.var() == pytest.approx(variance, rel=0.04)
    np.testing.assert_array_equal(doubled, 2 * sums)  # one resample serves every grid


def test_paired_bootstrap_with_one_article_is_the_bootstrap_over_seeds() -> None:
    crossed = paired_bootstrap({(seed, "a"): v for seed, v in enumerate(VALUES)}, num_resamples=40_000)
    assert crossed == pytest.approx(bootstrap_interval(VALUES, num_resamples=40_000, seed=9), abs=0.01)


def test_paired_bootstrap_does_not_count_copies_as_evidence() -> None:
    """Five seeds that agree on every item say no more than one: the interval stays that of the items."""
    items = dict(zip("abcde", [0.1, 0.4, -0.2, 0.3, 0.6], strict=True))
    copied = {(seed, a): v for seed in range(5) for a, v in items.items()}
    expected = bootstrap_interval(list(items.values()), num_resamples=40_000)
    naive = bootstrap_interval(list(copied.values()))
    got = paired_bootstrap(copied, num_resamples=40_000)
    assert got == pytest.approx(expected, abs=0.03)
    assert got.high - got.low > 1.7 * (naive.high - naive.low)  # type: ignore[operator]


def test_paired_bootstrap_ignores_the_order_of_cells_and_allows_holes() -> None:
    cells = {(seed, a): math.sin(3 * seed + ord(a)) for seed in range(3) for a in "abc"}
    assert paired_bootstrap(cells) == paired_bootstrap(dict(reversed(cells.items())))
    diagonal = {(i, "abcde"[i]): float(i) for i in range(5)}
    low, high = paired_bootstrap(diagonal)
    assert low is not None
    assert high is not None
    assert 0.0 <= low < 2.0 < high <= 4.0


def test_satterthwaite_by_hand() -> None:
    """Seed means 1, 3, 5 (variance 4, /3 = 4/3, 2 df), item means 2, 4 (variance 2, /2 = 1, 1 df).

    (4/3 + 1)^2 / ((4/3)^2 / 2 + 1^2 / 1) = 5.444 / 1.889 = 2.88, rounded down: 2.
    """
    grid = {(s, a): 1.0 + 2 * s + (1.0 if a == "b" else -1.0) for s in range(3) for a in "ab"}
    assert crossed_degrees_of_freedom(grid) == 2
    assert crossed_degrees_of_freedom({(s, "a"): float(s) for s in range(7)}) == 6
    assert crossed_degrees_of_freedom({(s, a): 1.0 for s in range(7) for a in "abc"}) == 2


def test_no_effect_is_rarely_found_and_one_standard_deviation_usually() -> None:
    """Ten seeds on one item: about 5 % false claims, at least 80 % found (100 trials each, so coarse bounds)."""
    generator = np.random.default_rng(5)

    def excludes_zero(effect: float) -> float:
        found = 0
        for trial in range(100):
            cells = {(s, "a"): float(v) for s, v in enumerate(generator.normal(effect, 1.0, size=10))}
            low, high = paired_bootstrap(cells, num_resamples=1000, seed=trial)
            found += low > 0 or high < 0  # type: ignore[operator]
        return found / 100

    assert excludes_zero(0.0) <= 0.10
    assert excludes_zero(1.0) >= 0.70


def test_large_samples_approach_the_normal_interval() -> None:
    values = np.random.default_rng(2).normal(size=2_000)
    half = NormalDist().inv_cdf(0.975) * values.std(ddof=1) / math.sqrt(2_000)
    assert bootstrap_interval(values, num_resamples=4_000) == pytest.approx(
        (values.mean() - half, values.mean() + half), abs=0.004
    )
