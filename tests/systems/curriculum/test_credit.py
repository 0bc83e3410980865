"""Advantages of every kind against plain loops over one sequence at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from preceptor.systems.curriculum.choices import ADVANTAGES
from preceptor.systems.curriculum.credit import credit_tokens

SEEDS = st.integers(0, 10_000)
repeatable = settings(derandomize=True, deadline=None, max_examples=50)


def draw(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards and values, and continuations that end at different places."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 6, size=4)
    mask = np.arange(5) < lengths[:, None]
    return (
        torch.tensor(random.normal(size=(4, 5))),
        torch.tensor(random.normal(size=(4, 5))),
        torch.tensor(mask),
    )


@repeatable
@given(SEEDS)
def test_gae_runs_over_the_tokens_of_one_sequence(seed: int) -> None:
    # The predecessor ran it across the batch, so that unrelated texts were each other's future.
    rewards, values, mask = draw(seed)
    credit = credit_tokens(
        rewards, mask, kind="gae", values=values, discount=0.9, gae_lambda=0.8, whiten_advantages=False
    )
    expected = np.zeros((4, 5))
    for row in range(4):
        following_value = following = 0.0
        for token in reversed(range(int(mask[row].sum()))):
            error = float(rewards[row, token]) + 0.9 * following_value - float(values[row, token])
            following = error + 0.9 * 0.8 * following
            following_value = float(values[row, token])
            expected[row, token] = following
    np.testing.assert_allclose(credit.advantages, expected, atol=1e-12)
    assert credit.returns is not None
    np.testing.assert_allclose(credit.returns, expected + np.where(mask, values, 0), atol=1e-12)


@repeatable
@given(SEEDS)
def test_whitened_gae_has_mean_0_and_deviation_1_over_what_counts(seed: int) -> None:
    rewards, values, mask = draw(seed)
    counted = credit_tokens(rewards, mask, kind="gae", values=values).advantages[mask]
    assert float(counted.mean()) == pytest.approx(0, abs=1e-9)
    if len(counted) > 1:
        assert float(counted.std()) == pytest.approx(1, abs=1e-3)


def test_groups_by_hand() -> None:
    # Two prompts with two continuations each; totals 1, 3 and 10, 10.
    rewards = torch.tensor([[1.0, 0.0], [1.0, 2.0], [10.0, 99.0], [4.0, 6.0]])
    mask = torch.tensor([[True, True], [True, True], [True, False], [True, True]])
    rloo = credit_tokens(rewards, mask, kind="rloo", group_size=2).advantages
    assert rloo.tolist() == [[-2, -2], [2, 2], [0, 0], [0, 0]]
    dr_grpo = credit_tokens(rewards, mask, kind="dr_grpo", group_size=2).advantages
    assert dr_grpo.tolist() == [[-1, -1], [1, 1], [0, 0], [0, 0]]
    grpo = credit_tokens(rewards, mask, kind="grpo", group_size=2).advantages
    torch.testing.assert_close(grpo, dr_grpo / (2**0.5 + 1e-4))  # sample deviation of 1 and 3 is √2


@pytest.mark.parametrize("kind", ADVANTAGES)
@repeatable
@given(seed=SEEDS)
def test_what_does_not_count_has_no_advantage_and_changes_nothing(kind: str, seed: int) -> None:
    rewards, values, mask = draw(seed)
    advantages = credit_tokens(rewards, mask, kind=kind, values=values, group_size=2).advantages
    junk = rewards.masked_fill(~mask, float("nan"))
    again = credit_tokens(junk, mask, kind=kind, values=values, group_size=2).advantages
    assert (advantages[~mask] == 0).all()
    assert torch.equal(advantages, again)


def test_equal_rewards_teach_nothing_in_groups() -> None:
    rewards, mask = torch.full((4, 3), 0.7), torch.ones(4, 3, dtype=torch.bool)
    for kind in ("rloo", "grpo", "dr_grpo"):
        assert (credit_tokens(rewards, mask, kind=kind, group_size=4).advantages == 0).all()
