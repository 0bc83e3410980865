from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preceptor.errors import ConfigError
from preceptor.objectives import RunningMoments, above_standard_deviations, best_fraction, everything

NAN, INF = float("nan"), float("inf")


def moments_of(*values):
    moments = RunningMoments()
    moments.update(torch.tensor(values, dtype=torch.float64))
    return moments


def test_above_standard_deviations_by_hand():
    # Caught by planting: ≥ for >, a threshold below the mean, and a warm-up that is one too long or short.
    moments = moments_of(1.0, 2.0, 3.0, NAN)  # mean 2, standard deviation 1, three counted
    rewards = torch.tensor([3.0, 3.001, 4.0, 4.001, NAN, INF, -INF])
    assert above_standard_deviations(rewards, moments=moments, num_warm_up=3).tolist() == [0, 1, 1, 1, 0, 0, 0]
    two = above_standard_deviations(rewards, moments=moments, num_standard_deviations=2.0, num_warm_up=3)
    assert two.tolist() == [0, 0, 0, 1, 0, 0, 0]
    assert not above_standard_deviations(rewards, moments=moments, num_warm_up=4).any()


def test_one_nan_does_not_close_the_filter_for_good():
    moments = moments_of(NAN, *[0.0, 1.0] * 10, NAN)
    assert above_standard_deviations(torch.tensor([NAN, 2.0]), moments=moments).tolist() == [False, True]


def test_nothing_passes_before_any_reward_and_nothing_equal_passes_ever():
    assert not above_standard_deviations(torch.tensor([5.0]), moments=RunningMoments(), num_warm_up=0).any()
    rewards = torch.full((4,), 0.1)  # as float64 it is 0.10000000149, and so is the mean
    moments = RunningMoments()
    moments.update(rewards.repeat(5))
    assert not above_standard_deviations(rewards, moments=moments).any()


def test_rewards_are_compared_in_float64():
    # The float32 nearest to 0.1 is 0.10000000149, which is above a threshold of 0.1.
    above, below = torch.tensor(0.1), torch.nextafter(torch.tensor(0.1), torch.tensor(0.0))
    moments = moments_of(0.1, 0.1)
    assert above_standard_deviations(torch.stack([above, below]), moments=moments, num_warm_up=2).tolist() == [1, 0]


def test_a_gaussian_filter_passes_sixteen_percent():
    rewards = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    moments = RunningMoments()
    moments.update(rewards)
    share = above_standard_deviations(rewards, moments=moments).double().mean().item()
    assert share == pytest.approx(0.1587, abs=3 * 0.0026)  # 1 − Φ(1); standard error √(0.1587 · 0.8413 / 20,000)


def test_bad_arguments_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        above_standard_deviations(torch.zeros(1), moments=RunningMoments(), num_standard_deviations=NAN, num_warm_up=-1)
    assert len(caught.value.faults) == 2


def test_best_fraction_by_hand():
    rewards = torch.tensor([1.0, 5.0, 3.0, NAN, 5.0, INF, 3.0])
    # Five are finite: 5, 5, 3, 3, 1. Of 0.2: one, the earlier 5. Of 0.5: ⌈2.5⌉ = 3, the earlier 3 among them.
    assert best_fraction(rewards, fraction=0.2).tolist() == [0, 1, 0, 0, 0, 0, 0]
    assert best_fraction(rewards, fraction=0.5).tolist() == [0, 1, 1, 0, 1, 0, 0]
    assert best_fraction(rewards, fraction=1.0).tolist() == everything(rewards).tolist() == [1, 1, 1, 0, 1, 0, 1]


def test_best_fraction_counts_as_written():
    assert best_fraction(torch.arange(100.0), fraction=0.07).sum() == 7  # 0.07 · 100 is 7.000000000000001
    assert best_fraction(torch.arange(30.0), fraction=0.1).sum() == 3
    assert best_fraction(torch.arange(30.0), fraction=0.001).sum() == 1
    assert best_fraction(torch.tensor([NAN, NAN]), fraction=1.0).sum() == 0


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=12), st.floats(0.01, 1.0))
def test_best_fraction_equals_slow_reference(rewards, fraction):
    num = int(np.ceil(fraction * len(rewards) - 1e-9))
    best = sorted(range(len(rewards)), key=lambda i: (-rewards[i], i))[:num]
    passed = best_fraction(torch.tensor(rewards, dtype=torch.float32), fraction=fraction)
    assert passed.nonzero().flatten().tolist() == sorted(best)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, NAN])
def test_bad_fraction(fraction):
    with pytest.raises(ConfigError, match=r"fraction must lie in \(0, 1\], got"):
        best_fraction(torch.zeros(1), fraction=fraction)
