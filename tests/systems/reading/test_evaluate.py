"""Every metric of every arm, against the bare model: one pass per order and prefix, and plain arithmetic."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from preceptor.config import load_config
from preceptor.runs.world import ALONE
from preceptor.systems.reading.baselines import random_orders
from preceptor.systems.reading.config import ReadingConfig
from preceptor.systems.reading.environment import Trajectories, run_episodes
from preceptor.systems.reading.evaluate import (
    MAX_BEST_OF,
    RECORDED_EPISODES,
    UNITS,
    Evaluation,
    GapMeter,
    evaluate_article,
    greedy_order,
    result,
)
from preceptor.systems.reading.rewards import LanguageModelReader
from preceptor.systems.reading.setup import Setup
from tests.systems.reading.planted import (
    best_order_value,
    order_value,
    planted_config,
    planted_cost,
    planted_run,
    planted_setup,
)
from tests.systems.reading.small import BEES, language_model, perturb, policies

NUM_EPISODES = 10
OVERRIDES = (
    f"evaluation.num_episodes={NUM_EPISODES}", "evaluation.num_orders=12", "evaluation.beam_width=2",
    "episode.query_tokens=2", "update.steps=3", "seed=4",
)  # fmt: skip


def streams() -> dict[str, torch.Generator]:
    return {name: torch.Generator().manual_seed(7 + n) for n, name in enumerate(("query", "selection", "orders"))}


class Measured:
    """One evaluation of a small article, with everything needed to compute it again."""

    def __init__(self) -> None:
        self.policy, self.untrained, self.article, self.keys = policies(language_model())
        perturb(self.policy, scale=0.2)
        self.lm = self.untrained.lm
        reader = LanguageModelReader(self.lm)
        self.setup = Setup(
            config=load_config(ReadingConfig, overrides=OVERRIDES),
            run=cast(Any, SimpleNamespace(world=ALONE)),  # nothing is drawn from its streams or recorded in it
            policy=self.policy,
            initial_policy=self.untrained,
            reader=reader,
            initial_reader=reader,
            articles={"bees": self.article},
            keys={"bees": self.keys},
            train=("bees",),
        )
        self.evaluation: Evaluation = evaluate_article(
            self.setup, "bees", learned_calls=60, generators=streams(), first_episode=100
        )
        self.arms = {record["arm"]: record for record in self.evaluation.records}
        # The same episodes again: the learned policy acts first, then the untrained one, from the same streams.
        generators = streams()
        settings: dict[str, Any] = {
            "num_episodes": NUM_EPISODES,
            "budget": 5,
            "query_tokens": 2,
            "generators": generators,
        }
        self.learned = run_episodes(self.policy, self.article, self.keys, **settings)
        self.before = run_episodes(self.untrained, self.article, self.keys, **settings)
        self.random = random_orders(5, 12, generator=generators["orders"])
        self._means: dict[tuple[Any, ...], float] = {}

    def mean_log_prob(self, tokens: list[int], scored: list[int]) -> float:
        key = (tuple(tokens), tuple(scored))
        if key not in self._means:
            with torch.no_grad():
                log_probs = self.lm.model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
            self._means[key] = sum(float(log_probs[at - 1, tokens[at]]) for at in scored) / len(scored)
        return self._means[key]

    def values_alone(self, order: Any) -> float:
        tokens = [self.lm.begin_token, *(token for pair in order for token in self.article.values[pair])]
        return self.mean_log_prob(tokens, list(range(1, len(tokens))))

    def values_after_queries(self, trajectories: Trajectories, episode: int) -> float:
        tokens, scored = list(self.article.prompt), []
        for query, pair in zip(
            trajectories.queries[episode].tolist(), trajectories.order[episode].tolist(), strict=True
        ):
            tokens += query
            scored += range(len(tokens), len(tokens) + len(self.article.values[pair]))
            tokens += self.article.values[pair]
        return self.mean_log_prob(tokens, scored)

    def curve(self, order: Any) -> list[float]:
        heights = []
        for read in range(len(order) + 1):
            before = [self.lm.begin_token, *(token for pair in order[:read] for token in self.article.values[pair])]
            tokens = [*before, *self.article.probe]
            heights.append(self.mean_log_prob(tokens, list(range(len(before), len(tokens)))))
        return heights


@pytest.fixture(scope="module")
def measured() -> Measured:
    return Measured()


def mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


ORDERS = {
    "document": (0, 1, 2, 3, 4),
    "reverse": (4, 3, 2, 1, 0),
}


def test_every_arm_is_there_with_every_metric(measured: Measured) -> None:
    assert set(measured.arms) == {
        "learned", "untrained", "random", "document", "reverse", "nearest_chain", "farthest_first", "mmr",
        "easy_to_hard", "hard_to_easy", "best_of_n", "greedy", "beam", "local_search", "exhaustive", "probe_greedy",
    }  # fmt: skip
    for record in measured.arms.values():
        assert set(record) == {"arm", "item", "split", "seed", *UNITS}
        assert (record["item"], record["split"], record["seed"]) == ("bees", "train", 4)


def test_order_gain_is_over_the_mean_of_the_random_orders(measured: Measured) -> None:
    floor = mean(map(measured.values_alone, measured.random))
    assert measured.arms["random"]["reward"] == pytest.approx(floor, abs=1e-5)
    assert measured.arms["random"]["order_gain"] == 0.0
    for arm, order in ORDERS.items():
        assert measured.arms[arm]["order_gain"] == pytest.approx(measured.values_alone(order) - floor, abs=1e-5)
    for arm, trajectories in (("learned", measured.learned), ("untrained", measured.before)):
        expected = mean(map(measured.values_alone, trajectories.order.tolist()))
        assert measured.arms[arm]["reward"] == pytest.approx(expected, abs=1e-5)
        assert measured.arms[arm]["order_gain"] == pytest.approx(expected - floor, abs=1e-5)
    best = max(map(measured.values_alone, itertools.permutations(range(5))))
    assert measured.arms["exhaustive"]["reward"] == pytest.approx(best, abs=1e-5)


def test_the_percentile_counts_random_orders_that_are_worse(measured: Measured) -> None:
    values = [measured.values_alone(order) for order in measured.random]
    for arm, order in ORDERS.items():
        own = measured.values_alone(order)
        worse = sum(value < own - 1e-6 for value in values)
        tied = sum(abs(value - own) <= 1e-6 for value in values)
        assert measured.arms[arm]["random_percentile"] == pytest.approx(100 * (worse + tied / 2) / 12)
    assert measured.arms["exhaustive"]["random_percentile"] >= 95


def test_with_queries_each_sampled_arm_has_its_own(measured: Measured) -> None:
    """Learned against untrained, from which the unknown mean of the random arm's queries drops out."""
    expected = mean(measured.values_after_queries(measured.learned, e) for e in range(NUM_EPISODES)) - mean(
        measured.values_after_queries(measured.before, e) for e in range(NUM_EPISODES)
    )
    found = measured.arms["learned"]["order_gain_with_queries"] - measured.arms["untrained"]["order_gain_with_queries"]
    assert found == pytest.approx(expected, abs=1e-5)
    assert measured.arms["random"]["order_gain_with_queries"] == 0.0
    assert abs(found - measured.arms["learned"]["order_gain"] + measured.arms["untrained"]["order_gain"]) > 1e-3


def test_with_queries_a_control_is_read_with_the_untrained_policys(measured: Measured) -> None:
    """The recorded rows hold the very tokens, so the number can be had from them."""
    rewards: dict[str, list[float]] = {}
    for row in measured.evaluation.decisions:
        if row["order_imposed"]:
            tokens = row["policy_token_ids"]
            scored = [
                at
                for span in row["policy_spans"]
                if span["kind"] == "value"
                for at in range(span["start"], span["end"])
            ]
            rewards.setdefault(row["arm"], []).append(measured.mean_log_prob(tokens, scored))
    for arm in ("document", "greedy", "hard_to_easy"):
        assert len(rewards[arm]) == 1
    difference = (
        measured.arms["document"]["order_gain_with_queries"] - measured.arms["greedy"]["order_gain_with_queries"]
    )
    assert difference == pytest.approx(rewards["document"][0] - rewards["greedy"][0], abs=1e-5)


def test_selection_gain_and_auc_come_from_the_probe_curve(measured: Measured) -> None:
    def mean_curve(orders: Any) -> list[float]:
        return [mean(heights) for heights in zip(*map(measured.curve, orders), strict=True)]

    def area(curve: list[float]) -> float:
        return sum((low + high) / 2 for low, high in itertools.pairwise(curve)) / 5

    floor = mean_curve(measured.random[:NUM_EPISODES])
    cases = {
        "learned": measured.learned.order.tolist(),
        "document": [ORDERS["document"]],
        "reverse": [ORDERS["reverse"]],
    }
    for arm, orders in cases.items():
        curve = mean_curve(orders)
        assert curve[0] == pytest.approx(floor[0])  # nothing is read yet
        assert measured.arms[arm]["selection_gain"] == pytest.approx(curve[2] - floor[2], abs=1e-5)  # 5 // 2 pairs
        assert measured.arms[arm]["progress_auc"] == pytest.approx(area(curve) - area(floor), abs=1e-5)
    assert measured.arms["random"]["selection_gain"] == 0.0
    assert measured.arms["random"]["progress_auc"] == 0.0


def test_costs(measured: Measured) -> None:
    calls = {arm: record["model_calls"] for arm, record in measured.arms.items()}
    assert calls["learned"] == 60
    assert calls["untrained"] == calls["random"] == calls["document"] == 0
    assert calls["best_of_n"] == 60  # twelve orders of five: as many value scorings as the learned arm had
    assert calls["probe_greedy"] == 15
    assert MAX_BEST_OF == 2_000


def test_what_is_recorded(measured: Measured) -> None:
    rows = measured.evaluation.decisions
    assert [row["episode"] for row in rows] == list(range(100, 100 + len(rows)))
    count = {arm: sum(row["arm"] == arm for row in rows) for arm in measured.arms}
    assert count["learned"] == count["untrained"] == count["random"] == RECORDED_EPISODES == 8
    assert all(count[arm] == 1 for arm in set(measured.arms) - {"learned", "untrained", "random"})
    for row in rows:
        order = [span["pair"] for span in row["policy_spans"] if span["kind"] == "value"]
        assert row["order_imposed"] == (row["arm"] not in ("learned", "untrained"))
        assert row["reward"] == pytest.approx(measured.values_alone(order), abs=1e-5)
        assert row["reader_spans"][-1]["kind"] == "probe"
        assert row["step"] == 3
        if row["arm"] in ORDERS:
            assert tuple(order) == ORDERS[row["arm"]]


def test_without_a_probe_there_is_neither_selection_gain_nor_auc(tmp_path: Path) -> None:
    config = planted_config("evaluation.num_orders=5", "evaluation.num_episodes=3")
    with planted_run(tmp_path / "run", config) as run:
        setup = planted_setup(config, run)
        evaluation = evaluate_article(setup, "planted", learned_calls=0, generators=streams(), first_episode=0)
    for record in evaluation.records:
        assert not {"selection_gain", "progress_auc"} & set(record)
        assert record["arm"] != "probe_greedy"


# ---- the gap on the way ----------------------------------------------------------------------------------------------


def test_the_gap_meter_by_hand(tmp_path: Path) -> None:
    config = planted_config("evaluation.num_orders=50", "evaluation.num_episodes=20")
    with planted_run(tmp_path / "run", config) as run:
        setup = planted_setup(config, run)
        article, cost = setup.articles["planted"], planted_cost(config.seed)
        meter = GapMeter(setup, seed=9)
        found = [meter.measure(streams()) for _ in range(2)]
        assert found[0] == found[1]  # the same streams, the same measurement: nothing is drawn anew
        trajectories = run_episodes(
            setup.policy,
            article,
            setup.keys["planted"],
            num_episodes=20,
            budget=4,
            query_tokens=2,
            generators=streams(),
        )
        own = mean(order_value(article, cost, order) for order in trajectories.order.tolist())
        orders = random_orders(4, 50, generator=torch.Generator().manual_seed(9))
        floor = mean(order_value(article, cost, order) for order in orders)
        # With four pairs a beam of eight and local search find the optimum.
        expected = (own - floor) / (best_order_value(article, cost) - floor)
        assert found[0] == pytest.approx(expected, abs=1e-5)


def test_a_reader_that_learns_has_no_fixed_gap(tmp_path: Path) -> None:
    config = planted_config("reward.reader=policy")
    with planted_run(tmp_path / "run", config) as run:
        assert GapMeter(planted_setup(config, run), seed=9).measure(streams()) is None


# ---- the order that a run hands out ----------------------------------------------------------------------------------


def test_the_greedy_order_is_the_likeliest_choice_after_the_likeliest_query(measured: Measured) -> None:
    """Token by token and pair by pair with the bare model; nothing is drawn."""
    policy, lm, tokens, remaining = measured.policy, measured.policy.lm, list(measured.article.prompt), list(range(5))
    expected = []
    while remaining:
        start = len(tokens)
        for _ in range(2):
            with torch.no_grad():
                logits = lm.model(input_ids=torch.tensor([tokens])).logits[0, -1]
            logits[list(lm.special_tokens)] = -torch.inf
            tokens.append(int(logits.argmax()))
        with torch.no_grad():
            states = lm.model(input_ids=torch.tensor([tokens]), output_hidden_states=True).hidden_states[-2][0, start:]
            vector = policy.projection(states.mean(0) - measured.keys.centre)  # type: ignore[misc]
        pair = max(remaining, key=lambda pair: float(measured.keys.vectors[pair] @ vector))
        remaining.remove(pair)
        expected.append(pair)
        tokens += measured.article.values[pair]
    assert greedy_order(measured.setup, "bees") == expected
    assert greedy_order(measured.setup, "bees") == expected
    assert expected != sorted(expected)


def test_the_reading_has_what_these_tests_take_for_granted() -> None:
    assert BEES.num_pairs == 5
    assert BEES.probe


# ---- result.json -----------------------------------------------------------------------------------------------------


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
    found = result([*RECORDS, *HELD_OUT], config={}, seeds=[0])
    # (0.6 + 0.2) / (1.2 + 0.8)
    gap = found["gap_closed"]["train"]
    assert gap["mean"] == pytest.approx(0.4)
    assert "lower bound" in gap["oracle"]
    assert found["gap_closed"]["held_out"]["mean"] == pytest.approx(0.1)


def test_an_exhaustive_optimum_is_called_one() -> None:
    records = [*RECORDS[:5], record("exhaustive", -3.5)]
    gap = result(records, config={}, seeds=[0])["gap_closed"]["train"]
    assert gap["mean"] == pytest.approx(0.6 / 1.5)
    assert "optimum" in gap["oracle"]
    assert "bound" not in gap["oracle"]


def test_arms_have_means_units_and_counts_and_held_out_metrics_a_prefix() -> None:
    found = result([*RECORDS, *HELD_OUT], config={"seed": 0}, seeds=[0])
    learned = found["arms"]["learned"]
    assert learned["reward"]["mean"] == pytest.approx((-4.4 - 5.8) / 2)
    assert (learned["reward"]["n"], learned["reward"]["unit"]) == (2, "nats/value token")
    assert learned["held_out_reward"]["mean"] == pytest.approx(-6.9)
    assert learned["held_out_reward"]["n"] == 1
    assert learned["model_calls"]["mean"] == 80.0
    assert "held_out_reward" not in found["arms"]["local_search"]
    assert (found["system"], found["status"], found["config"], found["seeds"]) == (
        "reading", "finished", {"seed": 0}, [0],
    )  # fmt: skip


def test_comparisons_and_query_text() -> None:
    found = result([*RECORDS, *HELD_OUT], config={}, seeds=[0])
    means = {(c["split"], c["baseline"]): c["mean"] for c in found["comparisons"] if c["metric"] == "reward"}
    assert means["train", "random"] == pytest.approx(0.4)
    assert means["train", "untrained"] == pytest.approx((0.5 + 0.2) / 2)
    assert means["held_out", "random"] == pytest.approx(0.1)
    # learned − untrained is the same with and without queries, so none of it is query text
    assert found["query_text"]["query_text"]["mean"] == pytest.approx(0.0, abs=1e-9)
    assert found["query_text"]["with_queries"]["mean"] == pytest.approx(0.35)


def test_without_held_out_articles_the_result_says_so() -> None:
    found = result(RECORDS, config={}, seeds=[0])
    assert found["gap_closed"]["held_out"]["mean"] is None
    assert "no such articles" in found["gap_closed"]["held_out"]["reason"]
    assert "no difference can be claimed" in found["verdict"]  # one seed is not enough
    json.dumps(found, allow_nan=False)
