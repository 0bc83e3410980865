"""Rewards, the pair baseline and advantages, worked by hand."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from preceptor.objectives.statistics import RunningMoments
from preceptor.systems.reading.credit import (
    PairBaseline,
    Rewards,
    difference,
    judge,
    probe_rewards,
    step_advantages,
    value_rewards,
)
from preceptor.systems.reading.material import Row, Span
from preceptor.systems.reading.reader import LanguageModelReader, Scored
from tests.systems.reading.planted import PlantedReader
from tests.systems.reading.small import language_model, policies, rollout


def scored(values: Sequence[Sequence[float]], order: Sequence[int], probe: Sequence[float] = ()) -> Scored:
    """A reader's row with these log-probabilities of its values and, if given, of a probe."""
    spans, at = [Span("prompt", 0, 1)], 1
    for pair, log_probs in zip(order, values, strict=True):
        spans.append(Span("value", at, at + len(log_probs), pair))
        at += len(log_probs)
    if probe:
        spans.append(Span("probe", at, at + len(probe)))
        at += len(probe)
    everything = [*values, probe] if probe else list(values)
    return Scored(Row(tuple(range(at)), tuple(spans)), tuple(torch.tensor(part) for part in everything))


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
    normalised = difference(value_rewards(ROWS), reference)
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
    state = json.loads(json.dumps(baseline.state_dict(), allow_nan=False))
    assert state == {"a": {"0": pytest.approx(-3.0), "1": pytest.approx(-1.75)}}
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
        "usable": torch.ones(3, dtype=torch.bool),
        "credit": "following",
        "advantage": "leave_one_out",
        "moments": RunningMoments(),
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


def test_the_running_mean_is_shared_out_over_the_steps_that_remain() -> None:
    moments = RunningMoments()
    moments.update(torch.tensor([2.0, 4.0]))  # mean 3: 3 before both steps, 1.5 before the last
    found = advantages(advantage="running_mean", moments=moments)
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.5], [0.0, -1.5], [3.0, 2.5]]))
    found = advantages(advantage="running_mean", moments=moments, credit="trajectory")
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 3.0]]))


def test_what_is_not_usable_is_neither_credited_nor_a_baseline() -> None:
    rewards = torch.tensor([[1.0, 2.0], [math.nan, 0.0], [2.0, 4.0]])
    found = advantages(rewards=rewards, usable=torch.tensor([True, False, True]))
    torch.testing.assert_close(found, torch.tensor([[-3.0, -2.0], [0.0, 0.0], [3.0, 2.0]]))
    nobody = advantages(rewards=rewards, usable=torch.zeros(3, dtype=torch.bool))
    assert not nobody.any()


# ---- judging ---------------------------------------------------------------------------------------------------------


def test_both_contexts_are_measured_and_the_reward_is_that_of_its_own() -> None:
    policy, untrained, material, keys = policies(language_model())
    trajectories = rollout(policy, material, keys, reference=untrained, num_episodes=3)
    reader = LanguageModelReader(untrained.lm)

    def judged(**arguments: Any) -> Any:
        settings = {"kind": "values", "context": "values", "normalisation": "none", **arguments}
        return judge(trajectories, reader=reader, untrained_reader=reader, **settings)

    values, queries = judged(), judged(context="queries")
    assert torch.equal(values.raw.total, values.values_context.total)
    assert torch.equal(queries.raw.total, queries.queries_context.total)
    assert not torch.allclose(values.raw.total, queries.raw.total, atol=1e-3)
    torch.testing.assert_close(values.queries_context.total, queries.raw.total)
    torch.testing.assert_close(queries.values_context.total, values.raw.total)
    assert values.reference is None
    assert values.normalised is values.raw

    # The untrained reader against itself is identically zero: why the configuration refuses it.
    itself = judged(normalisation="untrained_reader")
    torch.testing.assert_close(itself.normalised.total, torch.zeros(3), rtol=0, atol=1e-6)

    # Where the policy wrote just what the untrained model writes, the same value after it gets the same.
    same = dataclasses.replace(trajectories, reference_queries=trajectories.queries)
    mimic = judge(
        same, reader=reader, untrained_reader=reader, kind="values", context="queries", normalisation="untrained_query"
    )
    torch.testing.assert_close(mimic.normalised.step_rewards, torch.zeros(3, 5), rtol=0, atol=1e-5)
    other = judged(context="queries", normalisation="untrained_query")
    assert other.normalised.total.abs().min() > 1e-4

    probed = judged(kind="probe")
    torch.testing.assert_close(probed.values_context.total, values.raw.total)
    assert probed.raw.step_rewards[:, :-1].eq(0).all()


def test_the_planted_reader_is_judged_by_its_table() -> None:
    _, _, material, _ = policies(language_model())
    cost = torch.arange(30.0).reshape(6, 5)
    rewards = value_rewards(PlantedReader(cost).score([material.value_row((2, 0))]))
    # value 2 first costs 2 a token, value 0 after it cost[3, 0] = 15
    first, second = len(material.values[2]), len(material.values[0])
    assert rewards.total.item() == pytest.approx(-(2 * first + 15 * second) / (first + second))
    assert isinstance(rewards, Rewards)
