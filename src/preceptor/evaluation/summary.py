"""Numbers over arms, from flat records: means with intervals, paired comparisons, the share of the gap closed.

A record is one measured cell, ``{"arm", "item", "split", "seed", metric: value, ...}``: ``split`` is ``"train"`` or
``"held_out"``, every other key is a metric, and a metric that was not measured is left out. ``seed`` is ``None`` for
what is the same under every seed (document order, an oracle under a frozen reader); it then pairs with each seed of the
other arm.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from preceptor.errors import DataError, did_you_mean
from preceptor.evaluation.intervals import (
    Cell,
    crossed_degrees_of_freedom,
    crossed_p_value,
    crossed_sums,
    expanded_tail,
    paired_bootstrap,
    percentile_interval,
)

Record = Mapping[str, Any]
SPLITS = ("train", "held_out")
GAP_UNIT = "share of the gap"
_KEYS = ("arm", "item", "split", "seed")


class Estimate(TypedDict):
    """A mean over ``n`` (seed, item) cells with its interval; the ends are null where there is one cell."""

    mean: float
    low: float | None
    high: float | None
    unit: str
    n: int


class Comparison(TypedDict):
    """The paired difference ``arm`` minus ``baseline`` in ``metric``, over the cells that both have.

    ``p_value`` is that of "no difference" (:func:`~preceptor.evaluation.intervals.crossed_p_value`), null with one
    cell.
    """

    arm: str
    baseline: str
    metric: str
    split: str
    mean: float
    low: float | None
    high: float | None
    unit: str
    n: int
    num_seeds: int
    num_items: int
    share_improved: float
    p_value: float | None


class Gap(TypedDict):
    """The share of the gap from ``lower`` to the oracle that is closed; ``reason`` says why a number is null."""

    mean: float | None
    low: float | None
    high: float | None
    unit: str
    n: int
    num_seeds: int
    num_items: int
    oracle: str
    reason: str | None


class QueryText(TypedDict):
    """A gain under both readings; ``query_text`` is what vanishes when the queries leave the reader's context."""

    with_queries: Comparison
    without_queries: Comparison
    query_text: Comparison


def summarise(
    records: Sequence[Record], *, units: Mapping[str, str], split: str = "train", level: float = 0.95, seed: int = 0
) -> dict[str, dict[str, Estimate]]:
    """``{arm: {metric: estimate}}`` of one split, arms and metrics in the order in which they first appear.

    ``units`` names the unit of every metric. The interval resamples seeds and items (:func:`paired_bootstrap`).
    Raises :class:`DataError` for a malformed record, a metric without a unit, or two records of one cell.
    """
    # Checked first: one record that is counted twice would narrow every interval.
    _check_records(records)
    cells: dict[str, dict[str, dict[Cell, float]]] = {}
    for record in records:
        if record["split"] != split:
            continue
        for metric in record.keys() - set(_KEYS):
            if metric not in units:
                raise DataError(f"the metric {metric!r} has no unit{did_you_mean(metric, units)}; name one in units.")
        for metric in units:  # their order, not that of each record, so that all arms agree
            if metric in record:
                key = (record["seed"], record["item"])
                cells.setdefault(record["arm"], {}).setdefault(metric, {})[key] = float(record[metric])
    return {
        arm: {
            metric: _estimate(values, unit=units[metric], level=level, seed=seed) for metric, values in metrics.items()
        }
        for arm, metrics in cells.items()
    }


def compare(
    records: Sequence[Record],
    *,
    metric: str,
    arm: str,
    baseline: str,
    unit: str,
    split: str = "train",
    level: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """The paired difference ``arm - baseline`` in ``metric`` with its interval over seeds and items.

    ``share_improved`` is the share of cells where ``arm`` is above, a tie counting half. Raises :class:`DataError` when
    the arms share no cell.
    """
    _check_records(records)
    ours, theirs = (_cells(records, arm=name, metric=metric, split=split) for name in (arm, baseline))
    # Paired: what makes one item harder than another cancels in the difference.
    pairs = _paired(ours, theirs, names=(arm, baseline), metric=metric, split=split)
    differences = {cell: a - b for cell, (a, b) in pairs.items()}
    low, high = paired_bootstrap(differences, level=level, num_resamples=num_resamples, seed=seed)
    num_seeds, num_items = _count_levels(differences)
    return Comparison(
        arm=arm,
        baseline=baseline,
        metric=metric,
        split=split,
        mean=_mean(differences),
        low=low,
        high=high,
        unit=unit,
        n=len(differences),
        num_seeds=num_seeds,
        num_items=num_items,
        # A tie is half a win, so two equal arms have 0.5 and not 0.
        share_improved=float(np.mean([(d > 0) + 0.5 * (d == 0) for d in differences.values()])),
        p_value=crossed_p_value(differences),
    )


def gap_closed(
    records: Sequence[Record],
    *,
    metric: str,
    learned: str = "learned",
    lower: str = "random",
    upper: Sequence[str] = ("exhaustive", "beam", "greedy"),
    optimum: str = "exhaustive",
    split: str = "train",
    level: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> Gap:
    """``sum(R_learned - R_lower) / sum(R_oracle - R_lower)`` over the (seed, item) cells of one split.

    ``R_oracle`` of a cell is the best of the arms in ``upper`` that it has. Only where every cell has ``optimum`` is it
    the true optimum; else it is a lower bound, which ``oracle`` says, and the share can exceed 1.

    A ratio of sums, not a mean of ratios: an item whose orders hardly differ has a gap near zero, its own ratio is
    then noise divided by nearly nothing, and a mean would let that one item decide. In the ratio of sums it weighs
    as little as its gap. The interval resamples seeds and items, numerator and denominator together
    (:func:`paired_bootstrap`).

    The number is null, with a reason, where the oracle is not above ``lower``; the interval alone is null with one
    cell, or where the gap vanishes in more resamples than the interval's tail holds (the ratio is then unbounded).
    """
    _check_records(records)
    # 1. The three ingredients, by (seed, item): the learned arm, the lower one, the oracles.
    grids = {name: _cells(records, arm=name, metric=metric, split=split) for name in (learned, lower, *upper)}
    oracles = [name for name in upper if grids[name]]
    if not oracles:
        raise DataError(f"no arm of {', '.join(upper)} has {metric!r} on split {split!r}; a gap needs an oracle.")
    pairs = _paired(grids[learned], grids[lower], names=(learned, lower), metric=metric, split=split)
    # The best oracle of each cell, for a beam may find what a greedy search misses.
    best = {cell: max(_at(grids[name], cell) for name in oracles) for cell in pairs}
    gains = {cell: ours - floor for cell, (ours, floor) in pairs.items() if math.isfinite(best[cell])}
    gaps = {cell: best[cell] - pairs[cell][1] for cell in gains}
    if not gains:
        raise DataError(f"{learned!r} and the oracle share no (seed, item) on split {split!r}.")
    exact = optimum in oracles and all(math.isfinite(_at(grids[optimum], cell)) for cell in gains)
    num_seeds, num_items = _count_levels(gains)
    result = Gap(
        mean=None,
        low=None,
        high=None,
        unit=GAP_UNIT,
        n=len(gains),
        num_seeds=num_seeds,
        num_items=num_items,
        oracle=f"{optimum} optimum" if exact else f"best of {', '.join(oracles)}: a lower bound of the optimum",
        reason=None,
    )
    # 2. The share itself, where there is a gap.
    total_gap = sum(gaps.values())
    if total_gap <= 0.0:
        result["reason"] = f"the oracle is not above {lower} ({total_gap / len(gains):.3g} on average): no gap to close"
        return result
    ratio = sum(gains.values()) / total_gap
    result["mean"] = ratio
    if len(gains) == 1:
        result["reason"] = "one seed on one item has no interval"
        return result
    # 3. Its interval: the same resamples for numerator and denominator, whose errors go together.
    gain_sums, gap_sums = crossed_sums(gains, gaps, num_resamples=num_resamples, seed=seed)
    # The linearised ratio: gain − ratio · gap has mean 0, and its spread says how much the ratio varies.
    residuals = {cell: gains[cell] - ratio * gaps[cell] for cell in gains}
    degrees = crossed_degrees_of_freedom(residuals)
    usable = gap_sums > 0.0
    # A resample without a gap has no ratio; a few of them may be dropped, but not as many as a tail holds.
    if 1.0 - usable.mean() > expanded_tail(level, degrees):
        share = 1.0 - float(usable.mean())
        result["reason"] = f"the gap vanishes in {share:.1%} of the resamples: too small to divide by"
        return result
    interval = percentile_interval(gain_sums[usable] / gap_sums[usable], level=level, degrees_of_freedom=degrees)
    result["low"], result["high"] = interval
    return result


def query_text(
    records: Sequence[Record],
    *,
    with_queries: str,
    without_queries: str,
    arm: str,
    baseline: str,
    unit: str,
    split: str = "train",
    level: float = 0.95,
    seed: int = 0,
) -> QueryText:
    """How much of the gain in the metric ``with_queries`` is owed to the query text.

    The same orders are scored with the policy's queries in the reader's context and without; the difference of the two
    gains, paired by cell, is query text, and the gain without is order.
    """
    # The metric of the difference, cell by cell, so that it is compared like any other.
    both = [
        {**{key: record[key] for key in _KEYS}, "query text": record[with_queries] - record[without_queries]}
        for record in records
        if with_queries in record and without_queries in record
    ]

    def gain(source: Sequence[Record], metric: str) -> Comparison:
        return compare(
            source, metric=metric, arm=arm, baseline=baseline, unit=unit, split=split, level=level, seed=seed
        )

    return QueryText(
        with_queries=gain(records, with_queries),
        without_queries=gain(records, without_queries),
        query_text=gain(both, "query text"),
    )


def percentile_among(value: float, values: Sequence[float]) -> float:
    """The percentile, in [0, 100], at which ``value`` falls among ``values``: the share below it, ties counting half.

    >>> percentile_among(2.0, [0.0, 1.0, 2.0, 3.0])
    62.5
    """
    if not values or not math.isfinite(value) or not all(map(math.isfinite, values)):
        raise DataError("percentile_among needs finite numbers, at least one to be placed among.")
    return 100.0 * sum((v < value) + 0.5 * (v == value) for v in values) / len(values)


def _check_records(records: Sequence[Record]) -> None:
    seen: set[Hashable] = set()
    for number, record in enumerate(records):
        if missing := [key for key in _KEYS if key not in record]:
            raise DataError(f"record {number} lacks {', '.join(missing)}; it needs {', '.join(_KEYS)}.")
        if record["split"] not in SPLITS:
            raise DataError(f"record {number} has split {record['split']!r}; allowed: {', '.join(SPLITS)}.")
        # One cell, one measurement; the same cell twice is a mistake of the caller.
        cell = tuple(record[key] for key in _KEYS)
        if cell in seen:
            raise DataError(f"two records of arm, item, split, seed = {cell}; each cell is measured once.")
        seen.add(cell)
        for metric in record.keys() - set(_KEYS):
            value = record[metric]
            # A truth value counts as an integer in Python and would be averaged.
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise DataError(
                    f"record {number}: {metric} must be a finite number, got {value!r}; leave it out instead."
                )


def _cells(records: Sequence[Record], *, arm: str, metric: str, split: str) -> dict[Cell, float]:
    return {
        (record["seed"], record["item"]): float(record[metric])
        for record in records
        if record["arm"] == arm and record["split"] == split and metric in record
    }


def _at(grid: Mapping[Cell, float], cell: Cell) -> float:
    """The value of a cell, that of every seed where it has none of its own, or -inf."""
    # A seedless value (of an oracle under a frozen reader) stands for every seed.
    return grid.get(cell, grid.get((None, cell[1]), -math.inf))


def _paired(
    first: Mapping[Cell, float], second: Mapping[Cell, float], *, names: tuple[str, str], metric: str, split: str
) -> dict[Cell, tuple[float, float]]:
    """The values of both arms in every cell that both have, a seedless value paired with each seed of the other arm."""
    # Where one arm has seeds and the other has none, pairs are formed by seed.
    seeded = {item for grid in (first, second) for seed, item in grid if seed is not None}
    cells = [c for c in {**first, **second} if c[0] is not None or c[1] not in seeded]
    pairs = {cell: (_at(first, cell), _at(second, cell)) for cell in cells}
    pairs = {cell: pair for cell, pair in pairs.items() if all(map(math.isfinite, pair))}
    if not pairs:
        raise DataError(f"{names[0]!r} and {names[1]!r} share no (seed, item) with {metric!r} on split {split!r}.")
    return pairs


def _estimate(values: Mapping[Cell, float], *, unit: str, level: float, seed: int) -> Estimate:
    low, high = paired_bootstrap(values, level=level, seed=seed)
    return Estimate(mean=_mean(values), low=low, high=high, unit=unit, n=len(values))


def _count_levels(grid: Mapping[Cell, float]) -> tuple[int, int]:
    return len({seed for seed, _ in grid}), len({item for _, item in grid})


def _mean(grid: Mapping[Cell, float]) -> float:
    return sum(grid.values()) / len(grid)
