from __future__ import annotations

import pytest
import torch

from preceptor.systems.bandit.environment import Bandit, sample_tables

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


def test_which_word_pays_is_dealt_anew() -> None:
    tables = sample_tables(BEANS, num_episodes=2000, num_rounds=3, generator=generator())
    first_is_best = (tables.expected[:, 0] == 7.5).double().mean().item()
    assert first_is_best == pytest.approx(0.5, abs=0.034)  # three standard deviations
    means = tables.rewards.mean(1)
    best = means.gather(1, tables.expected.argmax(1, keepdim=True)).mean().item()
    assert best == pytest.approx(7.5, abs=0.17)
