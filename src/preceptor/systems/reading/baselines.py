"""Baselines: reading orders that no policy learned, each with the number of reward evaluations that finding it took.

The cost is counted in *value scorings*: evaluations of one value in one context by the reader. The learned policy's own
cost is the number of values that it read during training.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from preceptor.systems.reading.articles import TokenizedArticle
from preceptor.systems.reading.rewards import Reader, probe_curve

Order = tuple[int, ...]

EXHAUSTIVE_LIMIT = 7
"""Pairs up to which every order is scored (7! = 5,040)."""


class OrderScores:
    """Scores of orders under one reader, values alone in the context, each computed once.

    ``num_calls`` counts the value scorings that were asked for.
    """

    def __init__(self, reader: Reader, article: TokenizedArticle) -> None:
        self.reader = reader
        self.article = article
        self.num_calls = 0
        self._values: dict[Order, float] = {}
        self._curves: dict[Order, Tensor] = {}

    def values(self, orders: Iterable[Sequence[int]]) -> list[float]:
        """Mean log-probability in nats per value token of each order (a prefix of an order is fine)."""
        keys = [tuple(order) for order in orders]
        # Asked for, computed or not: a baseline pays the same whichever ran before it.
        self.num_calls += sum(map(len, keys))
        missing = [key for key in dict.fromkeys(keys) if key not in self._values]
        scores = self.reader.score([self.article.reader_sequence(key) for key in missing])
        for key, each in zip(missing, scores, strict=True):
            self._values[key] = float(torch.cat(list(each.log_probs)).double().mean())
        return [self._values[key] for key in keys]

    def totals(self, orders: Iterable[Sequence[int]]) -> list[float]:
        """Summed log-probability in nats of each order or prefix; comparable between prefixes of one length."""
        keys = [tuple(order) for order in orders]
        lengths = [sum(len(self.article.values[pair]) for pair in key) for key in keys]
        return [value * length for value, length in zip(self.values(keys), lengths, strict=True)]

    def curve(self, order: Sequence[int]) -> Float[Tensor, " read"]:
        """Mean log-probability in nats per probe token after 0, 1, … pairs of ``order``."""
        key = tuple(order)
        if key not in self._curves:
            self._curves[key] = probe_curve(self.reader, self.article, key)
        self.num_calls += len(key) + 1
        return self._curves[key]


@dataclass(frozen=True)
class Baseline:
    """Orders of one method and the value scorings that finding them took."""

    orders: tuple[Order, ...]
    num_calls: int


def baseline_orders(
    scores: OrderScores,
    key_vectors: Float[Tensor, "pairs dimension"],
    *,
    num_orders: int,
    best_of: int,
    beam_width: int,
    generator: torch.Generator,
) -> dict[str, Baseline]:
    """Every baseline of one article: those without a model first, then those that ask the reader, then the oracles.

    Args:
        scores: of the reader that gives the reward.
        key_vectors: of the article's keys, for the methods that follow similarity.
        num_orders: random orders.
        best_of: random orders of which the best is kept.
        beam_width: of the beam oracle.
        generator: draws the random orders.
    """
    num_pairs = scores.article.num_pairs
    document = tuple(range(num_pairs))
    unit_vectors = torch.nn.functional.normalize(key_vectors.double().cpu(), dim=-1)
    similarity = unit_vectors @ unit_vectors.T  # cosine, pairs pairs
    # Orders that need no reward at all.
    baselines = {
        "random": Baseline(tuple(random_orders(num_pairs, num_orders, generator=generator)), 0),
        "document": Baseline((document,), 0),
        "reverse": Baseline((document[::-1],), 0),
        "nearest_chain": Baseline((nearest_chain(similarity),), 0),
        "farthest_first": Baseline((farthest_first(similarity),), 0),
        "mmr": Baseline((maximal_marginal_relevance(similarity),), 0),
    }

    def search(find: Callable[..., Order], *args: Any, num_calls: int = 0) -> Baseline:
        before = scores.num_calls
        order = find(scores, *args)
        return Baseline((order,), num_calls + scores.num_calls - before)

    # Searches that a user could afford: they ask the reader, and what they ask is counted.
    easy = search(easy_to_hard)
    candidates = random_orders(num_pairs, best_of, generator=generator)
    baselines |= {
        "easy_to_hard": easy,
        "hard_to_easy": Baseline((easy.orders[0][::-1],), easy.num_calls),
        "best_of_n": search(best_order, candidates),
    }
    # Oracles: they maximise the very reward that is reported, and bound what can be reached.
    greedy, beam = search(beam_search, 1), search(beam_search, beam_width)
    baselines |= {
        "greedy": greedy,
        "beam": beam,
        # It starts from the beam's order, which it has to pay for too.
        "local_search": search(local_search, beam.orders[0], num_calls=beam.num_calls),
    }
    if num_pairs <= EXHAUSTIVE_LIMIT:
        baselines["exhaustive"] = search(best_order, itertools.permutations(range(num_pairs)))
    if scores.article.probe:
        baselines["probe_greedy"] = search(probe_greedy)
    return baselines


def random_orders(num_pairs: int, count: int, *, generator: torch.Generator) -> list[Order]:
    """Independent uniform orders."""
    return [tuple(torch.randperm(num_pairs, generator=generator).tolist()) for _ in range(count)]


def nearest_chain(similarity: Float[Tensor, "pairs pairs"]) -> Order:
    """From the first pair, always to the most similar unread key (In-Context Pretraining, arXiv 2310.10638)."""
    return _grow(lambda read: similarity[read[-1]], 0, len(similarity))


def farthest_first(similarity: Float[Tensor, "pairs pairs"]) -> Order:
    """From the first pair, always to the key whose most similar read key is least similar (k-centre traversal)."""
    return _grow(lambda read: -similarity[:, read].amax(1), 0, len(similarity))


def maximal_marginal_relevance(similarity: Float[Tensor, "pairs pairs"], *, relevance_weight: float = 0.5) -> Order:
    """Maximal marginal relevance (Carbonell and Goldstein 1998); relevance is mean similarity to the whole article."""
    relevance = relevance_weight * similarity.mean(1)
    redundancy = (1 - relevance_weight) * similarity  # of each pair to each other one
    return _grow(lambda read: relevance - redundancy[:, read].amax(1), int(relevance.argmax()), len(similarity))


def _grow(score: Callable[[list[int]], Float[Tensor, " pairs"]], first: int, num_pairs: int) -> Order:
    """The order that starts with ``first`` and goes on with the unread pair of the highest ``score(pairs read)``."""
    order = [first]
    while len(order) < num_pairs:
        # What is read gets −inf; among equals argmax takes the earliest pair.
        scores = score(order).index_fill(0, torch.tensor(order), -torch.inf)
        order.append(int(scores.argmax()))
    return tuple(order)


def easy_to_hard(scores: OrderScores) -> Order:
    """Values sorted by their log-probability per token when read alone, highest first."""
    alone = scores.values((pair,) for pair in range(scores.article.num_pairs))
    return tuple(sorted(range(len(alone)), key=alone.__getitem__, reverse=True))


def best_order(scores: OrderScores, orders: Iterable[Sequence[int]]) -> Order:
    """The best of ``orders`` (the first among equals)."""
    candidates = [tuple(order) for order in orders]
    values = scores.values(candidates)
    return candidates[max(range(len(candidates)), key=values.__getitem__)]


def beam_search(scores: OrderScores, width: int) -> Order:
    """The best order found by keeping the ``width`` best prefixes; width 1 is greedy.

    A prefix is ranked by the summed log-probability of its values minus that of the same values alone, since prefixes
    of one length hold different values, some of them hard wherever they stand.
    """
    num_pairs = scores.article.num_pairs
    # Totals and not means: prefixes that are compared have different numbers of tokens.
    alone = scores.totals((pair,) for pair in range(num_pairs))
    beams: list[Order] = [()]
    for _ in range(num_pairs):
        # Every beam grown by every pair that it has not read; the gain of a prefix is over its values alone.
        candidates = [(*beam, pair) for beam in beams for pair in range(num_pairs) if pair not in beam]
        gains = [
            total - sum(alone[pair] for pair in candidate)
            for candidate, total in zip(candidates, scores.totals(candidates), strict=True)
        ]
        ranked = sorted(range(len(candidates)), key=gains.__getitem__, reverse=True)
        beams = [candidates[index] for index in ranked[:width]]
    return beams[0]


def local_search(scores: OrderScores, start: Order, *, max_rounds: int = 20) -> Order:
    """The order reached from ``start`` by always taking the best swap or move of pairs until none improves it."""
    best = start
    for _ in range(max_rounds):
        candidate = best_order(scores, [best, *_neighbours(best)])
        if candidate == best:
            break
        best = candidate
    return best


def _neighbours(order: Order) -> list[Order]:
    """Every order that is one move or one swap away, without duplicates."""
    neighbours = []
    for first, second in itertools.permutations(range(len(order)), 2):  # places in the order, not pairs
        moved = list(order)
        moved.insert(second, moved.pop(first))
        neighbours.append(tuple(moved))
        if first < second:
            swapped = list(order)
            swapped[first], swapped[second] = swapped[second], swapped[first]
            neighbours.append(tuple(swapped))
    return list(dict.fromkeys(neighbours))


def probe_greedy(scores: OrderScores) -> Order:
    """An oracle for the probe: always the pair after which the probe's log-probability is highest."""
    num_pairs = scores.article.num_pairs
    order: Order = ()
    while len(order) < num_pairs:
        rest = [pair for pair in range(num_pairs) if pair not in order]
        sequences = [scores.article.reader_sequence((*order, pair), with_probe=True) for pair in rest]
        scores.num_calls += len(rest)
        # The probe's log-probabilities are the last of each sequence.
        gains = [float(each.log_probs[-1].double().mean()) for each in scores.reader.score(sequences)]
        order = (*order, rest[max(range(len(rest)), key=gains.__getitem__)])
    return order
