from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from preceptor.errors import ConfigError
from preceptor.objectives import aggregate

KINDS = ("token_mean", "sequence_mean", "sequence_sum", "constant")


def divisor_of(kind):
    return 7.0 if kind == "constant" else None


def slow_aggregate(values, mask, kind):
    rows = [
        [v for v, counts in zip(row, flags, strict=True) if counts] for row, flags in zip(values, mask, strict=True)
    ]
    rows = [row for row in rows if row]
    flat = [v for row in rows for v in row]
    if not flat:
        return 0.0
    return {
        "token_mean": np.mean(flat),
        "sequence_mean": np.mean([np.mean(row) for row in rows]),
        "sequence_sum": np.mean([np.sum(row) for row in rows]),
        "constant": np.sum(flat) / 7.0,
    }[kind]


def test_by_hand():
    # Caught by planting: dividing by all rows (2 for 3), and sequence sums for sequence means.
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, float("nan"), float("inf")], [9.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    # tokens (1 + 2 + 3 + 4) / 4; sequences ((1 + 2 + 3) / 3 + 4) / 2 and (6 + 4) / 2, without the emptied third; 10 / 7
    expected = {"token_mean": 2.5, "sequence_mean": 3.0, "sequence_sum": 5.0, "constant": 10 / 7}
    for kind in KINDS:
        result = aggregate(values, mask, aggregation=kind, divisor=divisor_of(kind))
        assert result.item() == pytest.approx(expected[kind], rel=1e-6)


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 5), st.sampled_from(KINDS))
def test_equals_slow_reference_and_padding_changes_nothing(seed, batch, time, kind):
    rng = np.random.default_rng(seed)
    values, mask = rng.normal(size=(batch, time)), rng.random((batch, time)) < 0.6
    result = aggregate(torch.tensor(values), torch.tensor(mask), aggregation=kind, divisor=divisor_of(kind))
    assert result.item() == pytest.approx(slow_aggregate(values, mask, kind), abs=1e-13)
    padded = torch.nn.functional.pad(torch.tensor(values), (2, 3, 1, 1), value=float("nan"))
    padded_mask = torch.nn.functional.pad(torch.tensor(mask), (2, 3, 1, 1), value=False)
    again = aggregate(padded, padded_mask, aggregation=kind, divisor=divisor_of(kind))
    assert again.item() == pytest.approx(result.item(), abs=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_and_empty_mask(kind):
    values = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mask = torch.tensor([[True, True, False, True], [False] * 4, [True, False, False, False]])
    assert gradcheck(lambda x: aggregate(x, mask, aggregation=kind, divisor=divisor_of(kind)), values)
    nothing = aggregate(values, torch.zeros_like(mask), aggregation=kind, divisor=divisor_of(kind))
    assert nothing.item() == 0.0
    assert torch.autograd.grad(nothing, values)[0].abs().max() == 0.0


@pytest.mark.parametrize(
    ("kind", "divisor", "message"),
    [
        ("token_meen", None, r"got 'token_meen' \(did you mean 'token_mean'\?\)"),
        ("constant", None, "divisor must be positive for the aggregation 'constant', got None"),
        ("constant", 0.0, "got 0.0"),
        ("constant", float("nan"), "got nan"),
        ("token_mean", 3.0, "divisor goes with the aggregation 'constant' alone, got 3.0"),
    ],
)
def test_bad_configuration(kind, divisor, message):
    with pytest.raises(ConfigError, match=message):
        aggregate(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), aggregation=kind, divisor=divisor)
