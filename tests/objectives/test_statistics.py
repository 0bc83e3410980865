from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from preceptor.errors import CheckpointError
from preceptor.objectives import RunningMoments, masked_mean, masked_variance, whiten

NAN = float("nan")
FLOATS = st.floats(min_value=-1e6, max_value=1e6)


def bools(*values):
    return torch.tensor(values, dtype=torch.bool)


# --- masked mean and variance ---------------------------------------------------------------------------------------


def test_masked_moments_by_hand():
    values = torch.tensor([[1.0, 2.0, 100.0], [6.0, NAN, float("inf")]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    # mean (1 + 2 + 6) / 3 = 3; squared deviations 4 + 1 + 9 = 14; over n − 1 = 2: 7; over n = 3: 14/3
    assert masked_mean(values, mask).item() == 3.0
    assert masked_variance(values, mask).item() == 7.0
    assert masked_variance(values, mask, unbiased=False).item() == pytest.approx(14 / 3)


def test_empty_and_single_masks_are_zero_with_a_graph():
    values = torch.tensor([1.0, NAN], requires_grad=True)
    for mask in (bools(False, False), bools(True, False)):
        result = masked_mean(values, mask) * 0 + masked_variance(values, mask)
        assert result.item() == 0.0
        (gradient,) = torch.autograd.grad(result, values)
        assert gradient.tolist() == [0.0, 0.0]


@given(st.lists(st.tuples(FLOATS, st.booleans()), min_size=1, max_size=20))
def test_masked_moments_equal_numpy_on_what_counts(pairs):
    values = torch.tensor([value for value, _ in pairs], dtype=torch.float64)
    mask = bools(*[counts for _, counts in pairs])
    counted = np.array([value for value, counts in pairs if counts])
    scale = 1 + float(np.abs(counted).max(initial=0.0))
    assert masked_mean(values, mask).item() == pytest.approx(counted.mean() if counted.size else 0.0, abs=1e-14 * scale)
    expected = counted.var(ddof=1) if counted.size > 1 else 0.0
    assert masked_variance(values, mask).item() == pytest.approx(expected, abs=1e-13 * scale**2)


def test_gradients_in_float64():
    values = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=torch.float64, requires_grad=True)
    mask = bools(True, True, False, True)
    for function in (masked_mean, masked_variance, whiten):
        assert gradcheck(lambda x, function=function: function(x, mask), values)


# --- whiten ---------------------------------------------------------------------------------------------------------


def test_whiten_by_hand():
    # mean 4, deviations −3, −1, 4, sample variance (9 + 1 + 16) / 2 = 13
    values = torch.tensor([1.0, NAN, 3.0, 8.0], dtype=torch.float64)
    whitened = whiten(values, bools(True, False, True, True))
    np.testing.assert_allclose(whitened, np.array([-3, 0, -1, 4]) / math.sqrt(13), rtol=1e-8)  # epsilon is 1e-8


@pytest.mark.parametrize("value", [0.1, -1e6, 3e-7])
def test_whiten_of_equal_values_is_exactly_zero(value):
    # The mean of ten times 0.1, computed in float32, is not 0.1.
    for num in range(1, 12):
        assert whiten(torch.full((num,), value), torch.ones(num, dtype=torch.bool)).tolist() == [0.0] * num
    assert whiten(torch.full((3,), value), bools(False, True, False)).tolist() == [0.0, 0.0, 0.0]
    assert whiten(torch.full((3,), NAN), bools(False, False, False)).tolist() == [0.0, 0.0, 0.0]


@given(st.lists(st.integers(-1000, 1000), min_size=2, max_size=20).filter(lambda xs: len(set(xs)) > 1))
def test_whitened_values_have_mean_zero_and_variance_one(values):
    mask = torch.ones(len(values), dtype=torch.bool)
    whitened = whiten(torch.tensor(values, dtype=torch.float64), mask)
    assert whitened.mean().item() == pytest.approx(0.0, abs=1e-12)
    assert whitened.var().item() == pytest.approx(1.0, abs=1e-6)  # epsilon 1e-8 against a variance of at least 1/20


# --- running moments ------------------------------------------------------------------------------------------------


def test_running_moments_by_hand():
    # Caught by planting: divisor n (2.160 for 2.646), and NaN let through.
    moments = RunningMoments()
    assert (moments.mean, moments.standard_deviation, moments.count) == (0.0, 0.0, 0)
    moments.update(torch.tensor([2.0, NAN]))
    assert (moments.mean, moments.standard_deviation, moments.count, moments.num_excluded) == (2.0, 0.0, 1, 1)
    moments.update(torch.tensor([[float("inf"), 1.0], [-float("inf"), 6.0]]))
    # mean (2 + 1 + 6) / 3 = 3; squared deviations 1 + 4 + 9 = 14, over 2: 7
    assert moments.mean == pytest.approx(3.0, rel=1e-15)
    assert moments.standard_deviation == pytest.approx(math.sqrt(7), rel=1e-15)
    assert (moments.count, moments.num_excluded) == (3, 3)


@given(st.lists(FLOATS, max_size=30), st.integers(0, 30))
def test_running_moments_equal_numpy_however_split(values, cut):
    moments = RunningMoments()
    for part in (values[:cut], values[cut:]):
        moments.update(torch.tensor(part, dtype=torch.float64))
    scale = 1 + max(map(abs, values), default=0.0)
    assert moments.count == len(values)
    assert moments.mean == pytest.approx(np.mean(values) if values else 0.0, abs=1e-13 * scale)
    expected = np.std(values, ddof=1) if len(values) > 1 else 0.0
    # The square root turns a relative error of 1e-16 in the squares into 1e-8 where the spread is almost nothing.
    assert moments.standard_deviation == pytest.approx(expected, abs=1e-7 * scale)


def test_a_large_offset_does_not_cancel():
    # The textbook formula E[x²] − E[x]² gives 0 or worse here: 1e18 has a spacing of 128 in float64.
    moments = RunningMoments()
    moments.update(torch.tensor([1e9 + 4, 1e9 + 7, 1e9 + 13, 1e9 + 16], dtype=torch.float64))
    assert moments.standard_deviation == pytest.approx(math.sqrt(30), rel=1e-12)  # deviations −6, −3, 3, 6: 90 / 3


@given(st.lists(FLOATS, min_size=1, max_size=10), st.lists(FLOATS, max_size=10))
def test_state_survives_json_bit_for_bit(before, after):
    straight, saved, resumed = RunningMoments(), RunningMoments(), RunningMoments()
    straight.update(torch.tensor([*before, NAN, *after], dtype=torch.float64))
    saved.update(torch.tensor([*before, NAN], dtype=torch.float64))
    resumed.load_state_dict(json.loads(json.dumps(saved.state_dict())))
    resumed.update(torch.tensor(after, dtype=torch.float64))
    assert resumed.state_dict() == straight.state_dict()
    assert resumed.num_excluded == 1


def test_a_damaged_state_is_refused_and_changes_nothing():
    moments = RunningMoments()
    moments.update(torch.tensor([1.0, 2.0]))
    state = moments.state_dict()
    with pytest.raises(CheckpointError, match=r"keys \['count', 'mean'\]; expected"):
        moments.load_state_dict({"count": 1, "mean": 0.0})
    assert moments.state_dict() == state
