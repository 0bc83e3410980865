from __future__ import annotations

import functools
from typing import Any

import pytest

from preceptor.evaluation.summary import Comparison, Gap, QueryText
from preceptor.evaluation.verdict import Conclusion, claimable, claims, opening, verdict

said = functools.partial(verdict, lower_is_better=())
"""Of metrics of which more is better; the others have a test of their own."""

BOUND = "best of beam, greedy: a lower bound of the optimum"


def comparison(mean: float, low: float | None, high: float | None, **changes: Any) -> Comparison:
    base: dict[str, Any] = {
        "arm": "learned",
        "baseline": "random",
        "metric": "order_gain",
        "split": "train",
        "mean": mean,
        "low": low,
        "high": high,
        "unit": "nats per value token",
        "n": 25,
        "num_seeds": 5,
        "num_items": 5,
        "share_improved": 1.0,
        # Clear of zero or not, as the interval is; the tests of the claim itself give their own.
        "p_value": None if low is None or high is None else 1e-4 if low > 0 or high < 0 else 0.4,
    }
    return Comparison(**{**base, **changes})  # type: ignore[typeddict-item]


def gap(mean: float | None, low: float | None = None, high: float | None = None, **changes: Any) -> Gap:
    base: dict[str, Any] = {
        "mean": mean,
        "low": low,
        "high": high,
        "unit": "share of the gap",
        "n": 25,
        "num_seeds": 5,
        "num_items": 5,
        "oracle": "exhaustive optimum",
        "reason": None,
    }
    return Gap(**{**base, **changes})  # type: ignore[typeddict-item]


def test_a_real_gain_is_claimed_with_its_figures() -> None:
    text = said(
        [comparison(0.1241, 0.08, 0.171), comparison(0.11, 0.06, 0.16, baseline="untrained")],
        gaps={"train": gap(0.86, 0.71, 0.97), "held_out": gap(0.03, -0.1, 0.2, oracle=BOUND)},
        noun="article",
    )
    assert text == (
        "Learned beats random by 0.124 nats per value token on 5 articles over 5 seeds. "
        "On 5 training articles (5 seeds; 95 % intervals), "
        "learned is 0.124 nats per value token above random in order gain (0.08 to 0.171); "
        "learned is 0.11 nats per value token above untrained in order gain (0.06 to 0.16). "
        "Share closed of the gap from random to the oracle: in training 86 % (71 to 97) to the exhaustive optimum; "
        "on held-out articles 3 % (-10 to 20) to the best of beam, greedy: a lower bound of the optimum."
    )


def test_an_interval_over_zero_claims_nothing_and_a_loss_is_a_loss() -> None:
    text = said([comparison(0.004, -0.01, 0.018, split="held_out"), comparison(-0.2, -0.3, -0.1)], noun="article")
    assert "learned is 0.2 nats per value token below random" in text
    assert (
        "no difference can be claimed between learned and random in order gain "
        "(0.004 nats per value token (-0.01 to 0.018))"
    ) in text
    assert text.index("On 5 training") < text.index("On 5 held-out")


@pytest.mark.parametrize("seeds", [1, 4])
def test_too_few_seeds_is_said_however_clear_the_interval(seeds: int) -> None:
    few = comparison(0.5, 0.4, 0.6, num_seeds=seeds)
    text = said([few], noun="article")
    assert not claimable(few)
    assert f"({seeds} seed{'s' if seeds > 1 else ''}; " in text
    assert "no difference can be claimed, for that takes at least 5 seeds" in text
    assert " above " not in text


def test_few_articles_limit_what_a_claim_is_about() -> None:
    alone = said([comparison(0.5, 0.4, 0.6, num_items=1)], noun="article")
    assert " On this one training article alone (5 seeds" in alone
    three = said([comparison(0.5, 0.4, 0.6, num_items=3, split="held_out")], noun="article")
    assert " On these 3 held-out articles alone" in three


def test_without_a_noun_it_speaks_of_seeds_alone() -> None:
    text = said([comparison(0.5, 0.4, 0.6, split="held_out"), comparison(0.5, 0.4, 0.6)])
    assert ". Over 5 seeds (95 % intervals), learned is 0.5 " in text
    assert " Held out, over 5 seeds (95 % intervals), learned is 0.5 " in text


def test_no_interval_claims_nothing() -> None:
    assert "no difference can be claimed" in said([comparison(0.5, None, None)])


def test_an_undefined_gap_says_why() -> None:
    text = said([comparison(0.1, 0.05, 0.2)], gaps={"train": gap(None, reason="the oracle is not above random")})
    assert "in training it is undefined (the oracle is not above random)" in text


def test_query_text_is_named() -> None:
    split = QueryText(
        with_queries=comparison(0.3, 0.2, 0.4, metric="reward", baseline="untrained"),
        without_queries=comparison(0.08, 0.05, 0.11, metric="reward_without_queries", baseline="untrained"),
        query_text=comparison(0.22, 0.1, 0.3, metric="query text", baseline="untrained"),
    )
    text = said([comparison(0.1, 0.05, 0.2)], query_text=split)
    assert (
        "With the queries in the reader's context the gain over untrained is 0.3 nats per value token, "
        "of which 0.22 (73 %) is query text; without the queries 0.08 (0.05 to 0.11) is left, which is order."
    ) in text
    nothing_left = QueryText(**{**split, "without_queries": comparison(0.0, -0.1, 0.1)})  # type: ignore[typeddict-item]
    assert "is left, which is not distinguishable from zero." in said([], query_text=nothing_left)
    unclear = QueryText(**{**split, "query_text": comparison(0.057, -0.01, 0.12, metric="query text", p_value=0.1)})  # type: ignore[typeddict-item]
    assert "and no part of it can be claimed to be query text (0.057 (-0.01 to 0.12))" in said([], query_text=unclear)
    one_seed = QueryText(**{**split, "with_queries": comparison(0.3, None, None, num_seeds=1)})  # type: ignore[typeddict-item]
    assert "is measured as 0.3 nats per value token, 0.22 of it query text." in said([], query_text=one_seed)
    no_gain = QueryText(**{**split, "with_queries": comparison(0.0, -0.1, 0.1)})  # type: ignore[typeddict-item]
    assert "is not distinguishable from zero (0 nats" in said([], query_text=no_gain)


def test_claims_are_a_family_by_holms_method() -> None:
    """Of p-values 0.04, 0.001, 0.02, 0.9 at 5 %: 0.001 <= 0.05/4, then 0.02 > 0.05/3, so one is claimed."""
    several = [comparison(0.1, 0.01, 0.2, p_value=p, baseline=f"b{p}") for p in (0.04, 0.001, 0.02, 0.9)]
    assert claims(several) == [False, True, False, False]
    assert claims(several[1:3]) == [True, True]  # 0.001 <= 0.05/2, then 0.02 <= 0.05
    assert all(claimable(c) for c in several[:3])
    assert "(0.1 nats per value token (0.01 to 0.2), which alone would be claimed, but not among this many)" in (
        said(several, noun="article")
    )


def test_comparisons_over_too_few_seeds_are_neither_claimed_nor_counted() -> None:
    few = comparison(0.1, 0.05, 0.2, p_value=1e-9, num_seeds=4)
    assert claims([few, comparison(0.1, 0.05, 0.2, p_value=0.04)]) == [False, True]
    assert claims([comparison(0.1, None, None, p_value=None)]) == [False]


def test_everything_a_verdict_could_claim_is_one_family() -> None:
    """p = 0.02 is claimed beside one other difference, and not beside a second."""
    first, second, third = (comparison(0.1, 0.01, 0.2, p_value=p, baseline=f"b{p}") for p in (0.02, 0.3, 0.4))
    says = Conclusion(comparisons=[first], claimed="It holds.", otherwise="It is open.")
    assert "It holds." in said([second], conclusions=[says])
    assert "It holds." in said([second, first], conclusions=[says])  # the same difference counts once
    assert "It is open." in said([second, third], conclusions=[says])
    below = comparison(-0.1, -0.2, -0.01, p_value=0.001)
    assert "It holds." not in said([], conclusions=[Conclusion(comparisons=[below], claimed="It holds.", otherwise="")])


@pytest.mark.parametrize(("mean", "relation"), [(-3.0, "beats"), (3.0, "trails")])
def test_less_of_a_regret_is_better(mean: float, relation: str) -> None:
    regret = comparison(mean, mean - 0.1, mean + 0.1, metric="regret", baseline="thompson", unit="reward")
    assert opening(regret, subject="it", claimed=True, lower_is_better=True) == (
        f"It {relation} thompson by 3 reward over 5 seeds."
    )
    assert verdict([regret], lower_is_better=("regret",)).startswith(f"Learned {relation} thompson by 3 reward")
