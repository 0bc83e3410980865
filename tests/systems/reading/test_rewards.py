"""The reader against one plain re-encoding per value; rewards, the pair baseline and advantages, worked by hand."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from preceptor.errors import DataError
from preceptor.lm.load import load_language_model
from preceptor.lm.model import LanguageModel
from preceptor.lm.tokenizer import train_bpe_tokenizer
from preceptor.systems.reading.articles import (
    ArticlePairs,
    Span,
    TokenizedArticle,
    TokenSequence,
    bundled_article,
    tokenize_article,
)
from preceptor.systems.reading.environment import Trajectories
from preceptor.systems.reading.rewards import (
    LanguageModelReader,
    PairBaseline,
    ReturnBaseline,
    Rewards,
    SequenceScores,
    batch_rewards,
    probe_curve,
    probe_rewards,
    reader_sequences,
    scores_after_initial_queries,
    step_advantages,
    value_rewards,
)
from tests.systems.reading.planted import PlantedReader
from tests.systems.reading.small import BEES, language_model, perturb, policies, rollout


def slow_log_probs(lm: LanguageModel, before: list[int], tokens: tuple[int, ...]) -> torch.Tensor:
    """Of ``tokens`` after ``before``, from the bare model."""
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([[*before, *tokens]])).logits[0]
    places = torch.arange(len(before) - 1, len(before) + len(tokens) - 1)
    return logits.log_softmax(-1)[places, torch.tensor(tokens)]


@pytest.fixture(scope="module")
def setting() -> tuple[LanguageModelReader, TokenizedArticle, Trajectories]:
    policy, untrained, article, keys = policies(language_model())
    perturb(policy, scale=0.1)
    trajectories = rollout(policy, article, keys, initial_policy=untrained, num_episodes=3, budget=4)
    return LanguageModelReader(untrained.lm), article, trajectories


@pytest.mark.parametrize("with_probe", [False, True])
@pytest.mark.parametrize("context", ["values", "queries"])
def test_each_value_is_scored_after_all_that_its_context_holds(setting: Any, context: Any, with_probe: bool) -> None:
    reader, article, trajectories = setting
    scored = reader.score(reader_sequences(reader, trajectories, context=context, with_probe=with_probe))
    for episode, row in enumerate(scored):
        before = [reader.lm.begin_token] if context == "values" else list(article.prompt)
        expected = []
        for step, pair in enumerate(trajectories.order[episode].tolist()):
            if context == "queries":
                before += trajectories.queries[episode, step].tolist()
            expected.append(slow_log_probs(reader.lm, before, article.values[pair]))
            before += article.values[pair]
        if with_probe:
            expected.append(slow_log_probs(reader.lm, before, article.probe))
        assert len(row.log_probs) == len(expected)
        for found, slow in zip(row.log_probs, expected, strict=True):
            torch.testing.assert_close(found, slow, rtol=1e-5, atol=1e-5)


def test_the_reference_query_takes_the_place_of_the_policys_and_nothing_else_changes(setting: Any) -> None:
    reader, article, trajectories = setting
    rows = reader_sequences(reader, trajectories, context="queries")
    scored = scores_after_initial_queries(reader, trajectories, rows)
    for episode, row in enumerate(scored):
        before = list(article.prompt)
        for step, pair in enumerate(trajectories.order[episode].tolist()):
            other = trajectories.initial_queries[episode, step].tolist()
            slow = slow_log_probs(reader.lm, [*before, *other], article.values[pair])
            torch.testing.assert_close(row.log_probs[step], slow, rtol=1e-5, atol=1e-5)
            before += [*trajectories.queries[episode, step].tolist(), *article.values[pair]]


def test_reference_queries_and_a_probe_must_be_there_to_be_scored() -> None:
    policy, _, article, keys = policies(language_model())
    trajectories, reader = rollout(policy, article, keys), LanguageModelReader(policy.lm)
    with pytest.raises(DataError, match="run the episodes with `initial_policy`"):
        scores_after_initial_queries(reader, trajectories, reader_sequences(reader, trajectories, context="queries"))
    bare = tokenize_article(
        ArticlePairs("no probe", "None", BEES.keys, BEES.values), policy.lm, prompt="", use_chat_template=False
    )
    with pytest.raises(DataError, match=r"set data\.num_probes to at least 1"):
        probe_curve(reader, bare, (0, 1))


# ---- a reader of another vocabulary ----------------------------------------------------------------------------------


def other_reader(policy_lm: LanguageModel, reader_lm: LanguageModel) -> tuple[LanguageModelReader, TokenizedArticle]:
    theirs = tokenize_article(BEES, reader_lm, prompt="{title}\n", use_chat_template=True)
    return LanguageModelReader(reader_lm, policy_lm=policy_lm, articles={BEES.name: theirs}), theirs


def check_other_vocabulary(policy_lm: LanguageModel, reader_lm: LanguageModel) -> None:
    policy, untrained, article, keys = policies(policy_lm)
    trajectories = rollout(policy, article, keys, initial_policy=untrained, num_episodes=8, budget=3, query_tokens=2)
    reader, theirs = other_reader(policy_lm, reader_lm)
    assert theirs.values != article.values
    for row, order in zip(
        reader.score(reader_sequences(reader, trajectories, context="values")), trajectories.order.tolist(), strict=True
    ):
        before = [reader_lm.begin_token]
        for found, pair in zip(row.log_probs, order, strict=True):
            torch.testing.assert_close(
                found, slow_log_probs(reader_lm, before, theirs.values[pair]), rtol=1e-5, atol=1e-5
            )
            before += theirs.values[pair]
    rows = reader_sequences(reader, trajectories, context="queries")
    for row, queries in zip(rows, trajectories.queries.tolist(), strict=True):
        written = [list(row.tokens[span.start : span.end]) for span in row.spans if span.kind == "query"]
        assert written == [reader_lm.encode(policy_lm.decode(query)) for query in queries]
    batch = batch_rewards(
        trajectories,
        reader=reader,
        initial_reader=reader,
        kind="values",
        context="queries",
        normalisation="untrained_query",
    )
    assert batch.normalised.total.isfinite().all()


def test_a_reader_of_another_vocabulary_gets_texts() -> None:
    reader_lm = language_model(seed=1)
    tokenizer = train_bpe_tokenizer([bundled_article().text], vocab_size=300, context_length=256)
    check_other_vocabulary(language_model(), LanguageModel(reader_lm.model, tokenizer, name="other"))


@pytest.mark.parametrize(("policy", "reader"), [("stories3m", "stories260k"), ("stories260k", "stories3m")])
def test_real_models_read_for_one_another(test_data: Path, policy: str, reader: str) -> None:
    cpu = torch.device("cpu")
    check_other_vocabulary(
        load_language_model(str(test_data / "lm" / policy), device=cpu),
        load_language_model(str(test_data / "lm" / reader), device=cpu),
    )


def test_a_query_that_is_no_token_for_the_reader_keeps_its_place(test_data: Path) -> None:
    """A lone space is nothing to a tokenizer that puts one before every text; its value must still be its value."""
    policy_lm = language_model()
    policy, untrained, article, keys = policies(policy_lm)
    space = policy_lm.encode(" ")
    trajectories = rollout(policy, article, keys, initial_policy=untrained, num_episodes=2, budget=3, query_tokens=1)
    trajectories.queries[0, 1] = torch.tensor(space)
    trajectories.initial_queries[1, 2] = torch.tensor(space)  # type: ignore[index]
    reader_lm = load_language_model(str(test_data / "lm" / "stories260k"), device=torch.device("cpu"))
    reader, theirs = other_reader(policy_lm, reader_lm)
    assert reader.query_tokens(space) == []
    rows = reader_sequences(reader, trajectories, context="queries")
    scored = scores_after_initial_queries(reader, trajectories, rows)
    before = list(theirs.prompt)
    for step, pair in enumerate(trajectories.order[0].tolist()):
        other = reader.query_tokens(trajectories.initial_queries[0, step].tolist())  # type: ignore[index]
        slow = slow_log_probs(reader_lm, [*before, *other], theirs.values[pair])
        torch.testing.assert_close(scored[0].log_probs[step], slow, rtol=1e-5, atol=1e-5)
        before += [*reader.query_tokens(trajectories.queries[0, step].tolist()), *theirs.values[pair]]


# ---- rewards ---------------------------------------------------------------------------------------------------------


def scored(values: Sequence[Sequence[float]], order: Sequence[int], probe: Sequence[float] = ()) -> SequenceScores:
    """A reader's row with these log-probabilities of its values and, if given, of a probe."""
    spans, at = [Span("prompt", 0, 1)], 1
    for pair, log_probs in zip(order, values, strict=True):
        spans.append(Span("value", at, at + len(log_probs), pair))
        at += len(log_probs)
    if probe:
        spans.append(Span("probe", at, at + len(probe)))
        at += len(probe)
    everything = [*values, probe] if probe else list(values)
    return SequenceScores(
        TokenSequence(tuple(range(at)), tuple(spans)), tuple(torch.tensor(part) for part in everything)
    )


ROWS = (scored([[-1.0, -3.0], [-2.0, -2.0, -5.0]], [1, 0]), scored([[-4.0, -4.0, -1.0], [-2.0, -1.0]], [0, 1]))


def test_a_row_of_step_rewards_sums_to_the_mean_log_prob_per_value_token() -> None:
    rewards = value_rewards(ROWS)
    # first: −4/5, −9/5, sum −13/5; second: −9/5, −3/5, sum −12/5
    torch.testing.assert_close(rewards.step_rewards, torch.tensor([[-0.8, -1.8], [-1.8, -0.6]]))
    torch.testing.assert_close(rewards.position_means, torch.tensor([[-2.0, -3.0], [-3.0, -1.5]]))
    torch.testing.assert_close(rewards.total, torch.tensor([-2.6, -2.4]))


def test_a_probe_in_the_row_leaves_the_values_rewards_alone() -> None:
    with_probe = [scored([[-1.0, -3.0], [-2.0, -2.0, -5.0]], [1, 0], probe=[-7.0, -9.0])]
    torch.testing.assert_close(value_rewards(with_probe).total, torch.tensor([-2.6]))
    rewards = probe_rewards(with_probe)
    torch.testing.assert_close(rewards.total, torch.tensor([-8.0]))
    torch.testing.assert_close(rewards.step_rewards, torch.tensor([[0.0, -8.0]]))  # earned when all is read
    torch.testing.assert_close(rewards.position_means, torch.tensor([[-2.0, -3.0]]))


def test_a_normalised_reward_is_the_difference_in_every_place() -> None:
    reference = value_rewards((scored([[-2.0, -2.0], [-1.0, -1.0, -1.0]], [1, 0]), ROWS[1]))
    normalised = value_rewards(ROWS) - reference
    # the reference's first row: −4/5, −3/5, sum −7/5
    torch.testing.assert_close(normalised.total, torch.tensor([-1.2, 0.0]))
    torch.testing.assert_close(normalised.step_rewards, torch.tensor([[0.0, -1.2], [0.0, 0.0]]))
    torch.testing.assert_close(normalised.position_means, torch.tensor([[0.0, -2.0], [0.0, 0.0]]))


def test_rewards_at_indices_stay_together() -> None:
    rewards = value_rewards(ROWS).at(torch.tensor([1, 0]))
    torch.testing.assert_close(rewards.total, torch.tensor([-2.4, -2.6]))
    torch.testing.assert_close(rewards.step_rewards.sum(1), rewards.total)


# ---- the pair baseline -----------------------------------------------------------------------------------------------


def test_the_pair_baseline_by_hand() -> None:
    baseline = PairBaseline(decay=0.5)
    order = torch.tensor([[1, 0], [0, 1]])
    # pair 0 got −3 and −3 a token, pair 1 −2 and −1.5: means −3 and −1.75 (the first batch is taken as it is)
    found = baseline.subtract("a", order, ROWS, value_rewards(ROWS))
    expected = torch.tensor([[-0.8 + 1.75 * 2 / 5, -1.8 + 3 * 3 / 5], [-1.8 + 3 * 3 / 5, -0.6 + 1.75 * 2 / 5]])
    torch.testing.assert_close(found, expected)
    # A second batch in which pair 1 gets −1.75 + 1: the mean moves half the way, to −1.25.
    second = (scored([[-0.75, -0.75], [-3.0, -3.0, -3.0]], [1, 0]),)
    found = baseline.subtract("a", torch.tensor([[1, 0]]), second, value_rewards(second))
    torch.testing.assert_close(found, torch.tensor([[(-0.75 + 1.25) * 2 / 5, 0.0]]))
    # Another article has means of its own.
    found = baseline.subtract("b", torch.tensor([[1, 0]]), second, value_rewards(second))
    torch.testing.assert_close(found, torch.zeros(1, 2))


def test_the_pair_baseline_keeps_nine_tenths_of_the_old_mean() -> None:
    """One pair of one token: -1, then -2: the mean is 0.9 of -1 and 0.1 of -2 when the second is compared with it."""
    baseline, order = PairBaseline(), torch.tensor([[0]])
    first, second = ((scored([[value]], [0]),) for value in (-1.0, -2.0))
    assert baseline.subtract("a", order, first, value_rewards(first)).item() == 0.0
    found = baseline.subtract("a", order, second, value_rewards(second))
    assert found.item() == pytest.approx(-2.0 + 1.1)


def test_the_pair_baseline_leaves_the_objective_as_it_was_when_all_pairs_are_read() -> None:
    """The sum over a row falls by the same number for every order, so differences between orders stay."""
    lengths, generator = (2, 5, 1, 4), torch.Generator().manual_seed(0)
    orders = list(itertools.permutations(range(4)))
    rows = [
        scored([(-5 * torch.rand(lengths[p], generator=generator)).tolist() for p in order], order) for order in orders
    ]
    rewards = value_rewards(rows)
    found = PairBaseline().subtract("a", torch.tensor(orders), rows, rewards)
    dropped = rewards.step_rewards.sum(1) - found.sum(1)
    assert found.sum(1).std() > 0.1
    torch.testing.assert_close(dropped, dropped[:1].expand(24), rtol=0, atol=1e-5)
    assert found.sum(1).mean() == pytest.approx(0.0, abs=0.05)  # the first batch is its own mean, up to value lengths


def test_the_pair_baseline_survives_what_is_not_finite_and_a_checkpoint() -> None:
    baseline = PairBaseline(decay=0.5)
    broken = (scored([[math.nan, -3.0], [-2.0, -2.0, -5.0]], [1, 0]),)
    found = baseline.subtract("a", torch.tensor([[1, 0]]), broken, value_rewards(broken))
    assert found.isnan().tolist() == [[True, False]]  # nothing is known of pair 1 yet
    baseline.subtract("a", torch.tensor([[1, 0], [0, 1]]), ROWS, value_rewards(ROWS))
    baseline.subtract("a", torch.tensor([[1, 0]]), broken, value_rewards(broken))
    state = baseline.state_dict()
    assert state == {"a": {0: pytest.approx(-3.0), 1: pytest.approx(-1.75)}}
    other = PairBaseline(decay=0.5)
    other.load_state_dict(state)
    first, second = (
        each.subtract("a", torch.tensor([[1, 0], [0, 1]]), ROWS, value_rewards(ROWS)) for each in (baseline, other)
    )
    assert torch.equal(first, second)


# ---- advantages ------------------------------------------------------------------------------------------------------

STEPS = torch.tensor([[1.0, 2.0], [3.0, 0.0], [2.0, 4.0]])
"""Rewards to go: [3, 2], [3, 0], [6, 4]; means 4 and 2."""


def advantages(**arguments: Any) -> Tensor:
    settings: dict[str, Any] = {
        "usable_mask": torch.ones(3, dtype=torch.bool),
        "credit": "following",
        "advantage": "leave_one_out",
        "article": "a",
        "baseline": ReturnBaseline(),
        **arguments,
    }
    return step_advantages(STEPS if "rewards" not in settings else settings.pop("rewards"), **settings)


def test_leave_one_out_compares_each_step_with_the_same_step_of_the_others() -> None:
    # step 1: 3 − (3+6)/2, 3 − (3+6)/2, 6 − 3; step 2: 2 − (0+4)/2, 0 − (2+4)/2, 4 − 1
    torch.testing.assert_close(advantages(), torch.tensor([[-1.5, 0.0], [-1.5, -3.0], [3.0, 3.0]]))


def test_trajectory_credit_gives_every_step_the_whole() -> None:
    torch.testing.assert_close(advantages(credit="trajectory"), torch.tensor([[-1.5, -1.5], [-1.5, -1.5], [3.0, 3.0]]))


def test_group_normalised_divides_by_the_batch_deviation() -> None:
    # step 1: deviations −1, −1, 2, sample deviation √3; step 2: 0, −2, 2, deviation 2
    expected = torch.tensor([[-1.0, 0.0], [-1.0, -2.0], [2.0, 2.0]]) / torch.tensor([3**0.5, 2.0])
    torch.testing.assert_close(advantages(advantage="group_normalised"), expected, rtol=1e-3, atol=1e-3)


def test_the_running_mean_is_that_of_each_steps_returns_before_this_batch() -> None:
    """The returns of STEPS are [3, 2], [3, 0], [6, 4], so after one batch the means are 4 and 2."""
    baseline = ReturnBaseline()
    assert not advantages(advantage="running_mean", baseline=baseline).any()  # nothing is known yet
    found = advantages(advantage="running_mean", baseline=baseline)
    torch.testing.assert_close(found, torch.tensor([[-1.0, 0.0], [-1.0, -2.0], [2.0, 2.0]]))
    other = advantages(rewards=STEPS + 1, advantage="running_mean", baseline=baseline, article="b")
    assert not other.any()  # another article has means of its own
    found = advantages(rewards=torch.tensor([[7.0, 2.0]]), usable_mask=torch.tensor([True]), advantage="running_mean",
                       baseline=baseline)  # fmt: skip
    torch.testing.assert_close(found, torch.tensor([[5.0, 0.0]]))  # of what was before: two batches with means 4 and 2
    copy = ReturnBaseline()
    copy.load_state_dict(baseline.state_dict())
    first, second = (advantages(advantage="running_mean", baseline=each) for each in (baseline, copy))
    assert torch.equal(first, second)


@pytest.mark.parametrize("kind", ["values", "probe"])
@pytest.mark.parametrize("pair_baseline", [False, True])
@pytest.mark.parametrize("credit", ["following", "trajectory"])
@pytest.mark.parametrize("advantage", ["leave_one_out", "group_normalised", "running_mean"])
@pytest.mark.parametrize("excluded", [None, 0, 2])
def test_equal_rewards_give_no_advantage_and_a_batch_has_none_on_average(
    kind: str, pair_baseline: bool, credit: Any, advantage: Any, excluded: int | None
) -> None:
    """Over every kind of reward, credit, advantage and excluded row.

    To catch: a second baseline of what the first one has centred already, whose advantages are about the reward itself.
    """
    generator = torch.Generator().manual_seed(0)
    num_episodes, num_steps = 6, 4
    usable = torch.ones(num_episodes, dtype=torch.bool)
    for spread in (0.0, 0.1):
        pairs, baseline = PairBaseline(), ReturnBaseline()
        for _ in range(20):
            # Means per token of -5 at every place: a trajectory's reward is -5.
            means = -5 + spread * torch.randn(num_episodes, num_steps, generator=generator)
            if excluded is not None:
                means[excluded, 1], usable[excluded] = math.nan, False
            order = torch.stack([torch.randperm(num_steps, generator=generator) for _ in range(num_episodes)])
            scores = [
                scored([[float(x)] * 2 for x in row], order_.tolist()) for row, order_ in zip(means, order, strict=True)
            ]
            rewards = value_rewards(scores)
            steps = rewards.step_rewards
            if kind == "probe":
                steps = torch.zeros_like(steps)
                steps[:, -1] = rewards.total
            elif pair_baseline:
                steps = pairs.subtract("a", order, scores, rewards)
            found = step_advantages(
                steps, usable_mask=usable, credit=credit, advantage=advantage, article="a", baseline=baseline
            )
            assert not found[~usable].any()
            if spread == 0.0:
                torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-5)
            # Of 6 episodes with 4 steps of deviation 0.1/4 the mean is about 0.02, in units of their deviation 0.4.
            limit = 0.05 if advantage == "running_mean" else 1e-4
            assert abs(float(found[usable].mean())) < limit


def test_what_is_not_usable_is_neither_credited_nor_a_baseline() -> None:
    rewards = torch.tensor([[1.0, 2.0], [math.nan, 0.0], [2.0, 4.0]])
    found = advantages(rewards=rewards, usable_mask=torch.tensor([True, False, True]))
    torch.testing.assert_close(found, torch.tensor([[-3.0, -2.0], [0.0, 0.0], [3.0, 2.0]]))
    nobody = advantages(rewards=rewards, usable_mask=torch.zeros(3, dtype=torch.bool))
    assert not nobody.any()


# ---- judging ---------------------------------------------------------------------------------------------------------


def test_both_contexts_are_measured_and_the_reward_is_that_of_its_own() -> None:
    policy, untrained, article, keys = policies(language_model())
    trajectories = rollout(policy, article, keys, initial_policy=untrained, num_episodes=3)
    reader = LanguageModelReader(untrained.lm)

    def batch(**arguments: Any) -> Any:
        settings = {"kind": "values", "context": "values", "normalisation": "none", **arguments}
        return batch_rewards(trajectories, reader=reader, initial_reader=reader, **settings)

    values, queries = batch(), batch(context="queries")
    assert torch.equal(values.raw.total, values.values_context.total)
    assert torch.equal(queries.raw.total, queries.queries_context.total)
    assert not torch.allclose(values.raw.total, queries.raw.total, atol=1e-3)
    torch.testing.assert_close(values.queries_context.total, queries.raw.total)
    torch.testing.assert_close(queries.values_context.total, values.raw.total)
    assert values.reference_scores is None
    assert values.normalised is values.raw

    # The untrained reader against itself is identically zero: why the configuration refuses it.
    itself = batch(normalisation="untrained_reader")
    torch.testing.assert_close(itself.normalised.total, torch.zeros(3), rtol=0, atol=1e-6)

    # Where the policy wrote just what the untrained model writes, the same value after it gets the same.
    same = dataclasses.replace(trajectories, initial_queries=trajectories.queries)
    mimic = batch_rewards(
        same, reader=reader, initial_reader=reader, kind="values", context="queries", normalisation="untrained_query"
    )
    torch.testing.assert_close(mimic.normalised.step_rewards, torch.zeros(3, 5), rtol=0, atol=1e-5)
    other = batch(context="queries", normalisation="untrained_query")
    assert other.normalised.total.abs().min() > 1e-4

    probed = batch(kind="probe")
    torch.testing.assert_close(probed.values_context.total, values.raw.total)
    assert probed.raw.step_rewards[:, :-1].eq(0).all()


def test_the_planted_reader_is_judged_by_its_table() -> None:
    _, _, article, _ = policies(language_model())
    cost = torch.arange(30.0).reshape(6, 5)
    rewards = value_rewards(PlantedReader(cost).score([article.reader_sequence((2, 0))]))
    # value 2 first costs 2 a token, value 0 after it cost[3, 0] = 15
    first, second = len(article.values[2]), len(article.values[0])
    assert rewards.total.item() == pytest.approx(-(2 * first + 15 * second) / (first + second))
    assert isinstance(rewards, Rewards)
