from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from preceptor.objectives import entropy

INF = float("inf")


def test_by_hand():
    # Caught by planting: the sign, and 0 · (−∞) left in.
    # p = (1/2, 1/4, 1/4): ½ ln 2 + 2 · ¼ ln 4 = 1.5 ln 2
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0]], dtype=torch.float64).log()
    assert entropy(logits).item() == pytest.approx(1.5 * math.log(2), rel=1e-14)


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=8))
def test_equals_slow_reference_within_bounds_and_ignores_shift(logits):
    weights = np.exp(np.array(logits) - max(logits))
    probs = weights / weights.sum()
    expected = -sum(p * math.log(p) for p in probs if p > 0)
    result = entropy(torch.tensor(logits, dtype=torch.float64))
    assert result.item() == pytest.approx(expected, abs=1e-12)
    assert -1e-12 <= result.item() <= math.log(len(logits)) + 1e-12
    assert entropy(torch.tensor(logits, dtype=torch.float64) + 5.0).item() == pytest.approx(result.item(), abs=1e-12)
    log_probs = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), dim=-1)
    assert entropy(log_probs).item() == pytest.approx(result.item(), abs=1e-12)


def test_gradient_with_impossible_outcomes_and_without_any():
    logits = torch.tensor([[0.3, -INF, 1.0], [-INF, -INF, -INF], [-INF, 2.0, -INF]], dtype=torch.float64)
    logits.requires_grad_()
    result = entropy(logits)
    assert result[1:].tolist() == [0.0, 0.0]
    (gradient,) = torch.autograd.grad(result.sum(), logits)
    # dH/dz_i = −p_i (ln p_i + H) on the two possible outcomes of the first row, 0 elsewhere.
    p = torch.softmax(torch.tensor([0.3, 1.0], dtype=torch.float64), dim=0)
    expected = torch.zeros(3, 3, dtype=torch.float64)
    expected[0, [0, 2]] = -p * (p.log() - (p * p.log()).sum())
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)
    assert gradcheck(
        entropy, torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    )
