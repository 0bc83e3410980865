from __future__ import annotations

import pytest
import torch

from preceptor.systems.bandit.environment import Bandit

BEANS = Bandit("beans", ("bean", "chickpea"), "bernoulli", 10.0, (0.75, 0.25))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_bernoulli_arms_pay_the_base_reward_as_often_as_they_should() -> None:
    rewards = BEANS.rewards(40_000, generator())
    assert set(rewards.unique().tolist()) == {0.0, 10.0}
    # Three standard errors of the mean: 10 · sqrt(0.75 · 0.25 / 40,000) = 0.0217.
    assert rewards.mean(0).tolist() == pytest.approx([7.5, 2.5], abs=0.065)
    assert BEANS.expected.tolist() == [7.5, 2.5]
    assert BEANS.best == 0


def test_gaussian_arms_have_their_mean_and_deviation_in_base_rewards() -> None:
    bandit = Bandit("g", ("a", "b"), "gaussian", 2.0, (1.0, -3.0), 0.5)
    rewards = bandit.rewards(40_000, generator())
    assert rewards.mean(0).tolist() == pytest.approx([2.0, -6.0], abs=0.015)
    assert rewards.std(0).tolist() == pytest.approx([1.0, 1.0], abs=0.011)


def test_dealing_anew_moves_what_the_words_pay_and_not_the_words() -> None:
    dealt = BEANS.permuted(torch.tensor([1, 0]))
    assert dealt.words == BEANS.words
    assert dealt.pays == (0.25, 0.75)
    assert dealt.best == 1


def test_the_same_seed_draws_the_same_table() -> None:
    assert torch.equal(BEANS.rewards(50, generator(3)), BEANS.rewards(50, generator(3)))
    assert not torch.equal(BEANS.rewards(50, generator(3)), BEANS.rewards(50, generator(4)))
