"""The environment: what an episode does, checked against the bare model and against itself, one row at a time."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from preceptor.errors import DataError, ShapeError
from preceptor.lm.chat import ChatMarkers
from preceptor.systems.reading.articles import ArticlePairs, TokenizedArticle, tokenize_article
from preceptor.systems.reading.environment import Trajectories, check_budget
from preceptor.systems.reading.loss import score_actions
from preceptor.systems.reading.policy import Policy
from tests.systems.reading.small import BEES, language_model, perturb, policies, rollout

PLAIN_CHAT_MARKERS = ChatMarkers()
CHAT_MARKERS = ChatMarkers(before_prompt=(0, 40), before_query=(41, 42), before_value=(43,))
"""Stand-ins for a chat template's markers."""


def test_every_pair_is_read_at_most_once_and_probabilities_are_over_what_remains() -> None:
    policy, _, article, keys = policies(language_model())
    trajectories = rollout(policy, article, keys, num_episodes=16)
    for episode in range(16):
        order = trajectories.order[episode].tolist()
        assert sorted(order) == list(range(5))
        for step in range(5):
            available = trajectories.available_mask[episode, step]
            assert available.tolist() == [pair not in order[:step] for pair in range(5)]
            probabilities = trajectories.selection_log_probs[episode, step].exp()
            assert probabilities.sum().item() == pytest.approx(1.0, abs=1e-6)
            assert (probabilities > 0).tolist() == available.tolist()
    assert len(set(map(tuple, trajectories.order.tolist()))) > 8  # it samples


def test_two_pairs_of_equal_text_are_two_pairs() -> None:
    lm = language_model()
    twice = ArticlePairs("twice", "Twice", ("Bees dance.",) * 3, ("She lays every egg.",) * 3)
    article = tokenize_article(twice, lm, prompt="", use_chat_template=False)
    policy, untrained, _, _ = policies(lm, projection=False)
    policy.centre = untrained.centre = False  # equal keys have no spread
    trajectories = rollout(policy, article, untrained.embed_keys(article), num_episodes=12)
    for row in trajectories.order.tolist():
        assert sorted(row) == [0, 1, 2]
    remaining = trajectories.available_mask.sum(-1)
    assert remaining.tolist() == [[3, 2, 1]] * 12
    expected = 1 / remaining[..., None] * trajectories.available_mask  # equal keys: uniform over those that are left
    torch.testing.assert_close(trajectories.selection_log_probs.exp(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("budget", [1, 3, 5])
def test_the_budget_is_what_is_read(budget: int) -> None:
    policy, _, article, keys = policies(language_model())
    trajectories = rollout(policy, article, keys, budget=budget)
    assert trajectories.order.shape == (4, budget)
    assert trajectories.queries.shape == (4, budget, 3)
    assert all(len(set(row)) == budget for row in trajectories.order.tolist())


@pytest.mark.parametrize("chat_markers", [PLAIN_CHAT_MARKERS, CHAT_MARKERS], ids=["plain", "chat"])
def test_every_row_is_what_the_bare_model_says_of_it_alone(chat_markers: ChatMarkers) -> None:
    """Queries, their probabilities and vectors, and the selection, from one full re-encoding of each row by itself."""
    lm = language_model()
    policy, untrained, article, keys = policies(lm, layer=1, temperature=2.0)
    policy.sampling = untrained.sampling  # temperature 1: the parameter above is the selection's
    article = dataclasses.replace(
        article, chat_markers=chat_markers, prompt=(*chat_markers.before_prompt, *article.prompt)
    )
    perturb(policy, scale=0.05)
    trajectories = rollout(policy, article, keys, num_episodes=5, budget=4)
    lengths = set()
    for episode in range(5):
        tokens, remaining = list(article.prompt), list(range(5))
        for step in range(4):
            if step:
                tokens += chat_markers.before_query
            start = len(tokens)
            tokens += trajectories.queries[episode, step].tolist()
            with torch.no_grad():
                output = lm.model(input_ids=torch.tensor([tokens]), output_hidden_states=True)
            logits = output.logits[0]
            logits[:, list(lm.special_tokens)] = -torch.inf
            log_probs = logits.log_softmax(-1)
            for offset, token in enumerate(trajectories.queries[episode, step].tolist()):
                expected = float(log_probs[start + offset - 1, token])
                assert float(trajectories.query_log_probs[episode, step, offset]) == pytest.approx(expected, abs=1e-5)
            vector = output.hidden_states[2][0, start:].mean(0) - keys.centre
            choice = (keys.vectors[remaining] @ vector / policy.temperature).log_softmax(-1)
            found = trajectories.selection_log_probs[episode, step][remaining]
            torch.testing.assert_close(found, choice, rtol=0, atol=1e-5)
            pair = int(trajectories.order[episode, step])
            remaining.remove(pair)
            tokens += [*chat_markers.before_value, *article.values[pair]]
        lengths.add(len(tokens))
    assert len(lengths) > 1  # rows of different length stood side by side


def test_control_tokens_are_never_written() -> None:
    policy, _, article, keys = policies(language_model(), temperature=5.0)
    trajectories = rollout(policy, article, keys, num_episodes=64, query_tokens=6)
    assert set(policy.lm.special_tokens) == {0, 1, 2}
    assert not set(trajectories.queries.flatten().tolist()) & {0, 1, 2}


def test_an_imposed_order_is_followed_and_the_probabilities_are_still_the_policys() -> None:
    policy, _, article, keys = policies(language_model())
    orders = [[4, 0, 3, 1, 2], [0, 1, 2, 3, 4]]
    trajectories = rollout(policy, article, keys, num_episodes=2, orders=orders)
    assert trajectories.order.tolist() == orders
    assert not trajectories.available_mask[0, 1, 4]
    scores = score_actions(policy, trajectories, keys)
    chosen = trajectories.selection_log_probs.gather(-1, trajectories.order[..., None])[..., 0]
    torch.testing.assert_close(scores.selection_log_probs, chosen, rtol=0, atol=1e-5)


def test_the_reference_writes_its_queries_in_the_same_places() -> None:
    """The untrained model sees what the policy has read before a step; its own query enters no context."""
    lm = language_model()
    policy, untrained, article, keys = policies(lm)
    perturb(policy, scale=0.3)
    trajectories = rollout(policy, article, keys, initial_policy=untrained, budget=3)
    without = rollout(policy, article, keys, budget=3)
    assert torch.equal(trajectories.queries, without.queries)  # being watched changes nothing
    assert torch.equal(trajectories.order, without.order)
    other = trajectories.initial_queries
    assert other is not None
    assert other.shape == trajectories.queries.shape
    assert not torch.equal(other, trajectories.queries)
    # Written greedily, each of its queries follows from what the policy had read there.
    greedy = dataclasses.replace(untrained.sampling, temperature=0.0)
    untrained.sampling = greedy
    policy.sampling = greedy
    forced = rollout(policy, article, keys, initial_policy=untrained, budget=3)
    assert forced.initial_queries is not None
    for episode in range(4):
        tokens = list(article.prompt)
        for step in range(3):
            grown = list(tokens)
            for _ in range(3):
                with torch.no_grad():
                    logits = untrained.lm.model(input_ids=torch.tensor([grown])).logits[0, -1]
                logits[list(lm.special_tokens)] = -torch.inf
                grown.append(int(logits.argmax()))
            assert forced.initial_queries[episode, step].tolist() == grown[-3:]
            tokens += forced.queries[episode, step].tolist()
            tokens += article.values[int(forced.order[episode, step])]


def test_equal_streams_give_equal_episodes() -> None:
    policy, _, article, keys = policies(language_model())
    first, again, other = (rollout(policy, article, keys, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.order, again.order)
    assert torch.equal(first.queries, again.queries)
    assert torch.equal(first.query_log_probs, again.query_log_probs)
    assert not torch.equal(first.queries, other.queries)


# ---- what does not fit -----------------------------------------------------------------------------------------------


def lengthened(article: TokenizedArticle, *, prompt: int, values: list[int], probe: int = 0) -> TokenizedArticle:
    """``article`` with pieces of given lengths."""
    return dataclasses.replace(
        article, prompt=(7,) * prompt, values=tuple((7,) * length for length in values), probe=(7,) * probe
    )


@pytest.mark.parametrize(
    ("pieces", "context", "fitting"),
    [
        # A prompt of 10 and steps of 4 query tokens and the longest values first: 10 + (4+9) + (4+8) + (4+7) = 46.
        ({"prompt": 10, "values": [5, 9, 7, 8, 6]}, 46, 3),
        ({"prompt": 10, "values": [5, 9, 7, 8, 6]}, 45, 2),
        # The reader's row: one token to begin with, the values alone, and then the probe: 1 + (9 + 8 + 7) + 21 = 46.
        ({"prompt": 10, "values": [5, 9, 7, 8, 6], "probe": 21}, 46, 3),
        ({"prompt": 10, "values": [5, 9, 7, 8, 6], "probe": 22}, 46, 2),
        ({"prompt": 10, "values": [5, 9, 7, 8, 6]}, 12, 0),
    ],
)
def test_a_budget_over_the_context_says_how_many_pairs_fit(pieces: dict[str, Any], context: int, fitting: int) -> None:
    _, _, article, _ = policies(language_model())
    article = lengthened(article, **pieces)
    with pytest.raises(DataError, match=rf"do not fit the context of {context} tokens: {fitting} do"):
        check_budget(context, article, budget=fitting + 1, query_tokens=4)
    if fitting:
        check_budget(context, article, budget=fitting, query_tokens=4)


def test_a_probe_after_queries_stands_in_the_longest_row() -> None:
    _, _, article, _ = policies(language_model())
    article = lengthened(article, prompt=10, values=[5, 9, 7, 8, 6], probe=20)
    room = 10 + (4 + 9) + (4 + 8) + 20
    check_budget(room, article, budget=2, query_tokens=4, probe_after_queries=True)
    with pytest.raises(DataError, match="1 do"):
        check_budget(room - 1, article, budget=2, query_tokens=4, probe_after_queries=True)


def test_turn_markers_count_towards_the_context() -> None:
    _, _, article, _ = policies(language_model())
    article = dataclasses.replace(lengthened(article, prompt=10, values=[6] * 5), chat_markers=CHAT_MARKERS)
    room = 10 + (4 + 1 + 6) + (2 + 4 + 1 + 6)  # the prompt has opened the first query
    check_budget(room, article, budget=2, query_tokens=4)
    with pytest.raises(DataError, match="1 do"):
        check_budget(room - 1, article, budget=2, query_tokens=4)


@pytest.mark.parametrize("budget", [0, 6, -1])
def test_a_budget_outside_the_pairs_is_refused(budget: int) -> None:
    policy, _, article, keys = policies(language_model())
    with pytest.raises(DataError, match=r"must lie in 1\.\.5 for bees, which has 5 pairs, got"):
        rollout(policy, article, keys, budget=budget)


@pytest.mark.parametrize("probe", [BEES.probe, ""])
def test_a_context_of_exactly_the_longest_row_is_enough_and_one_less_is_not(probe: str) -> None:
    lm = language_model()
    policy, _, _, keys = policies(lm)
    pairs = dataclasses.replace(BEES, probe=probe)
    article = tokenize_article(pairs, lm, prompt="", use_chat_template=False)
    rows = (
        article.policy_sequence(range(5), [(7, 7, 7)] * 5),
        article.reader_sequence(range(5), with_probe=bool(probe)),
    )
    policy.lm.context_length = max(len(row.tokens) for row in rows)
    assert (len(rows[0].tokens) < len(rows[1].tokens)) == bool(probe)  # each of the two decides once
    rollout(policy, article, keys)
    policy.lm.context_length -= 1
    with pytest.raises(DataError, match="4 do"):
        rollout(policy, article, keys)


# ---- records ---------------------------------------------------------------------------------------------------------


def test_trajectories_of_disagreeing_shapes_are_refused() -> None:
    policy, _, article, keys = policies(language_model())
    trajectories = rollout(policy, article, keys)
    fields = {field.name: getattr(trajectories, field.name) for field in dataclasses.fields(Trajectories)}
    for name in ("query_log_probs", "query_entropy", "order", "available_mask", "selection_log_probs"):
        with pytest.raises(ShapeError, match=name):
            Trajectories(**{**fields, name: fields[name][:, :-1]})


def test_keys_are_the_centred_means_of_each_key_read_alone() -> None:
    lm = language_model()
    policy, _, article, keys = policies(lm, layer=0)
    states = []
    for key in BEES.keys:
        tokens = [lm.begin_token, *lm.encode(key)]
        with torch.no_grad():
            output = lm.model(input_ids=torch.tensor([tokens]), output_hidden_states=True)
        states.append(output.hidden_states[1][0, 1:].mean(0))
    raw = torch.stack(states)
    torch.testing.assert_close(keys.vectors, raw - raw.mean(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(keys.centre, raw.mean(0), rtol=0, atol=1e-5)
    policy.centre = False
    uncentred = policy.embed_keys(article)
    torch.testing.assert_close(uncentred.vectors, raw, rtol=0, atol=1e-5)
    assert not uncentred.centre.any()


def test_a_policy_has_one_embedder() -> None:
    own, _, _, _ = policies(language_model())
    with pytest.raises(Exception, match="got both or neither"):
        Policy(own.lm, sampling=own.sampling, embedding=None)
