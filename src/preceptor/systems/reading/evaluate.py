"""What reading is worth on one article: every arm, with and without the policy's queries in the reader's context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from preceptor.evaluation.summary import percentile_among
from preceptor.systems.reading.classroom import Classroom
from preceptor.systems.reading.config import ReadingConfig
from preceptor.systems.reading.credit import value_rewards
from preceptor.systems.reading.decisions import decision_rows
from preceptor.systems.reading.episode import run_episodes
from preceptor.systems.reading.orders import (
    Control,
    OrderScores,
    beam_search,
    control_orders,
    local_search,
    probe_greedy,
    random_orders,
)
from preceptor.systems.reading.policy import Policy, Trajectories
from preceptor.systems.reading.reader import reader_rows

UNITS = {
    "order_gain": "nats/value token",
    "order_gain_with_queries": "nats/value token",
    "selection_gain": "nats/probe token",
    "progress_auc": "nats/probe token",
    "reward": "nats/value token",
    "random_percentile": "percent",
    "model_calls": "value scorings",
}
"""Metrics of an arm and their units; see ``docs/systems/reading.md`` for each definition."""

ORACLES = ("exhaustive", "local_search", "beam", "greedy")
MAX_BEST_OF = 2_000
"""Random orders of the best-of-N arm, at most."""

RECORDED_EPISODES = 8
"""Episodes of each sampled arm and article that go to decisions.jsonl."""


@dataclass(frozen=True)
class Evaluation:
    """Measurements of one article: a record an arm, and rows for decisions.jsonl."""

    records: tuple[dict[str, Any], ...]
    decisions: tuple[dict[str, Any], ...]


class GapMeter:
    """The share of the random-to-oracle gap that the policy closes now, on the first training articles.

    Random orders and oracle are found once, from a generator of the meter's own, so that a resumed run measures the
    same. Under a reader that learns there is no fixed gap, and the meter gives None.
    """

    def __init__(self, classroom: Classroom, config: ReadingConfig, *, seed: int, max_articles: int = 3) -> None:
        self._classroom = classroom
        self._config = config
        self._names = classroom.train[:max_articles] if config.reward.reader != "policy" else ()
        self._seed = seed
        self._references: dict[str, tuple[OrderScores, float, float]] = {}

    def measure(self, generators: dict[str, torch.Generator]) -> float | None:
        """Ratio of sums over articles; None without a gap."""
        gains, gaps = 0.0, 0.0
        for name in self._names:
            scores, random_value, oracle_value = self._reference(name)
            trajectories = run_episodes(
                self._classroom.policy,
                self._classroom.materials[name],
                self._classroom.keys[name],
                num_episodes=self._config.evaluation.num_episodes,
                budget=self._classroom.materials[name].reading.num_pairs,
                query_tokens=self._config.episode.query_tokens,
                generators=generators,
            )
            gains += _mean(scores.values(trajectories.order.tolist())) - random_value
            gaps += oracle_value - random_value
        return gains / gaps if gaps > 0 else None

    def _reference(self, name: str) -> tuple[OrderScores, float, float]:
        if name not in self._references:
            material = self._classroom.materials[name]
            scores = OrderScores(self._classroom.reader, self._classroom.reader.material(material))
            generator = torch.Generator().manual_seed(self._seed)
            orders = random_orders(material.reading.num_pairs, self._config.evaluation.num_orders, generator=generator)
            beam = beam_search(scores, width=self._config.evaluation.beam_width)
            oracle = local_search(scores, beam)
            self._references[name] = (scores, _mean(scores.values(orders)), scores.values([oracle])[0])
        return self._references[name]


def evaluate_article(
    classroom: Classroom,
    config: ReadingConfig,
    name: str,
    *,
    learned_calls: int,
    generators: dict[str, torch.Generator],
    first_episode: int,
) -> Evaluation:
    """Every arm on the article ``name``, all of whose pairs are read.

    The learned and the untrained policy read ``evaluation.num_episodes`` times by sampling; the controls have their own
    orders, in which the untrained policy writes the queries, so that "with queries" means the same for all.

    Args:
        classroom: teacher, student and article.
        config: of the run; its ``evaluation`` says how much is measured.
        name: of the article.
        learned_calls: value scorings that the learned arm's training cost.
        generators: the streams ``query``, ``selection`` and ``orders``.
        first_episode: number of the first recorded episode.
    """
    options = config.evaluation
    policy, untrained, reader = classroom.policy, classroom.untrained, classroom.reader
    material, keys = classroom.materials[name], classroom.keys[name]
    num_pairs, num_episodes = material.reading.num_pairs, options.num_episodes
    scores = OrderScores(reader, reader.material(material))
    controls = control_orders(
        scores,
        keys.vectors,
        num_orders=options.num_orders,
        best_of=options.best_of or min(max(learned_calls // num_pairs, 1), MAX_BEST_OF),
        beam_width=options.beam_width,
        generator=generators["orders"],
    )
    if material.probe:
        before = scores.num_calls
        order = probe_greedy(scores)
        controls["probe_greedy"] = Control((order,), scores.num_calls - before)

    def episodes(acting: Policy, count: int, orders: Sequence[Sequence[int]] | None = None) -> Trajectories:
        return run_episodes(
            acting,
            material,
            keys,
            num_episodes=count,
            budget=num_pairs,
            query_tokens=config.episode.query_tokens,
            generators=generators,
            orders=orders,
        )

    learned, before_training = episodes(policy, num_episodes), episodes(untrained, num_episodes)
    imposed = [(arm, order) for arm, control in controls.items() for order in control.orders[:num_episodes]]
    walked = episodes(untrained, len(imposed), [order for _, order in imposed])

    arms: dict[str, Control] = {
        "learned": Control(tuple(map(tuple, learned.order.tolist())), learned_calls),
        "untrained": Control(tuple(map(tuple, before_training.order.tolist())), 0),
        **controls,
    }
    with_queries = {
        "learned": value_rewards(reader.score(reader_rows(reader, learned, context="queries"))).total.tolist(),
        "untrained": value_rewards(
            reader.score(reader_rows(reader, before_training, context="queries"))
        ).total.tolist(),
    }
    for (arm, _), value in zip(
        imposed, value_rewards(reader.score(reader_rows(reader, walked, context="queries"))).total.tolist(), strict=True
    ):
        with_queries.setdefault(arm, []).append(value)

    budget = min(options.selection_budget or num_pairs // 2, num_pairs)
    random_values = scores.values(arms["random"].orders)
    values = {arm: _mean(scores.values(control.orders)) for arm, control in arms.items()}
    curves = {}
    if material.probe:
        for arm, control in arms.items():
            curves[arm] = torch.stack([scores.curve(order) for order in control.orders[:num_episodes]]).mean(0)
    records = []
    for arm, control in arms.items():
        record = {
            "arm": arm,
            "item": name,
            "split": "train" if name in classroom.train else "held_out",
            "seed": config.seed,
            "reward": values[arm],
            "order_gain": values[arm] - values["random"],
            "order_gain_with_queries": _mean(with_queries[arm]) - _mean(with_queries["random"]),
            "random_percentile": percentile_among(values[arm], random_values),
            "model_calls": float(control.num_calls),
        }
        if curves:
            record["selection_gain"] = float(curves[arm][budget] - curves["random"][budget])
            record["progress_auc"] = float(_area(curves[arm]) - _area(curves["random"]))
        records.append(record)

    decisions: list[dict[str, Any]] = []
    for arm, acting, trajectories in (("learned", policy, learned), ("untrained", untrained, before_training)):
        scored = reader.score(reader_rows(reader, trajectories, context="values", with_probe=bool(material.probe)))
        rewards = value_rewards(scored).total
        decisions += decision_rows(
            trajectories,
            scored,
            lm=acting.lm,
            step=config.update.steps,
            arm=arm,
            first_episode=first_episode + len(decisions),
            temperature=acting.temperature,
            rewards=rewards,
            normalised_rewards=rewards,
            passed=torch.ones(len(trajectories), dtype=torch.bool),
        )[:RECORDED_EPISODES]
    scored = reader.score(reader_rows(reader, walked, context="values", with_probe=bool(material.probe)))
    rewards = value_rewards(scored).total
    rows = decision_rows(
        walked,
        scored,
        lm=untrained.lm,
        step=config.update.steps,
        arm="",
        first_episode=first_episode + len(decisions),
        temperature=untrained.temperature,
        rewards=rewards,
        normalised_rewards=rewards,
        passed=torch.ones(len(walked), dtype=torch.bool),
        orders_imposed=True,
    )
    seen: dict[str, int] = {}
    for (arm, _), row in zip(imposed, rows, strict=True):
        seen[arm] = seen.get(arm, 0) + 1
        if seen[arm] <= RECORDED_EPISODES:
            decisions.append({**row, "arm": arm, "episode": first_episode + len(decisions)})
    return Evaluation(tuple(records), tuple(decisions))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _area(curve: torch.Tensor) -> float:
    """Mean height of the curve by the trapezoid rule, so that its unit is that of the curve."""
    return float(torch.trapezoid(curve) / (len(curve) - 1))
