from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preceptor.errors import ConfigError
from preceptor.objectives import against_baseline, group_normalised, leave_one_out, mean_reward_to_go, reward_to_go

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
    )
    assert [result.requires_grad for result in results] == [False] * 6
