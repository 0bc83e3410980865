"""The sampled bandits as a vector environment of Gymnasium."""

from __future__ import annotations

import numpy as np
import pytest
from gymnasium.error import ResetNeeded

from preceptor.errors import ConfigError
from preceptor.systems.bandit.environment import BanditFamily
from preceptor.systems.bandit.vector_env import vector_env


def test_an_episode_pays_what_its_arms_pay() -> None:
    env = vector_env(BanditFamily(3), num_envs=2000, rounds=20)
    observations, _ = env.reset(seed=0)
    assert env.observation_space.contains(observations)
    assert (observations["action"] == 3).all(), "nothing was pulled yet"
    generator = np.random.default_rng(0)
    rewards, regrets = [], []
    for round_ in range(20):
        actions = generator.integers(3, size=2000)
        observations, paid, terminations, truncations, info = env.step(actions)
        assert env.observation_space.contains(observations)
        assert np.array_equal(observations["action"], actions)
        assert np.array_equal(observations["reward"], paid)
        assert (terminations == (round_ == 19)).all()
        assert not truncations.any()
        rewards.append(paid)
        regrets.append(info["regret"])
    # Uniform means: a random arm pays 1/2 and the best of three 3/4. Four standard errors of 2,000 bandits.
    assert np.mean(rewards) == pytest.approx(0.5, abs=4 * 0.29 / 2000**0.5)
    assert np.mean(regrets) == pytest.approx(0.25, abs=4 * 0.29 / 2000**0.5)


def test_after_the_last_round_new_bandits_begin() -> None:
    env = vector_env(num_envs=4, rounds=2)
    env.reset(seed=1)
    first = [env.step(np.zeros(4, dtype=np.int64))[4]["regret"] for _ in range(2)]
    assert np.array_equal(*first), "an episode's bandits stay the same"
    observations, rewards, terminations, _, _ = env.step(np.zeros(4, dtype=np.int64))
    assert (observations["round"] == 0).all()
    assert not rewards.any()
    assert not terminations.any()
    assert not np.array_equal(first[0], env.step(np.zeros(4, dtype=np.int64))[4]["regret"])


def test_a_seed_is_the_same_episode_and_a_reset_without_one_another() -> None:
    first, second = (vector_env(num_envs=8, rounds=5) for _ in range(2))
    actions = np.arange(8) % 2
    paid = []
    for env in (first, second):
        env.reset(seed=7)
        paid.append([env.step(actions)[1].tolist() for _ in range(5)])
    assert paid[0] == paid[1]
    first.reset()
    assert paid[0] != [first.step(actions)[1].tolist() for _ in range(5)]


def test_what_it_refuses() -> None:
    env = vector_env(num_envs=2)
    with pytest.raises(ResetNeeded):
        env.step(np.zeros(2, dtype=np.int64))
    env.reset(seed=0)
    with pytest.raises(ConfigError, match="`actions` must be 2 numbers from 0 to 1"):
        env.step(np.array([0, 2]))
    with pytest.raises(ConfigError, match="`num_envs` and `rounds` must be at least 1, got 0 and 100"):
        vector_env(num_envs=0)
