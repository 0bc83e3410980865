from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from preceptor.errors import ConfigError
from preceptor.objectives import explained_variance, value_loss

NAN = float("nan")
SEEDS = st.integers(0, 2**32 - 1)


def slow_value_loss(values, returns, old, mask, epsilon):
    """Value and gradient, one state at a time, mean over states."""
    total, gradient = 0.0, np.zeros_like(values)
    for i, t in np.argwhere(mask):
        error = values[i, t] - returns[i, t]
        clipped = min(max(values[i, t], old[i, t] - epsilon), old[i, t] + epsilon) - returns[i, t]
        total += 0.5 * max(error**2, clipped**2)
        gradient[i, t] = error if error**2 >= clipped**2 else 0.0
    num = max(mask.sum(), 1)
    return total / num, gradient / num


def test_value_loss_by_hand():
    # Caught by planting: min for max, the clip around the returns, no half.
    values = torch.tensor([[2.0, 2.0, NAN]], requires_grad=True)
    returns, old = torch.tensor([[3.0, 1.0, NAN]]), torch.tensor([[1.0, 1.0, NAN]])
    mask = torch.tensor([[True, True, False]])
    # ½ · 1 twice
    assert value_loss(values, returns, mask=mask).item() == 0.5
    # Clipped to 1.5: the first is ½ (1.5 − 3)² = 1.125, it has moved far enough; the second stays ½ · 1 (or ½ · 0.25)
    loss = value_loss(values, returns, mask=mask, old_values=old, clip_epsilon=0.5)
    assert loss.item() == (1.125 + 0.5) / 2
    loss.backward()
    assert values.grad.tolist() == [[0.0, 0.5, 0.0]]


@given(SEEDS)
def test_value_loss_equals_slow_reference(seed):
    rng = np.random.default_rng(seed)
    values, returns, old = rng.normal(size=(3, 2, 4))
    mask = rng.random((2, 4)) < 0.7
    expected_value, expected_gradient = slow_value_loss(values, returns, old, mask, 0.4)
    now = torch.tensor(values, requires_grad=True)
    junk = [torch.tensor(x).masked_fill(~torch.tensor(mask), NAN) for x in (returns, old)]  # padding changes nothing
    loss = value_loss(now, junk[0], mask=torch.tensor(mask), old_values=junk[1], clip_epsilon=0.4)
    assert loss.item() == pytest.approx(expected_value, abs=1e-13)
    np.testing.assert_allclose(torch.autograd.grad(loss, now)[0], expected_gradient, atol=1e-13)


def test_value_loss_gradients():
    generator = torch.Generator().manual_seed(0)
    values, returns, old = torch.randn(3, 2, 4, dtype=torch.float64, generator=generator)
    mask = torch.rand(2, 4, generator=generator) < 0.7
    for keywords in ({}, {"old_values": old, "clip_epsilon": 0.4}):
        assert gradcheck(
            lambda v, keywords=keywords: value_loss(v, returns, mask=mask, **keywords), values.clone().requires_grad_()
        )
    for tensor in (values, returns, old):
        tensor.requires_grad_()
    value_loss(values, returns, mask=mask, old_values=old, clip_epsilon=0.4).backward()
    assert returns.grad is None
    assert old.grad is None
    nothing = value_loss(values, returns, mask=torch.zeros_like(mask))
    assert nothing.item() == 0.0
    assert torch.autograd.grad(nothing, values)[0].abs().max() == 0.0


def test_value_loss_errors():
    zeros, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    for keywords in ({"old_values": zeros}, {"clip_epsilon": 0.1}):
        with pytest.raises(ConfigError, match="clip_epsilon and old_values belong together"):
            value_loss(zeros, zeros, mask=mask, **keywords)
    with pytest.raises(ConfigError, match=r"clip_epsilon must be positive, got 0\.0"):
        value_loss(zeros, zeros, mask=mask, old_values=zeros, clip_epsilon=0.0)


def test_explained_variance_by_hand():
    returns = torch.tensor([1.0, 2.0, 3.0, NAN])
    mask = torch.tensor([True, True, True, False])
    # Var(R) = 1. Perfect up to a constant: 1. A constant: 0. Reversed: R − V = −2, 0, 2, variance 4, so 1 − 4.
    assert explained_variance(returns + 5, returns, mask).item() == 1.0
    assert explained_variance(torch.zeros(4), returns, mask).item() == 0.0
    assert explained_variance(torch.tensor([3.0, 2.0, 1.0, 0.0]), returns, mask).item() == -3.0


def test_explained_variance_of_equal_returns_is_zero():
    mask = torch.ones(3, dtype=torch.bool)
    assert explained_variance(torch.tensor([1.0, 2.0, 3.0]), torch.full((3,), 2.0), mask).item() == 0.0
    assert explained_variance(torch.zeros(3), torch.zeros(3), ~mask).item() == 0.0
