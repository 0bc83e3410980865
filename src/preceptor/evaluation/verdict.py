"""A verdict in two to four plain sentences, which claims nothing that its interval does not carry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from preceptor.evaluation.summary import SPLITS, Comparison, Gap, QueryText

MINIMUM_SEEDS = 5
"""Below this no claim is made: with four seeds, even noise has all signs equal in one case of eight."""

MINIMUM_ITEMS = 5
"""Below this a claim is made of the measured items alone."""


def verdict(
    comparisons: Sequence[Comparison],
    *,
    gaps: Mapping[str, Gap] | None = None,
    query_text: QueryText | None = None,
    noun: str = "",
    level: float = 0.95,
) -> str:
    """One paragraph: a sentence for each split, one for the gap closed, one for the part of a gain that is query text.

    A difference is claimed only if its interval excludes zero and at least ``MINIMUM_SEEDS`` seeds were run; the
    sentence then says of how many items it speaks, calling one of them ``noun`` (``"article"``); without a noun it
    speaks of seeds alone. ``gaps`` maps a split to its :class:`Gap`. ``level`` is that of all intervals given.

    >>> verdict([])
    'Nothing was compared, so no difference can be claimed.'
    """
    sentences = []
    for split in SPLITS:
        if of_split := [comparison for comparison in comparisons if comparison["split"] == split]:
            sentences.append(_comparison_sentence(of_split, noun, level))
    if not sentences:
        sentences.append("Nothing was compared, so no difference can be claimed.")
    if closed := [(split, gaps[split]) for split in SPLITS if gaps and split in gaps]:
        sentences.append(_gap_sentence(closed, noun))
    if query_text is not None:
        sentences.append(_query_text_sentence(query_text))
    return " ".join(sentences)


def claimable(comparison: Comparison) -> bool:
    """Whether a difference may be claimed: enough seeds, and an interval that excludes zero."""
    low, high = comparison["low"], comparison["high"]
    return comparison["num_seeds"] >= MINIMUM_SEEDS and low is not None and high is not None and (low > 0 or high < 0)


def _comparison_sentence(comparisons: Sequence[Comparison], noun: str, level: float) -> str:
    first = comparisons[0]
    seeds = _counted(first["num_seeds"], "seed")
    place = f"On {_items(first, noun)} ({seeds}; {100 * level:g} % intervals)"
    if not noun:
        over = "Over" if first["split"] == "train" else "Held out, over"
        place = f"{over} {seeds} ({100 * level:g} % intervals)"
    if first["num_seeds"] < MINIMUM_SEEDS:
        measured = ", ".join(f"{_name(c)} {_number(c['mean'])} {c['unit']}{_interval(c)}" for c in comparisons)
        needed = f"that takes at least {MINIMUM_SEEDS} seeds"
        return f"{place} no difference can be claimed, for {needed}; measured were {measured}."
    return f"{place}, {'; '.join(_clause(c) for c in comparisons)}."


def _clause(comparison: Comparison) -> str:
    metric, figures = comparison["metric"].replace("_", " "), f"{_number(comparison['mean'])}"
    if not claimable(comparison):
        return (
            f"no difference can be claimed between {comparison['arm']} and {comparison['baseline']} in {metric} "
            f"({figures} {comparison['unit']}{_interval(comparison)})"
        )
    relation = "above" if comparison["mean"] > 0 else "below"
    size = _number(abs(comparison["mean"]))
    return (
        f"{comparison['arm']} is {size} {comparison['unit']} {relation} {comparison['baseline']} in {metric}"
        f"{_interval(comparison)}"
    )


def _gap_sentence(closed: Sequence[tuple[str, Gap]], noun: str) -> str:
    parts = []
    for split, gap in closed:
        where = "in training" if split == "train" else f"on held-out {noun or 'item'}s"
        if gap["mean"] is None:
            parts.append(f"{where} it is undefined ({gap['reason']})")
            continue
        low, high = gap["low"], gap["high"]
        spread = f" ({100 * low:.0f} to {100 * high:.0f})" if low is not None and high is not None else " (no interval)"
        parts.append(f"{where} {100 * gap['mean']:.0f} %{spread} to the {gap['oracle']}")
    return f"Share closed of the gap from random to the oracle: {'; '.join(parts)}."


def _query_text_sentence(split: QueryText) -> str:
    gain, order, text = split["with_queries"], split["without_queries"], split["query_text"]
    opening = f"With the queries in the reader's context the gain over {gain['baseline']} is"
    if not claimable(gain):
        return f"{opening} not distinguishable from zero ({_number(gain['mean'])} {gain['unit']}{_interval(gain)})."
    share = f" ({100 * text['mean'] / gain['mean']:.0f} %)" if gain["mean"] > 0 else ""
    left = "order" if claimable(order) else "not distinguishable from zero"
    return (
        f"{opening} {_number(gain['mean'])} {gain['unit']}, of which {_number(text['mean'])}{share} is query text; "
        f"without the queries {_number(order['mean'])}{_interval(order)} is left, which is {left}."
    )


def _items(comparison: Comparison, noun: str) -> str:
    held_out, count = comparison["split"] == "held_out", comparison["num_items"]
    kind = "held-out" if held_out else "training"
    if count >= MINIMUM_ITEMS:
        return f"{count} {kind} {noun}s"
    return f"this one {kind} {noun} alone" if count == 1 else f"these {count} {kind} {noun}s alone"


def _name(comparison: Comparison) -> str:
    return f"{comparison['arm']} - {comparison['baseline']} in {comparison['metric'].replace('_', ' ')}"


def _interval(comparison: Comparison) -> str:
    low, high = comparison["low"], comparison["high"]
    return "" if low is None or high is None else f" ({_number(low)} to {_number(high)})"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _number(value: float) -> str:
    return f"{value:.3g}"
