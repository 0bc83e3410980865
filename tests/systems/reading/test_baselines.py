"""The control arms, by hand on small similarities and tables, and against slow searches written anew here."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from preceptor.lm.model import LanguageModel
from preceptor.systems.reading.articles import ArticlePairs, TokenizedArticle, tokenize_article
from preceptor.systems.reading.baselines import (
    Order,
    OrderScores,
    baseline_orders,
    beam_search,
    best_order,
    easy_to_hard,
    farthest_first,
    local_search,
    maximal_marginal_relevance,
    nearest_chain,
    probe_greedy,
    random_orders,
)
from preceptor.systems.reading.rewards import LanguageModelReader
from tests.systems.reading.planted import PlantedReader, order_value
from tests.systems.reading.small import BEES, language_model


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return language_model()


def article_of(lm: LanguageModel, num_pairs: int) -> TokenizedArticle:
    values = tuple("abcdefghijklmnop"[: 1 + 3 * index % 7] for index in range(num_pairs))  # of different lengths
    pairs = ArticlePairs("n", "N", tuple(f"key {index}" for index in range(num_pairs)), values, probe="a b")
    return tokenize_article(pairs, lm, prompt="", use_chat_template=False)


def table(num_pairs: int, seed: int) -> Tensor:
    return 5 + torch.randn(num_pairs + 1, num_pairs, generator=torch.Generator().manual_seed(seed))


def planted_scores(lm: LanguageModel, num_pairs: int, seed: int = 0) -> tuple[OrderScores, TokenizedArticle, Tensor]:
    article, cost = article_of(lm, num_pairs), table(num_pairs, seed)
    return OrderScores(PlantedReader(cost), article), article, cost


# ---- orders that follow similarity -----------------------------------------------------------------------------------

SIMILARITY = torch.tensor(
    [
        [1.0, 0.2, 0.9, 0.1],
        [0.2, 1.0, 0.3, 0.8],
        [0.9, 0.3, 1.0, 0.4],
        [0.1, 0.8, 0.4, 1.0],
    ],
    dtype=torch.float64,
)


def test_nearest_chain_by_hand() -> None:
    # from 0 the nearest is 2 (0.9); from 2 of {1, 3}: 3 (0.4 > 0.3); then 1
    assert nearest_chain(SIMILARITY) == (0, 2, 3, 1)


def test_farthest_first_by_hand() -> None:
    # from 0: 3 (0.1); nearest read key of 1 is max(0.2, 0.8) = 0.8, of 2 max(0.9, 0.4) = 0.9, so 1; then 2
    assert farthest_first(SIMILARITY) == (0, 3, 1, 2)


def test_maximal_marginal_relevance_by_hand() -> None:
    # relevance (row means): 0.55, 0.575, 0.65, 0.575; so 2 first. Then ½·relevance − ½·nearest read:
    # 0: (0.55 − 0.9)/2, 1: (0.575 − 0.3)/2, 3: (0.575 − 0.4)/2, so 1; then 0: (0.55 − 0.9)/2, 3: (0.575 − 0.8)/2, so 3
    assert maximal_marginal_relevance(SIMILARITY) == (2, 1, 3, 0)


def test_ties_go_to_the_earlier_pair() -> None:
    same = torch.ones(4, 4, dtype=torch.float64)
    for arm in (nearest_chain, farthest_first, maximal_marginal_relevance):
        assert arm(same) == (0, 1, 2, 3)


# ---- orders that ask the reader --------------------------------------------------------------------------------------


def test_scores_are_means_per_token_and_totals_are_sums(lm: LanguageModel) -> None:
    scores, article, cost = planted_scores(lm, 4)
    for order in ((2, 0, 3, 1), (1,), (3, 2)):
        expected = order_value(article, cost, order)
        num_tokens = sum(len(article.values[pair]) for pair in order)
        assert scores.values([order]) == [pytest.approx(expected, abs=1e-5)]
        assert scores.totals([order]) == [pytest.approx(expected * num_tokens, abs=1e-4)]


def test_calls_count_every_value_asked_for_and_none_is_computed_twice(lm: LanguageModel) -> None:
    scores, _, _ = planted_scores(lm, 4)
    asked: list[int] = []
    score = scores.reader.score
    scores.reader.score = lambda rows: (asked.append(len(rows)), score(rows))[1]  # type: ignore[method-assign]
    scores.values([(0, 1), (2,), (0, 1)])
    scores.values([(2,), (3, 1, 0)])
    assert asked == [2, 1]
    assert scores.num_calls == 2 + 1 + 2 + 1 + 3


def test_easy_to_hard_falls_by_what_a_value_gets_alone(lm: LanguageModel) -> None:
    scores, _, cost = planted_scores(lm, 5)
    assert list(easy_to_hard(scores)) == cost[0].argsort().tolist()


def slow_beam(cost: Tensor, lengths: list[int], width: int) -> Order:
    """Beam search over the table, with costs summed anew for every prefix."""

    def gain(prefix: Order) -> float:
        steps = zip((-1, *prefix), prefix, strict=False)
        return sum((float(cost[0, pair]) - float(cost[before + 1, pair])) * lengths[pair] for before, pair in steps)

    kept: list[Order] = [()]
    for _ in lengths:
        grown = [(*prefix, pair) for prefix in kept for pair in range(len(lengths)) if pair not in prefix]
        kept = sorted(grown, key=gain, reverse=True)[:width]
    return kept[0]


@pytest.mark.parametrize("seed", range(6))
def test_greedy_and_beam_are_those_of_a_slow_search(lm: LanguageModel, seed: int) -> None:
    scores, article, cost = planted_scores(lm, 6, seed)
    lengths = [len(value) for value in article.values]
    for width in (1, 2, 8):
        assert beam_search(scores, width) == slow_beam(cost, lengths, width)


@pytest.mark.parametrize("seed", range(6))
def test_the_oracles_stand_in_the_order_that_they_must(lm: LanguageModel, seed: int) -> None:
    scores, article, cost = planted_scores(lm, 5, seed)
    generator = torch.Generator().manual_seed(seed)
    controls = baseline_orders(
        scores, torch.randn(5, 8, generator=generator), num_orders=30, best_of=20, beam_width=3, generator=generator
    )
    value = {arm: order_value(article, cost, control.orders[0]) for arm, control in controls.items()}
    optimum = max(order_value(article, cost, order) for order in itertools.permutations(range(5)))
    assert value["exhaustive"] == pytest.approx(optimum)
    for arm in controls:
        assert value[arm] <= value["exhaustive"] + 1e-9, arm
    assert value["local_search"] >= value["beam"] - 1e-9  # it starts there
    everything = beam_search(scores, 120)
    assert order_value(article, cost, everything) == pytest.approx(optimum)  # a beam that drops nothing


def test_local_search_ends_where_no_swap_and_no_move_is_better(lm: LanguageModel) -> None:
    scores, article, cost = planted_scores(lm, 6, 3)
    found = local_search(scores, (5, 4, 3, 2, 1, 0))

    def neighbours(order: Order) -> list[Order]:
        swaps = [
            tuple(order[{a: b, b: a}.get(place, place)] for place in range(6))
            for a, b in itertools.combinations(range(6), 2)
        ]
        moves = []
        for a, b in itertools.permutations(range(6), 2):
            rest = [pair for place, pair in enumerate(order) if place != a]
            moves.append((*rest[:b], order[a], *rest[b:]))
        return [*swaps, *moves]

    best_near = max(order_value(article, cost, order) for order in neighbours(found))
    assert order_value(article, cost, found) >= best_near - 1e-6
    assert order_value(article, cost, found) > order_value(article, cost, (5, 4, 3, 2, 1, 0))


def test_best_of_n_is_the_best_of_the_orders_that_it_drew(lm: LanguageModel) -> None:
    scores, article, cost = planted_scores(lm, 6)
    drawn = random_orders(6, 40, generator=torch.Generator().manual_seed(1))
    expected = max(drawn, key=lambda order: order_value(article, cost, order))
    assert best_order(scores, drawn) == expected
    assert all(sorted(order) == list(range(6)) for order in drawn)
    assert len(set(drawn)) > 30


def test_costs_of_the_arms_in_value_scorings(lm: LanguageModel) -> None:
    scores, _, _ = planted_scores(lm, 4)
    controls = baseline_orders(
        scores, torch.eye(4), num_orders=7, best_of=5, beam_width=2, generator=torch.Generator().manual_seed(0)
    )
    calls = {arm: control.num_calls for arm, control in controls.items()}
    free = ("random", "document", "reverse", "nearest_chain", "farthest_first", "mmr")
    assert {arm: calls[arm] for arm in free} == dict.fromkeys(free, 0)
    assert len(controls["random"].orders) == 7
    assert calls["easy_to_hard"] == calls["hard_to_easy"] == 4
    assert calls["best_of_n"] == 5 * 4
    # alone 4; then 4 prefixes of 1, 3 of 2, 2 of 3, 1 of 4 pairs
    assert calls["greedy"] == 4 + 4 * 1 + 3 * 2 + 2 * 3 + 1 * 4
    # alone 4; then 4 of 1, and of the two beams 2·3 of 2, 2·2 of 3, 2·1 of 4
    assert calls["beam"] == 4 + 4 * 1 + 6 * 2 + 4 * 3 + 2 * 4
    # It goes on from the beam's order, which it has to pay for too.
    alone, _, _ = planted_scores(lm, 4)
    local_search(alone, controls["beam"].orders[0])
    assert calls["local_search"] == calls["beam"] + alone.num_calls
    assert calls["exhaustive"] == 24 * 4
    assert controls["hard_to_easy"].orders[0] == controls["easy_to_hard"].orders[0][::-1]
    assert controls["document"].orders == ((0, 1, 2, 3),)
    assert controls["reverse"].orders == ((3, 2, 1, 0),)


def test_beyond_seven_pairs_there_is_no_exhaustive_arm(lm: LanguageModel) -> None:
    def arms(num_pairs: int) -> set[str]:
        scores, _, _ = planted_scores(lm, num_pairs)
        generator = torch.Generator().manual_seed(0)
        keys = torch.randn(num_pairs, 4, generator=generator)
        return set(baseline_orders(scores, keys, num_orders=2, best_of=1, beam_width=1, generator=generator))

    assert arms(8) == arms(3) - {"exhaustive"}


def test_similarity_of_the_keys_is_their_cosine(lm: LanguageModel) -> None:
    """Scaling a key changes no arm: longer vectors are not nearer."""
    scores, _, _ = planted_scores(lm, 5)
    keys = torch.randn(5, 3, generator=torch.Generator().manual_seed(2))

    def orders(vectors: Tensor) -> dict[str, Order]:
        found = baseline_orders(
            scores, vectors, num_orders=2, best_of=1, beam_width=1, generator=torch.Generator().manual_seed(0)
        )
        return {arm: found[arm].orders[0] for arm in ("nearest_chain", "farthest_first", "mmr")}

    assert orders(keys) == orders(keys * torch.tensor([[1.0], [9.0], [0.1], [3.0], [2.0]]))
    cosine = torch.nn.functional.cosine_similarity
    assert orders(keys)["nearest_chain"][1] == max(
        range(1, 5), key=lambda pair: float(cosine(keys[0], keys[pair], dim=0))
    )


# ---- a real reader ---------------------------------------------------------------------------------------------------


def slow_mean(lm: LanguageModel, tokens: list[int], start: int) -> float:
    with torch.no_grad():
        log_probs = lm.model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
    return float(sum(log_probs[at - 1, tokens[at]] for at in range(start, len(tokens))) / (len(tokens) - start))


@pytest.fixture(scope="module")
def real(lm: LanguageModel) -> tuple[OrderScores, TokenizedArticle, Callable[[list[int]], float]]:
    article = tokenize_article(BEES, lm, prompt="", use_chat_template=False)

    def probe_after(order: list[int]) -> float:
        read = [lm.begin_token, *(token for pair in order for token in article.values[pair])]
        return slow_mean(lm, [*read, *article.probe], len(read))

    return OrderScores(LanguageModelReader(lm), article), article, probe_after


def test_scores_under_a_language_model_are_those_of_the_bare_model(lm: LanguageModel, real: tuple) -> None:  # type: ignore[type-arg]
    scores, article, _ = real
    for order in ((0, 1, 2, 3, 4), (3, 1), (4, 2, 0, 1, 3)):
        tokens = [lm.begin_token, *(token for pair in order for token in article.values[pair])]
        assert scores.values([order])[0] == pytest.approx(slow_mean(lm, tokens, 1), abs=1e-5)


def test_the_probe_curve_is_the_probe_after_each_prefix(real: tuple) -> None:  # type: ignore[type-arg]
    scores, _, probe_after = real
    order, before = [3, 0, 4, 1, 2], scores.num_calls
    expected = torch.tensor([probe_after(order[:read]) for read in range(6)])
    torch.testing.assert_close(scores.curve(order), expected, rtol=0, atol=1e-5)
    assert scores.num_calls == before + 6
    assert scores.curve(order)[0] != scores.curve(order)[5]


def test_probe_greedy_always_takes_the_pair_after_which_the_probe_is_likeliest(real: tuple) -> None:  # type: ignore[type-arg]
    scores, _, probe_after = real
    order: list[int] = []
    while len(order) < 5:
        rest = [pair for pair in range(5) if pair not in order]
        order.append(max(rest, key=lambda pair: probe_after([*order, pair])))
    before = scores.num_calls
    assert probe_greedy(scores) == tuple(order)
    assert scores.num_calls - before == 5 + 4 + 3 + 2 + 1
