from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preceptor.errors import ConfigError
from preceptor.objectives import (
    against_baseline,
    gae,
    group_normalised,
    leave_one_out,
    mean_reward_to_go,
    reinforce_loss,
    reinforce_plus_plus,
    reward_to_go,
)

NAN = float("nan")
SEEDS = st.integers(0, 2**32 - 1)


# --- reward to go ---------------------------------------------------------------------------------------------------


def slow_reward_to_go(rewards, mask, discount):
    result = np.zeros_like(rewards)
    for row, column in np.argwhere(mask):
        following = [rewards[row, k] for k in range(column, rewards.shape[1]) if mask[row, k]]
        result[row, column] = sum(discount**n * reward for n, reward in enumerate(following))
    return result


def test_reward_to_go_by_hand():
    # Caught by planting: leaving a step's own reward out, and discounting for steps that do not count.
    rewards = torch.tensor([[1.0, NAN, 2.0, 4.0, NAN]])
    mask = torch.tensor([[True, False, True, True, False]])
    # 4; 2 + 4/2 = 4; 1 + 4/2 = 3
    assert reward_to_go(rewards, mask, discount=0.5).tolist() == [[3.0, 0.0, 4.0, 4.0, 0.0]]
    # means of (1, 2, 4), (2, 4), (4)
    np.testing.assert_allclose(mean_reward_to_go(rewards, mask), [[7 / 3, 0, 3, 4, 0]], rtol=1e-6)


@given(SEEDS, st.integers(1, 3), st.integers(1, 6), st.sampled_from([0.0, 0.5, 0.99, 1.0]))
def test_reward_to_go_equals_slow_reference(seed, batch, steps, discount):
    rng = np.random.default_rng(seed)
    rewards, mask = rng.normal(size=(batch, steps)), rng.random((batch, steps)) < 0.7
    result = reward_to_go(torch.tensor(rewards), torch.tensor(mask), discount=discount)
    np.testing.assert_allclose(result, slow_reward_to_go(rewards, mask, discount), atol=1e-13)


@given(SEEDS)
def test_reward_to_go_with_discount_zero_is_the_reward(seed):
    rewards = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(reward_to_go(rewards, torch.ones(2, 4, dtype=torch.bool), discount=0.0), rewards)


@pytest.mark.parametrize("discount", [-0.1, 1.1, NAN])
def test_bad_discount(discount):
    with pytest.raises(ConfigError, match=r"discount must lie in \[0, 1\], got"):
        reward_to_go(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), discount=discount)


# --- groups ---------------------------------------------------------------------------------------------------------


def test_leave_one_out_by_hand():
    # Caught by planting: the mean of all instead of the others (−2, −1, 3), and the sign.
    # 1 − (2 + 6)/2, 2 − (1 + 6)/2, 6 − (1 + 2)/2
    assert leave_one_out(torch.tensor([1.0, 2.0, 6.0])).tolist() == [-3.0, -1.5, 4.5]


def test_group_normalised_by_hand():
    # Mean 3, deviations −2, −1, 3, sample variance (4 + 1 + 9) / 2 = 7
    rewards = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    np.testing.assert_allclose(group_normalised(rewards), np.array([-2, -1, 3]) / (7**0.5 + 1e-4), rtol=1e-14)
    assert group_normalised(rewards, with_standard_deviation=False).tolist() == [-2.0, -1.0, 3.0]


def slow_group(rewards, function):
    """Apply ``function`` to every column of ``rewards``."""
    return np.stack([function(list(column)) for column in rewards.T], axis=1)


def slow_leave_one_out(group):
    return [r - np.mean(group[:i] + group[i + 1 :]) for i, r in enumerate(group)]


def slow_grpo(group):
    mean = sum(group) / len(group)
    deviation = (sum((r - mean) ** 2 for r in group) / (len(group) - 1)) ** 0.5
    return [(r - mean) / (deviation + 1e-4) for r in group]


@given(SEEDS, st.integers(2, 6), st.integers(1, 3))
def test_group_advantages_equal_slow_reference_along_either_axis(seed, members, groups):
    rewards = np.random.default_rng(seed).normal(size=(members, groups))
    for function, slow in ((leave_one_out, slow_leave_one_out), (group_normalised, slow_grpo)):
        expected = slow_group(rewards, slow)
        np.testing.assert_allclose(function(torch.tensor(rewards)), expected, atol=1e-12)
        np.testing.assert_allclose(function(torch.tensor(rewards.T), dim=1), expected.T, atol=1e-12)


@given(SEEDS, st.integers(1, 6))
def test_group_advantages_sum_to_zero_and_ignore_a_shift(seed, members):
    rewards = torch.randn(members, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for function in (leave_one_out, group_normalised):
        advantages = function(rewards)
        assert advantages.sum().item() == pytest.approx(0.0, abs=1e-12)
        np.testing.assert_allclose(function(rewards + 100.0), advantages, atol=1e-9)


@given(st.floats(-1e6, 1e6, width=32), st.integers(1, 7))
def test_equal_rewards_and_a_group_of_one_have_no_advantage(reward, members):
    # Exactly: rounding errors over a standard deviation of rounding errors would be of order one.
    rewards = torch.full((members,), reward)
    for result in (leave_one_out(rewards), group_normalised(rewards), group_normalised(rewards, epsilon=1e-30)):
        assert result.abs().max() == 0.0


def test_against_baseline():
    assert against_baseline(torch.tensor([1.0, 2.0]), 1.5).tolist() == [-0.5, 0.5]
    assert against_baseline(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 5.0])).tolist() == [1.0, -3.0]


def test_no_gradient_through_any_advantage():
    rewards = torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mask = torch.ones(3, 3, dtype=torch.bool)
    results = (
        reward_to_go(rewards, mask),
        mean_reward_to_go(rewards, mask),
        leave_one_out(rewards),
        group_normalised(rewards),
        against_baseline(torch.zeros(3, 3), rewards),
        against_baseline(rewards, 0.0),
        reinforce_plus_plus(rewards, mask),
        gae(rewards, rewards * 2, mask=mask, discount=1.0, gae_lambda=0.5, next_values=rewards * 3),
    )
    assert [result.requires_grad for result in results] == [False] * 8


@pytest.mark.parametrize("advantage", [leave_one_out, group_normalised])
def test_equal_rewards_teach_nothing(advantage):
    log_probs = torch.randn(7, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    advantages = advantage(torch.full((7,), 0.1))[:, None].expand(7, 2)
    reinforce_loss(log_probs, advantages, mask=torch.ones(7, 2, dtype=torch.bool)).backward()
    assert log_probs.grad.abs().max() == 0.0


# --- REINFORCE++ ----------------------------------------------------------------------------------------------------


def test_reinforce_plus_plus_by_hand():
    # rewards to go 3, 2 and 1 (the NaN does not count): mean 2, sample variance 1
    rewards = torch.tensor([[1.0, 2.0], [1.0, NAN]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False]])
    np.testing.assert_allclose(reinforce_plus_plus(rewards, mask), [[1, 0], [-1, 0]], atol=1e-8)  # epsilon is 1e-8


# --- generalised advantage estimation -------------------------------------------------------------------------------


def slow_gae(rewards, values, mask, discount, gae_lambda, next_values, ends_episode):
    """Â_t = Σ_n (γλ)^n δ_{t+n}, summed forward over the counted steps of the same episode."""
    result = np.zeros_like(rewards)
    for row in range(len(rewards)):
        steps = np.flatnonzero(mask[row])
        for i, step in enumerate(steps):
            weight = 1.0
            for j in range(i, len(steps)):
                now, last = steps[j], j + 1 == len(steps)
                # An end counts on a step that does not count too, up to the next one that does.
                until = len(mask[row]) if last else steps[j + 1]
                ends = ends_episode is not None and ends_episode[row, now:until].any()
                if next_values is not None:
                    next_value = next_values[row, now]
                else:
                    next_value = 0.0 if last or ends else values[row, steps[j + 1]]
                result[row, step] += weight * (rewards[row, now] + discount * next_value - values[row, now])
                weight *= discount * gae_lambda
                if ends:
                    break
    return result


def test_gae_by_hand():
    # Caught by planting: values shifted by one, λ left out of the sum, the sign of V_t, a bootstrap across an end.
    rewards, values = torch.tensor([[1.0, NAN, 2.0, 3.0]]), torch.tensor([[0.5, NAN, 1.0, 2.0]])
    mask = torch.tensor([[True, False, True, True]])
    # γ = 0.5, λ = 0.5: δ = 1 + ½·1 − ½ = 1; 2 + ½·2 − 1 = 2; 3 − 2 = 1. Â = 1; 2 + ¼·1 = 2.25; 1 + ¼·2.25 = 1.5625
    advantages = gae(rewards, values, mask=mask, discount=0.5, gae_lambda=0.5)
    assert advantages.tolist() == [[1.5625, 0.0, 2.25, 1.0]]
    # The episode ends with the third step: δ = 1; 2 − 1 = 1; 1. Â = 1; 1; 1 + ¼·1
    ends = torch.tensor([[False, False, True, False]])
    assert gae(rewards, values, mask=mask, discount=0.5, gae_lambda=0.5, ends_episode=ends).tolist() == [
        [1.25, 0, 1, 1]
    ]
    # It ends with the second too, which does not count: δ = 1 − ½ of the first, and nothing follows it.
    masked_end = torch.tensor([[False, True, True, False]])
    assert gae(rewards, values, mask=mask, discount=0.5, gae_lambda=0.5, ends_episode=masked_end).tolist() == [
        [0.5, 0, 1, 1]
    ]
    # A time limit there, in a state worth 4: δ = 1; 2 + ½·4 − 1 = 3; and the last continues into a state worth 6:
    # 3 + ½·6 − 2 = 4. Â = 4; 3; 1 + ¼·3
    next_values = torch.tensor([[1.0, NAN, 4.0, 6.0]])
    cut = gae(rewards, values, mask=mask, discount=0.5, gae_lambda=0.5, next_values=next_values, ends_episode=ends)
    assert cut.tolist() == [[1.75, 0, 3, 4]]


@given(SEEDS, st.integers(1, 3), st.integers(1, 6), st.booleans(), st.booleans())
def test_gae_equals_slow_reference(seed, batch, steps, bootstrapped, with_ends):
    rng = np.random.default_rng(seed)
    rewards, values, next_values = rng.normal(size=(3, batch, steps))
    mask, ends_episode = rng.random((batch, steps)) < 0.7, rng.random((batch, steps)) < 0.3
    discount, gae_lambda = rng.random(2)
    next_values, ends_episode = next_values if bootstrapped else None, ends_episode if with_ends else None
    result = gae(
        torch.tensor(rewards),
        torch.tensor(values),
        mask=torch.tensor(mask),
        discount=discount,
        gae_lambda=gae_lambda,
        next_values=None if next_values is None else torch.tensor(next_values),
        ends_episode=None if ends_episode is None else torch.tensor(ends_episode),
    )
    expected = slow_gae(rewards, values, mask, discount, gae_lambda, next_values, ends_episode)
    np.testing.assert_allclose(result, expected, atol=1e-13)


@given(SEEDS, st.sampled_from([0.0, 0.9, 1.0]))
def test_gae_limits_and_padding(seed, discount):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, 2, 5, dtype=torch.float64, generator=generator)
    mask = torch.ones(2, 5, dtype=torch.bool)
    one = gae(rewards, values, mask=mask, discount=discount, gae_lambda=1.0)
    np.testing.assert_allclose(one, reward_to_go(rewards, mask, discount=discount) - values, atol=1e-13)
    zero = gae(rewards, values, mask=mask, discount=discount, gae_lambda=0.0)
    next_values = torch.cat([values[:, 1:], torch.zeros(2, 1)], dim=1)
    np.testing.assert_allclose(zero, rewards + discount * next_values - values, atol=1e-13)
    # Padding of NaN to the left, to the right and as a new row, and one hole in the middle.
    padded = [torch.nn.functional.pad(x, (2, 1, 0, 1), value=NAN) for x in (rewards, values)]
    padded_mask = torch.nn.functional.pad(mask, (2, 1, 0, 1), value=False)
    holed = [torch.cat([x[:, :4], torch.full((3, 1), NAN), x[:, 4:]], dim=1) for x in padded]
    holed_mask = torch.cat([padded_mask[:, :4], torch.zeros(3, 1, dtype=torch.bool), padded_mask[:, 4:]], dim=1)
    for gae_lambda, expected in ((1.0, one), (0.0, zero)):
        again = gae(*holed, mask=holed_mask, discount=discount, gae_lambda=gae_lambda)
        np.testing.assert_allclose(again[holed_mask].reshape(2, 5), expected, atol=1e-13)
        assert again[~holed_mask].abs().max() == 0.0


def test_gae_reports_both_coefficients():
    with pytest.raises(ConfigError) as caught:
        gae(
            torch.zeros(1, 1), torch.zeros(1, 1), mask=torch.ones(1, 1, dtype=torch.bool), discount=2.0, gae_lambda=-1.0
        )
    assert len(caught.value.faults) == 2
