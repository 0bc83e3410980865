from __future__ import annotations

import math
from typing import Any

import pytest

from preceptor.systems.bandit.result import result, word_scores

SCORES = {"bean": 1.0, "chickpea": -4.0, "lentil": 2.5, "rice": 0.5}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def crossing(arm: str, seed: int, scores: dict[str, float], **changes: float) -> list[dict[str, Any]]:
    """Records of the four pairs in which every word carries its score."""
    return [
        {
            "arm": arm, "item": f"{a} / {b}", "split": "train", "seed": seed,
            "first_word": sigmoid(scores[a] - scores[b]),
            "first_word_named_first": 0.5, "first_word_named_second": 0.5, "template_spread": 0.1,
            "value": 0.0, "winner": 1.0, "prompt": 0.0, **changes,
        }
        for a in ("bean", "chickpea") for b in ("lentil", "rice")
    ]  # fmt: skip


def own(arm: str, seed: int, best: float) -> list[dict[str, Any]]:
    return [
        {"arm": arm, "item": item, "split": "train", "seed": seed, "best_word": best, "reward": reward, "regret": 1.0}
        for item, reward in (("bean/chickpea", 7.0), ("lentil/rice", 0.7))
    ]


def records(num_seeds: int) -> list[dict[str, Any]]:
    return [
        record
        for seed in range(num_seeds)
        for record in (
            *own("learned", seed, 0.99 - seed / 1000), *crossing("learned", seed, SCORES),
            *own("pretrained", seed, 0.5), *crossing("pretrained", seed, dict.fromkeys(SCORES, 0.0)),
        )
    ]  # fmt: skip


def test_scores_of_words_are_recovered() -> None:
    scores = word_scores(records(3))
    for word, score in SCORES.items():
        assert scores["learned"][word]["mean"] == pytest.approx(score)  # they sum to 0 as given
    assert scores["learned"]["explained"]["mean"] == pytest.approx(1.0)
    assert scores["pretrained"]["bean"]["mean"] == pytest.approx(0.0, abs=1e-9)


def test_what_no_score_explains_is_not_explained() -> None:
    """Log-odds +1, -1, -1, +1 over the square of pairs are orthogonal to every difference of scores."""
    square = [
        {"arm": "learned", "item": item, "split": "train", "seed": 0, "first_word": sigmoid(odds)}
        for item, odds in (("a / c", 1.0), ("a / d", -1.0), ("b / c", -1.0), ("b / d", 1.0))
    ]
    assert word_scores(square)["learned"]["explained"]["mean"] == pytest.approx(0.0, abs=1e-9)


def test_several_runs_are_merged_and_a_claim_needs_seeds() -> None:
    merged = result(records(10), config={}, seeds=range(10))
    (comparison,) = [c for c in merged["comparisons"] if c["metric"] == "best_word"]
    assert comparison["num_seeds"] == 10
    assert comparison["mean"] == pytest.approx(0.99 - 0.0045 - 0.5)
    assert "learned is 0.486 probability above pretrained in best word" in merged["verdict"]
    assert "winner 100 % (100 to 100)" in merged["verdict"]
    assert "winner explains most" in merged["verdict"]
    assert "lentil +2.5, bean +1.0, rice +0.5, chickpea -4.0 nats" in merged["verdict"]
    # Five seeds of equal signs are too few: both differences of "winner" have p = 0.06.
    assert "explains most" not in result(records(5), config={}, seeds=range(5))["verdict"]
    few = result(records(2), config={}, seeds=range(2))
    assert "no difference can be claimed" in few["verdict"]


def test_bandits_are_averaged_within_a_seed_so_that_intervals_are_over_seeds() -> None:
    reward = result(records(4), config={}, seeds=range(4))["arms"]["learned"]["reward"]
    paired = result(records(4), config={}, seeds=range(4))["paired_records"]
    assert [r["reward"] for r in paired if r["arm"] == "learned"] == [pytest.approx(3.85)] * 4
    assert (reward["mean"], reward["low"], reward["high"], reward["n"]) == (pytest.approx(3.85), 3.85, 3.85, 4)
