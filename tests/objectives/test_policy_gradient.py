from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from preceptor.objectives import reinforce_loss

NAN, INF = float("nan"), float("inf")
SEEDS = st.integers(0, 2**32 - 1)


# --- REINFORCE ------------------------------------------------------------------------------------------------------


def test_reinforce_by_hand():
    # Caught by planting: the sign, and advantages shifted by one position.
    log_probs = torch.tensor([[-1.0, -2.0, -INF], [-4.0, NAN, NAN]], requires_grad=True)
    advantages = torch.tensor([[3.0, -1.0, NAN], [2.0, INF, 0.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    loss = reinforce_loss(log_probs, advantages, mask=mask)
    # sequence sums 3 · 1 − 1 · 2 = 1 and 2 · 4 = 8; mean 4.5
    assert loss.item() == 4.5
    loss.backward()
    assert log_probs.grad.tolist() == [[-1.5, 0.5, 0.0], [-1.0, 0.0, 0.0]]  # −A / 2 sequences
    assert advantages.grad is None


def test_reinforce_of_nothing_is_zero_with_a_graph():
    log_probs = torch.tensor([[-1.0, -INF, NAN]], requires_grad=True)
    loss = reinforce_loss(log_probs, torch.ones(1, 3), mask=torch.zeros(1, 3, dtype=torch.bool))
    assert loss.item() == 0.0
    loss.backward()
    assert log_probs.grad.tolist() == [[0.0, 0.0, 0.0]]


@given(SEEDS, st.integers(1, 3), st.integers(1, 4))
def test_reinforce_equals_slow_reference(seed, batch, time):
    rng = np.random.default_rng(seed)
    log_probs, advantages = -rng.random((batch, time)), rng.normal(size=(batch, time))
    mask = rng.random((batch, time)) < 0.7
    expected = sum(-advantages[i, t] * log_probs[i, t] for i, t in np.argwhere(mask)) / max(mask.sum(), 1)
    result = reinforce_loss(
        torch.tensor(log_probs), torch.tensor(advantages), mask=torch.tensor(mask), aggregation="token_mean"
    )
    assert result.item() == pytest.approx(expected, abs=1e-13)


def test_reinforce_gradient_in_float64():
    log_probs = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    advantages = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert gradcheck(lambda x: reinforce_loss(x, advantages, mask=mask, aggregation="sequence_mean"), log_probs)


def test_mean_reinforce_gradient_is_the_gradient_of_the_expected_reward():
    # All 3² sequences of two choices, weighed by their probability: Σ π ∇loss = −∇ Σ π R, whatever the baseline.
    logits = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rewards = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    log_policy = torch.log_softmax(logits, dim=-1)
    expected_reward = torch.zeros((), dtype=torch.float64)
    surrogate = torch.zeros((), dtype=torch.float64)
    for first in range(3):
        for second in range(3):
            log_probs = torch.stack([log_policy[0, first], log_policy[1, second]])[None]
            probability = log_probs.sum().exp()
            expected_reward = expected_reward + probability * rewards[first, second]
            advantages = (rewards[first, second] - 0.7).expand(1, 2)
            loss = reinforce_loss(log_probs, advantages, mask=torch.ones(1, 2, dtype=torch.bool))
            surrogate = surrogate + probability.detach() * loss
    (of_loss,) = torch.autograd.grad(surrogate, logits, retain_graph=True)
    (of_reward,) = torch.autograd.grad(expected_reward, logits)
    torch.testing.assert_close(of_loss, -of_reward, rtol=1e-12, atol=1e-14)
