"""A verdict in a few plain sentences, which claims nothing that chance could have done.

All claims of one verdict are tested as a family (Holm 1979, Scand. J. Stat. 6:65): where nothing differs, the chance
that it claims anything at all is at most ``1 - level``, however many arms are compared. Every system's verdict asks
:func:`claims`, once and about everything that its sentences could claim.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TypedDict

from preceptor.evaluation.summary import SPLITS, Comparison, Gap, QueryText

MINIMUM_SEEDS = 5
"""Below this no claim is made: with four seeds, even noise has all signs equal in one case of eight."""

MINIMUM_ITEMS = 5
"""Below this a claim is made of the measured items alone."""

NOTHING_COMPARED = "Nothing was compared, so no difference can be claimed."


class Conclusion(TypedDict):
    """A sentence that is said where each of its differences may be claimed and is above zero, and another elsewhere."""

    comparisons: list[Comparison]
    claimed: str
    otherwise: str  # empty says nothing


def verdict(
    comparisons: Sequence[Comparison],
    *,
    lower_is_better: Collection[str] = (),
    conclusions: Sequence[Conclusion] = (),
    query_text: QueryText | None = None,
    gaps: Mapping[str, Gap] | None = None,
    measured: Sequence[str] = (),
    noun: str = "",
    subject: str = "",
    level: float = 0.95,
) -> str:
    """One paragraph: what happened, a sentence for each split, then what else was measured and may be concluded.

    It opens with :func:`opening` about the first comparison. A difference is claimed as :func:`claims` says, over the
    :func:`family` of all that the verdict could claim; the sentence then says of how many items it speaks.

    Args:
        comparisons: all that is compared, the one that matters most first.
        lower_is_better: metrics of which less is better, as in ``result.json``: there the lower arm beats the other.
        conclusions: further sentences that rest on claims.
        query_text: what a gain owes to the query text.
        gaps: share of the gap closed, by split.
        measured: sentences that claim nothing.
        noun: what an item is called (``"article"``); without one the verdict speaks of seeds alone.
        subject: who is compared first, in words ("the learned order"); the name of its arm by default.
        level: of all intervals given.

    >>> verdict([])
    'Nothing was compared, so no difference can be claimed.'
    """
    members = family(comparisons, conclusions, query_text)
    found = {_key(c): claim for c, claim in zip(members, claims(members, level=level), strict=True)}
    sentences = []
    if comparisons:
        first = comparisons[0]
        sentences.append(
            opening(
                first,
                subject=subject or _words(first["arm"]),
                claimed=found[_key(first)],
                place=_place(first, noun),
                lower_is_better=first["metric"] in lower_is_better,
            )
        )
    elif not measured:
        sentences.append(NOTHING_COMPARED)
    for split in SPLITS:
        of_split = [(c, found[_key(c)]) for c in comparisons if c["split"] == split]
        if of_split:
            sentences.append(_comparison_sentence(of_split, noun, level))
    sentences += measured
    for conclusion in conclusions:
        holds = all(found[_key(c)] and c["mean"] > 0 for c in conclusion["comparisons"])
        sentences.append(conclusion["claimed"] if holds else conclusion["otherwise"])
    if closed := [(split, gaps[split]) for split in SPLITS if gaps and split in gaps]:
        sentences.append(_gap_sentence(closed, noun))
    if query_text is not None:
        sentences.append(_query_text_sentence(query_text, found))
    return " ".join(sentence for sentence in sentences if sentence)


def family(
    comparisons: Sequence[Comparison],
    conclusions: Sequence[Conclusion] = (),
    query_text: QueryText | None = None,
) -> list[Comparison]:
    """All that one verdict could claim, each difference once, ``comparisons`` first and in their order."""
    members = [*comparisons, *(c for conclusion in conclusions for c in conclusion["comparisons"])]
    if query_text is not None:
        members += [query_text["with_queries"], query_text["without_queries"], query_text["query_text"]]
    return list({_key(c): c for c in members}.values())


def _key(comparison: Comparison) -> tuple[str, str, str, str]:
    return comparison["arm"], comparison["baseline"], comparison["metric"], comparison["split"]


def opening(comparison: Comparison, *, subject: str, claimed: bool, lower_is_better: bool, place: str = "") -> str:
    """One plain sentence of at most twenty words or so that says what happened, the first of every verdict.

    Args:
        comparison: the one that a run is about.
        subject: who is compared: "the learned order".
        claimed: whether the difference may be claimed, in its family.
        lower_is_better: in the compared metric.
        place: where: "on this article"; empty says nothing of it.

    >>> measured: Comparison = {
    ...     "arm": "learned", "baseline": "random", "metric": "reward", "split": "train", "mean": 0.045, "low": None,
    ...     "high": None, "unit": "nats/value token", "n": 1, "num_seeds": 1, "num_items": 1, "share_improved": 1.0,
    ...     "p_value": None,
    ... }
    >>> words = {"subject": "the learned order", "lower_is_better": False}
    >>> opening(measured, claimed=False, place="on this article", **words)
    'The learned order beats random by 0.045 nats per value token on this article; one seed proves nothing yet.'
    >>> opening({**measured, "num_seeds": 9}, claimed=True, **words)
    'The learned order beats random by 0.045 nats per value token over 9 seeds.'
    >>> opening({**measured, "num_seeds": 9}, claimed=False, **words)
    'Over 9 seeds the learned order cannot be told from random (0.045 nats per value token).'
    """
    baseline = _words(comparison["baseline"])
    size = f"{_number(abs(comparison['mean']))} {comparison['unit'].replace('/', ' per ')}"
    where = f" {place}" if place else ""
    seeds = comparison["num_seeds"]
    if seeds >= MINIMUM_SEEDS and not claimed:
        signed = f"{_number(comparison['mean'])} {comparison['unit'].replace('/', ' per ')}"
        return f"Over {seeds} seeds {subject} cannot be told from {baseline}{where} ({signed})."
    better = comparison["mean"] < 0 if lower_is_better else comparison["mean"] > 0
    if comparison["mean"] == 0:
        happened = f"{subject} does exactly as well as {baseline}{where}"
    else:
        happened = f"{subject} {'beats' if better else 'trails'} {baseline} by {size}{where}"
    ending = f" over {seeds} seeds"
    if seeds < MINIMUM_SEEDS:
        ending = "; one seed proves nothing yet" if seeds == 1 else f"; {seeds} seeds prove nothing yet"
    return f"{happened[0].upper()}{happened[1:]}{ending}."


def claims(comparisons: Sequence[Comparison], *, level: float = 0.95) -> list[bool]:
    """For each comparison whether its difference may be claimed, all of them together being wrong in ``1 - level``.

    Those over fewer than ``MINIMUM_SEEDS`` seeds are not claimed and not counted. Of the others, in the order of their
    p-values, the k-th of m is claimed if its p-value is at most ``(1 - level) / (m - k + 1)`` and all before it were.
    """
    p_values = {
        index: p_value
        for index, comparison in enumerate(comparisons)
        if (p_value := comparison["p_value"]) is not None and comparison["num_seeds"] >= MINIMUM_SEEDS
    }
    claimed = [False] * len(comparisons)
    for rank, index in enumerate(sorted(p_values, key=lambda index: p_values[index])):
        if p_values[index] > (1.0 - level) / (len(p_values) - rank):
            break
        claimed[index] = True
    return claimed


def claimable(comparison: Comparison, *, level: float = 0.95) -> bool:
    """Whether a difference may be claimed where it is the only one in question."""
    return claims([comparison], level=level)[0]


def _comparison_sentence(comparisons: Sequence[tuple[Comparison, bool]], noun: str, level: float) -> str:
    first = comparisons[0][0]
    seeds = _counted(first["num_seeds"], "seed")
    place = f"On {_items(first, noun)} ({seeds}; {100 * level:g} % intervals)"
    if not noun:
        over = "Over" if first["split"] == "train" else "Held out, over"
        place = f"{over} {seeds} ({100 * level:g} % intervals)"
    if first["num_seeds"] < MINIMUM_SEEDS:
        measured = ", ".join(f"{_name(c)} {_number(c['mean'])} {c['unit']}{_interval(c)}" for c, _ in comparisons)
        needed = f"that takes at least {MINIMUM_SEEDS} seeds"
        return f"{place} no difference can be claimed, for {needed}; measured were {measured}."
    return f"{place}, {'; '.join(_clause(c, claimed, level) for c, claimed in comparisons)}."


def _clause(comparison: Comparison, claimed: bool, level: float) -> str:
    metric, figures = _words(comparison["metric"]), f"{_number(comparison['mean'])}"
    if not claimed:
        alone = ", which alone would be claimed, but not among this many" if claimable(comparison, level=level) else ""
        pairs = comparison["num_seeds"] * comparison["num_items"]
        if comparison["n"] < pairs:
            alone = f", for only {comparison['n']} of {pairs} pairs of seed and item were measured"
        return (
            f"no difference can be claimed between {comparison['arm']} and {comparison['baseline']} in {metric} "
            f"({figures} {comparison['unit']}{_interval(comparison)}{alone})"
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


def _query_text_sentence(split: QueryText, found: Mapping[tuple[str, str, str, str], bool]) -> str:
    gain, order, text = split["with_queries"], split["without_queries"], split["query_text"]
    gain_claimed, order_claimed, text_claimed = (found[_key(c)] for c in (gain, order, text))
    opening = f"With the queries in the reader's context the gain over {gain['baseline']} is"
    if gain["num_seeds"] < MINIMUM_SEEDS:
        return (
            f"{opening} measured as {_number(gain['mean'])} {gain['unit']}, {_number(text['mean'])} of it query text."
        )
    if not gain_claimed:
        return f"{opening} not distinguishable from zero ({_number(gain['mean'])} {gain['unit']}{_interval(gain)})."
    share = f" ({100 * text['mean'] / gain['mean']:.0f} %)" if gain["mean"] > 0 else ""
    owed = f"of which {_number(text['mean'])}{share} is query text"
    if not text_claimed:
        owed = f"and no part of it can be claimed to be query text ({_number(text['mean'])}{_interval(text)})"
    left = "order" if order_claimed else "not distinguishable from zero"
    return (
        f"{opening} {_number(gain['mean'])} {gain['unit']}, {owed}; "
        f"without the queries {_number(order['mean'])}{_interval(order)} is left, which is {left}."
    )


def _place(comparison: Comparison, noun: str) -> str:
    """Where the opening speaks of: ``on this article``, ``on 3 held-out articles``; nothing without a noun."""
    if not noun:
        return ""
    kind = f"held-out {noun}" if comparison["split"] == "held_out" else noun
    return f"on this {kind}" if comparison["num_items"] == 1 else f"on {_counted(comparison['num_items'], kind)}"


def _items(comparison: Comparison, noun: str) -> str:
    held_out, count = comparison["split"] == "held_out", comparison["num_items"]
    kind = "held-out" if held_out else "training"
    if count >= MINIMUM_ITEMS:
        return f"{count} {kind} {noun}s"
    return f"this one {kind} {noun} alone" if count == 1 else f"these {count} {kind} {noun}s alone"


def _name(comparison: Comparison) -> str:
    return f"{comparison['arm']} - {comparison['baseline']} in {_words(comparison['metric'])}"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _interval(comparison: Comparison) -> str:
    low, high = comparison["low"], comparison["high"]
    return "" if low is None or high is None else f" ({_number(low)} to {_number(high)})"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _number(value: float) -> str:
    return f"{value:.3g}"
