"""How good a reading order is: the learned policy and every baseline on one article; results and recorded decisions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from preceptor.evaluation.summary import (
    SPLITS,
    Comparison,
    Gap,
    compare,
    gap_closed,
    percentile_among,
    query_text,
    summarise,
)
from preceptor.evaluation.verdict import verdict
from preceptor.systems.reading.articles import Kind, TokenSequence
from preceptor.systems.reading.baselines import (
    Baseline,
    OrderScores,
    baseline_orders,
    beam_search,
    local_search,
    random_orders,
)
from preceptor.systems.reading.environment import Trajectories, run_episodes
from preceptor.systems.reading.policy import Policy
from preceptor.systems.reading.rewards import SequenceScores, reader_sequences, value_rewards
from preceptor.systems.reading.setup import Setup

UNITS = {
    "order_gain": "nats/value token",
    "order_gain_with_queries": "nats/value token",
    "selection_gain": "nats/probe token",
    "progress_auc": "nats/probe token",
    "reward": "nats/value token",
    "random_percentile": "percent",
    "model_calls": "value scorings",
}
"""Metrics of a method and their units; see ``docs/systems/reading.md`` for each definition."""

TABLE = ("order_gain", "order_gain_with_queries", "selection_gain", "progress_auc", "random_percentile", "model_calls")
"""Metrics that the terminal shows; the page shows all."""

ORACLES = ("exhaustive", "local_search", "beam", "greedy")
NOT_MEASURED = {"mean": None, "low": None, "high": None, "n": 0, "reason": "no such articles were given"}

SUBJECT = "the learned order"
"""Who the verdict opens with."""

MAX_BEST_OF = 2_000
"""Random orders of the best-of-N baseline, at most."""

RECORDED_EPISODES = 8
"""Episodes of each method and article that go to decisions.jsonl."""


@dataclass(frozen=True)
class Evaluation:
    """Measurements of one article: one record per method, and rows for decisions.jsonl."""

    records: tuple[dict[str, Any], ...]
    decisions: tuple[dict[str, Any], ...]


def evaluate_article(
    setup: Setup, name: str, *, learned_calls: int, generators: Mapping[str, torch.Generator], first_episode: int
) -> Evaluation:
    """Every method on the article ``name``, all of whose pairs are read.

    The learned and the initial policy read ``evaluation.num_episodes`` times by sampling. The baselines have their own
    orders, in which the initial policy writes the queries, so that "with queries" means the same for all.

    Args:
        setup: policies, reader and article; its ``config.evaluation`` says how much is measured.
        name: of the article.
        learned_calls: value scorings that training the learned policy took.
        generators: the streams ``query``, ``selection`` and ``orders``.
        first_episode: number of the first recorded episode.
    """
    options, reader, article = setup.config.evaluation, setup.reader, setup.articles[name]
    scores = OrderScores(reader, reader.article(article))
    # By default best-of-N may ask the reader as often as training the policy did.
    baselines = baseline_orders(
        scores,
        setup.keys[name].vectors,
        num_orders=options.num_orders,
        best_of=options.best_of or min(max(learned_calls // article.num_pairs, 1), MAX_BEST_OF),
        beam_width=options.beam_width,
        generator=generators["orders"],
    )

    def episodes(policy: Policy, count: int, orders: Sequence[Sequence[int]] | None = None) -> Trajectories:
        return run_episodes(
            policy,
            article,
            setup.keys[name],
            num_episodes=count,
            budget=article.num_pairs,
            query_tokens=setup.config.episode.query_tokens,
            generators=generators,
            orders=orders,
            world=setup.run.world,
        )

    # Episodes of the learned policy, of the initial one, and of the initial one made to read the baselines' orders.
    num_episodes = options.num_episodes
    imposed = [(method, order) for method, each in baselines.items() for order in each.orders[:num_episodes]]
    groups: list[tuple[Sequence[str], Policy, Trajectories]] = [
        (["learned"] * num_episodes, setup.policy, episodes(setup.policy, num_episodes)),
        (["untrained"] * num_episodes, setup.initial_policy, episodes(setup.initial_policy, num_episodes)),
        (
            [method for method, _ in imposed],
            setup.initial_policy,
            episodes(setup.initial_policy, len(imposed), [order for _, order in imposed]),
        ),
    ]
    learned, initial = (tuple(map(tuple, trajectories.order.tolist())) for _, _, trajectories in groups[:2])
    methods = {"learned": Baseline(learned, learned_calls), "untrained": Baseline(initial, 0), **baselines}

    # What the orders are worth in a context that holds the queries, by method and episode.
    with_queries: dict[str, list[float]] = {}
    for names, _, trajectories in groups:
        rewards = value_rewards(reader.score(reader_sequences(reader, trajectories, context="queries"))).total
        for method, reward in zip(names, rewards.tolist(), strict=True):
            with_queries.setdefault(method, []).append(reward)
    records = _records(setup, scores, methods, with_queries)

    # The first episodes of each method, scored as the orders were: the values alone, then the probe.
    decisions: list[dict[str, Any]] = []
    # A method may have more episodes than are recorded.
    num_recorded: Counter[str] = Counter()
    for names, policy, trajectories in groups:
        sequences = reader_sequences(reader, trajectories, context="values", with_probe=bool(article.probe))
        sequence_scores = reader.score(sequences)
        rows = decision_rows(
            policy,
            trajectories,
            sequence_scores,
            value_rewards(sequence_scores).total,
            step=setup.config.update.steps,
            methods=names,
            order_imposed=trajectories is groups[-1][2],
        )
        for row in rows:
            num_recorded[row["arm"]] += 1
            if num_recorded[row["arm"]] <= RECORDED_EPISODES:
                decisions.append({**row, "episode": first_episode + len(decisions)})
    return Evaluation(tuple(records), tuple(decisions))


def _records(
    setup: Setup, scores: OrderScores, methods: Mapping[str, Baseline], with_queries: Mapping[str, Sequence[float]]
) -> list[dict[str, Any]]:
    """The metrics of each method on the article of ``scores``; gains are over the mean of the random orders."""
    options, article = setup.config.evaluation, scores.article
    # Exact repetitions cost nothing: each order is scored once.
    random_values = scores.values(methods["random"].orders)
    values = {method: _mean(scores.values(each.orders)) for method, each in methods.items()}
    curves = {}
    if article.probe:
        for method, each in methods.items():
            some = each.orders[: options.num_episodes]
            # [pairs + 1], the mean over orders.
            curves[method] = torch.stack([scores.curve(order) for order in some]).mean(0)  # after 0, 1, … pairs
    # The selection gain compares the probe after a part of the pairs: later all methods have read the same.
    budget = min(options.selection_budget or article.num_pairs // 2, article.num_pairs)
    records = []
    for method, each in methods.items():
        record = {
            "arm": method,
            "item": article.name,
            "split": "train" if article.name in setup.train else "held_out",
            "seed": setup.config.seed,
            "reward": values[method],
            "order_gain": values[method] - values["random"],
            "order_gain_with_queries": _mean(with_queries[method]) - _mean(with_queries["random"]),
            "random_percentile": percentile_among(values[method], random_values),
            "model_calls": float(each.num_calls),
        }
        if curves:  # an article without a probe has neither metric
            record["selection_gain"] = float(curves[method][budget] - curves["random"][budget])
            record["progress_auc"] = float(_area(curves[method]) - _area(curves["random"]))
        records.append(record)
    return records


def greedy_order(setup: Setup, name: str) -> list[int]:
    """The order in which the policy reads ``name`` when it takes the likeliest token and pair at every step."""
    unused = torch.Generator()  # nothing is drawn, and the run's own streams stay where they are
    article = setup.articles[name]
    trajectories = run_episodes(
        setup.policy,
        article,
        setup.keys[name],
        num_episodes=1,
        budget=article.num_pairs,
        query_tokens=setup.config.episode.query_tokens,
        generators={"query": unused},
        greedy=True,
    )
    order: list[int] = trajectories.order[0].tolist()
    return order


class GapMeter:
    """The share of the gap from random orders to the oracle that the policy closes now, on the first training articles.

    Random orders and oracle are computed once, from a generator of the meter's own, so that a resumed run measures the
    same. Under a reader that learns there is no fixed gap, and the meter gives None.
    """

    def __init__(self, setup: Setup, *, seed: int, max_articles: int = 3) -> None:
        self._setup = setup
        self._names = setup.train[:max_articles] if setup.config.reward.reader != "policy" else ()
        self._seed = seed
        self._references: dict[str, tuple[OrderScores, float, float]] = {}

    def measure(self, generators: Mapping[str, torch.Generator]) -> float | None:
        """Ratio of sums over articles; None without a gap."""
        setup, gains, gaps = self._setup, 0.0, 0.0
        for name in self._names:
            scores, random_value, oracle_value = self._reference(name)
            trajectories = run_episodes(
                setup.policy,
                setup.articles[name],
                setup.keys[name],
                num_episodes=setup.config.evaluation.num_episodes,
                budget=setup.articles[name].num_pairs,
                query_tokens=setup.config.episode.query_tokens,
                generators=generators,
                world=setup.run.world,
            )
            gains += _mean(scores.values(trajectories.order.tolist())) - random_value
            gaps += oracle_value - random_value
        # A ratio of sums: an article whose orders hardly differ weighs as little as its gap.
        return gains / gaps if gaps > 0 else None

    def _reference(self, name: str) -> tuple[OrderScores, float, float]:
        """Scores of the article's orders, the mean of random ones, and the value of the oracle's."""
        if name not in self._references:
            article, options = self._setup.articles[name], self._setup.config.evaluation
            scores = OrderScores(self._setup.reader, self._setup.reader.article(article))
            generator = torch.Generator().manual_seed(self._seed)
            orders = random_orders(article.num_pairs, options.num_orders, generator=generator)
            # Beam search finds a good order, local search improves it by moves; both ask the same cache.
            oracle = local_search(scores, beam_search(scores, options.beam_width))
            self._references[name] = (scores, _mean(scores.values(orders)), scores.values([oracle])[0])
        return self._references[name]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _area(curve: torch.Tensor) -> float:
    """Mean height of the curve by the trapezoid rule, in the curve's own unit."""
    return float(torch.trapezoid(curve) / (len(curve) - 1))


# ---- result.json -----------------------------------------------------------------------------------------------------


def result(records: Sequence[Mapping[str, Any]], *, config: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
    """The result of one run, or of several: metrics of each method with intervals, the gap closed, a verdict in words.

    Args:
        records: of every method, article and seed (:class:`Evaluation`).
        config: the resolved configuration.
        seeds: of the runs.
    """
    if config.get("episode", {}).get("pool") == "mixed":
        from preceptor.systems.reading.study.evaluate import result as study_result

        return study_result(records, config=config, seeds=seeds)
    splits = [split for split in SPLITS if any(record["split"] == split for record in records)]
    unit = UNITS["order_gain"]
    comparisons: list[Comparison] = []
    gaps: dict[str, Gap] = {}
    methods: dict[str, dict[str, Any]] = {}
    for split in splits:
        for baseline in ("random", "untrained"):
            comparisons.append(
                compare(records, metric="reward", arm="learned", baseline=baseline, unit=unit, split=split)
            )
        gaps[split] = gap_closed(records, metric="reward", upper=ORACLES, split=split)
        # The two splits share one table; held-out metrics carry a prefix.
        prefix = "held_out_" if split == "held_out" else ""
        for method, metrics in summarise(records, units=UNITS, split=split).items():
            methods.setdefault(method, {}).update({prefix + metric: value for metric, value in metrics.items()})
    # Query text is measured on the training articles, or on whatever split there is.
    text = query_text(
        records,
        with_queries="order_gain_with_queries",
        without_queries="order_gain",
        arm="learned",
        baseline="untrained",
        unit=unit,
        split=splits[0],
    )
    return {
        "system": "reading",
        "status": "finished",
        "config": config,
        "seeds": list(seeds),
        "arms": methods,
        "table": list(TABLE),
        "oracles": [method for method in methods if method.startswith((*ORACLES, "probe_greedy"))],
        "baseline": "random",
        "comparisons": comparisons,
        "gap_closed": {split: gaps.get(split) or NOT_MEASURED for split in SPLITS},
        "query_text": text,
        "subject": SUBJECT,
        "verdict": verdict(
            comparisons, lower_is_better=(), gaps=gaps, query_text=text, noun="article", subject=SUBJECT
        ),
        "records": list(records),
    }


# ---- rows of decisions.jsonl ----------------------------------------------------------------------------------------


def decision_rows(
    policy: Policy,
    trajectories: Trajectories,
    scores: Sequence[SequenceScores],
    rewards: Float[Tensor, " batch"],
    *,
    step: int,
    methods: Sequence[str],
    first_episode: int = 0,
    normalised_rewards: Float[Tensor, " batch"] | None = None,
    kept_mask: Bool[Tensor, " batch"] | None = None,
    reference_scores: Sequence[SequenceScores] | None = None,
    order_imposed: bool = False,
) -> list[dict[str, Any]]:
    """One row per episode.

    Args:
        policy: wrote the queries.
        trajectories: its actions.
        scores: the reader's, of the same episodes, in the reward's context.
        rewards: before normalisation, nats per token.
        step: the update; after training, the last one.
        methods: of each episode, the method that acted ("learned", a baseline, …).
        first_episode: number of the first of these episodes in the run.
        normalised_rewards: after normalisation; None where there is none.
        kept_mask: True = kept by the filter; None keeps all.
        reference_scores: of the same spans, where normalisation subtracts them.
        order_imposed: True = the order was given and the policy wrote queries only.
    """
    normalised_rewards = rewards if normalised_rewards is None else normalised_rewards
    kept_mask = torch.ones(len(trajectories), dtype=torch.bool) if kept_mask is None else kept_mask
    rows = []
    for index, sequence in enumerate(trajectories.policy_sequences()):
        # The names of these keys are part of the run folder's format.
        row = {
            "step": step,
            "episode": first_episode + index,
            "arm": methods[index],
            "article": trajectories.article.name,
            "policy_token_ids": list(sequence.tokens),
            "policy_spans": _span_rows(sequence, ["query"], sampled_log_probs=trajectories.query_log_probs[index]),
            "texts": [policy.lm.decode(sequence.tokens[span.start : span.end]) for span in sequence.spans],
            "reader_token_ids": list(scores[index].sequence.tokens),
            "reader_spans": _span_rows(
                scores[index].sequence,
                ["value", "probe"],
                log_probs=scores[index].log_probs,
                reference_log_probs=reference_scores[index].log_probs if reference_scores else (),
            ),
            "temperature": policy.temperature,
            "order_imposed": order_imposed,
            "selection_probabilities": trajectories.selection_log_probs[index].double().exp().tolist(),
            "reward": float(rewards[index]),
            "normalised_reward": float(normalised_rewards[index]),
            "passed": bool(kept_mask[index]),
        }
        # Needed to recompute the reward where normalisation subtracts the score after these queries.
        if trajectories.initial_queries is not None:
            row["reference_query_token_ids"] = trajectories.initial_queries[index].tolist()
        rows.append(row)
    return rows


def _span_rows(
    sequence: TokenSequence, kinds: Sequence[Kind], **columns: Iterable[Float[Tensor, " token"]]
) -> list[dict[str, Any]]:
    """One row per span; the numbers of each column go, in order, to the spans of these kinds."""
    rows: list[dict[str, Any]] = [
        {"kind": span.kind, "start": span.start, "end": span.end, "pair": None if span.pair < 0 else span.pair}
        for span in sequence.spans
    ]
    for name, tensors in columns.items():
        # A column without numbers (there is no reference) leaves its key out.
        for row, numbers in zip((row for row in rows if row["kind"] in kinds), tensors, strict=False):
            row[name] = numbers.double().tolist()
    return rows
