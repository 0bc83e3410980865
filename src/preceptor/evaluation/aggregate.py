"""What an arm reaches over seeds and items, and how often one arm beats another: rliable's aggregates.

Agarwal et al. 2021 (arXiv 2108.13264) ask for three things over a few seeds on several tasks: the interquartile mean
of all scores, the probability of improvement of one arm over another, and intervals that resample the seeds of each
item on their own (a stratified bootstrap), the items held fixed. All three are here and give rliable's numbers on the
same scores; only the interval's ends are read at the expanded percentiles (``intervals.py`` says why) instead of the
plain ones, which are too narrow for few seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np

from preceptor.errors import DataError
from preceptor.evaluation.intervals import (
    Array,
    Interval,
    interquartile_mean,
    percentile_interval,
    probability_of_improvement,
)
from preceptor.evaluation.summary import Record

Scores = Mapping[str, Sequence[float]]
"""The scores of one arm by item, one for each seed."""


class Aggregate(TypedDict):
    """The interquartile mean of an arm over seeds and items; the ends are null where an item has one seed."""

    iqm: float
    low: float | None
    high: float | None


class Improvement(TypedDict):
    """The probability that a score of one arm is above one of the other on the same item, averaged over items."""

    probability: float
    low: float | None
    high: float | None


def scores_by_item(records: Sequence[Record], *, arm: str, metric: str, split: str = "train") -> dict[str, list[float]]:
    """The scores of ``arm`` by item, seeds in order, so that the order of the records does not matter."""
    rows = [record for record in records if record["arm"] == arm and record["split"] == split and metric in record]
    # Text of both keys: seeds may be None and items numbers, which do not sort together.
    rows.sort(key=lambda record: (str(record["item"]), repr(record["seed"])))
    scores: dict[str, list[float]] = {}
    for record in rows:
        scores.setdefault(str(record["item"]), []).append(float(record[metric]))
    return scores


def aggregate(scores: Scores, *, level: float = 0.95, num_resamples: int = 2_000, seed: int = 0) -> Aggregate:
    """The interquartile mean of all ``scores`` and its stratified interval.

    Raises :class:`DataError` where there are no scores or one is not finite.
    """
    strata = _strata(scores)
    value = float(interquartile_mean(np.concatenate(strata)))
    # The items stay as they are; only seeds are drawn again.
    resampled = stratified_resamples(strata, num_resamples=num_resamples, seed=seed)
    low, high = _interval(interquartile_mean(resampled), [strata], level)
    return Aggregate(iqm=value, low=low, high=high)


def improvement(
    ours: Scores, theirs: Scores, *, level: float = 0.95, num_resamples: int = 2_000, seed: int = 0
) -> Improvement:
    """How probable it is that ``ours`` beats ``theirs``, over the items that both have; a tie counts half.

    On each item it is the Mann-Whitney statistic over the number of pairs. The interval resamples each arm's seeds on
    each item. Raises :class:`DataError` where they share no item.
    """
    # Only items of both: a score on another item says nothing about who is better.
    items = [item for item in ours if item in theirs]
    if not items:
        raise DataError("two arms that share no item cannot be compared; measure both on the same items.")
    first, second = ([np.asarray(scores[item], dtype=np.float64) for item in items] for scores in (ours, theirs))
    value = float(np.mean([probability_of_improvement(list(x), list(y)) for x, y in zip(first, second, strict=True)]))
    # One generator for all items, so that the resamples of different items are independent.
    generator = np.random.default_rng(seed)
    total = np.zeros(num_resamples)
    for x, y in zip(first, second, strict=True):
        # All pairs of a resample at once: xs [resample, seed of ours, 1], ys [resample, 1, seed of theirs].
        xs, ys = (_resampled(stratum, num_resamples, generator)[:, :, None] for stratum in (x, y))
        ys = ys.swapaxes(1, 2)
        total += ((xs > ys) + 0.5 * (xs == ys)).mean(axis=(1, 2))
    low, high = _interval(total / len(items), [first, second], level)
    return Improvement(probability=value, low=low, high=high)


def stratified_resamples(strata: Sequence[Array], *, num_resamples: int, seed: int) -> Array:
    """``(num_resamples, number of scores)``: every stratum drawn again from itself, the strata side by side."""
    generator = np.random.default_rng(seed)
    return np.concatenate([_resampled(stratum, num_resamples, generator) for stratum in strata], axis=1)


def _resampled(stratum: Array, num_resamples: int, generator: np.random.Generator) -> Array:
    return np.asarray(stratum[generator.integers(len(stratum), size=(num_resamples, len(stratum)))])


def _interval(resampled: Array, arms: Sequence[Sequence[Array]], level: float) -> Interval:
    """Where an item of an arm has one score, nothing is known of how that varies, and there is no interval."""
    num_seeds = min(len(stratum) for strata in arms for stratum in strata)
    if num_seeds == 1:
        return Interval(None, None)
    # The item with the fewest seeds limits what is known.
    return percentile_interval(resampled, level=level, degrees_of_freedom=num_seeds - 1)


def _strata(scores: Scores) -> list[Array]:
    strata = [np.asarray(values, dtype=np.float64) for values in scores.values()]
    if not strata or not all(stratum.size and np.isfinite(stratum).all() for stratum in strata):
        raise DataError("an aggregate needs at least one finite score on every item; leave out what was not measured.")
    return strata
