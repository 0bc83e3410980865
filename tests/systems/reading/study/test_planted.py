"""A world whose best reading is known: it is learned, and not where nothing can be learned."""

from __future__ import annotations

from typing import Any

import torch

from preceptor.systems.reading.study.loop import State, step, table_rewards
from preceptor.systems.reading.study.policy import read
from tests.systems.reading.study.small import planted_cases, planted_setup

CHANCE = 1 / 3
"""Of a random candidate; the best reading is worth 1."""


def closed(seed: int, **changes: Any) -> tuple[float, float]:
    """Share of the gap from random to best that sampled readings of *new* cases close: after training, and before."""
    setup = planted_setup(planted_cases(96, seed=seed), seed=seed, **changes)
    state = State(setup)
    new, shares = planted_cases(64, seed=500 + seed), []
    for num_steps in (0, setup.config.update.steps):
        for number in range(1, num_steps + 1):
            step(setup, state, number)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            readings = read(state.policies["asked"], new, budget=4, num_readings=8, generator=generator)
        shares.append((float(table_rewards(new.gains, readings).mean()) - CHANCE) / (1 - CHANCE))
    return shares[1], shares[0]


def test_the_skill_is_learned_and_holds_on_new_cases() -> None:
    shares = [closed(seed)[0] for seed in range(10)]
    assert sum(share >= 0.9 for share in shares) >= 9, shares


def test_no_learning_rate_teaches_nothing() -> None:
    after, before = closed(0, update={"projection_learning_rate": 0.0}, study={"learning_rate": 0.0})
    assert after == before
    assert abs(before) < 0.1


def test_shuffled_rewards_teach_nothing() -> None:
    """Rewards of other readings move the policy about at random: up under some seeds, down under others."""
    shares = [closed(seed, shuffle_rewards=True)[0] for seed in range(6)]
    assert abs(sum(shares) / len(shares)) < 0.15, shares
    assert max(shares) < 0.4, shares


def test_a_reward_by_hand() -> None:
    cases = planted_cases(1, seed=0, num_candidates=6)
    order = torch.tensor([[[0, 1], [2, 5]]])
    setup = planted_setup(cases, seed=0)
    readings = read(setup.policy("asked"), cases, budget=2, num_readings=2, generator=None, imposed=order)
    gains = torch.tensor([[1.0, 2.0, 4.0, 0.0, 0.0, -1.0]])
    assert table_rewards(gains, readings).tolist() == [[1.5, 1.5]]
