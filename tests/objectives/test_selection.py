from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from preceptor.errors import ConfigError, DataError, ShapeError
from preceptor.objectives import (
    calibrated_temperature,
    relative_selection_entropy,
    sample_selection,
    selection_entropy,
    selection_log_probs,
)

INF = float("inf")
SEEDS = st.integers(0, 2**32 - 1)


def slow_log_probs(queries, keys, available, temperature):
    result = np.full(available.shape, -np.inf)
    for row in np.ndindex(available.shape[:-1]):
        indices = np.flatnonzero(available[row])
        weights = {
            i: math.exp(sum(a * b for a, b in zip(queries[row], keys[i], strict=True)) / temperature) for i in indices
        }
        for i in indices:
            result[(*row, i)] = math.log(weights[i] / sum(weights.values()))
    return result


# --- log-probabilities ----------------------------------------------------------------------------------------------


def test_log_probs_by_hand():
    # Caught by planting: multiplying by the temperature; forgetting the mask in the softmax; masking its complement.
    queries = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    keys = torch.tensor([[3.0, 0.0], [1.0, 0.0], [9.0, 9.0], [1.0, 1.0]], dtype=torch.float64)
    available = torch.tensor([[True, True, False, True]])
    # inner products 3, 1, (27), 3; over temperature 2: 1.5, 0.5, –, 1.5; normaliser e^1.5 + e^0.5 + e^1.5
    normaliser = math.log(2 * math.exp(1.5) + math.exp(0.5))
    expected = [1.5 - normaliser, 0.5 - normaliser, -INF, 1.5 - normaliser]
    result = selection_log_probs(queries, keys, available_mask=available, temperature=2.0)
    np.testing.assert_allclose(result[0], expected, rtol=1e-14)


@given(SEEDS, st.integers(1, 3), st.integers(1, 5), st.sampled_from([0.3, 1.0, 4.0]))
def test_log_probs_equal_slow_reference_over_steps(seed, steps, pairs, temperature):
    rng = np.random.default_rng(seed)
    queries, keys = rng.normal(size=(2, steps, 3)), rng.normal(size=(pairs, 3))
    available = rng.random((2, steps, pairs)) < 0.6
    result = selection_log_probs(
        torch.tensor(queries), torch.tensor(keys), available_mask=torch.tensor(available), temperature=temperature
    )
    np.testing.assert_allclose(result, slow_log_probs(queries, keys, available, temperature), atol=1e-12)
    total = result.exp().sum(dim=-1)
    np.testing.assert_allclose(total, available.any(axis=-1), atol=1e-12)  # a distribution, or nothing at all
    for step in range(steps):  # all steps at once and one at a time are the same
        single = selection_log_probs(
            torch.tensor(queries[:, step]),
            torch.tensor(keys),
            available_mask=torch.tensor(available[:, step]),
            temperature=temperature,
        )
        np.testing.assert_allclose(single, result[:, step], atol=1e-14)


def test_exhausted_row_is_minus_infinity_with_finite_gradients():
    queries = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    keys = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    available = torch.tensor([[True, False, True, True, False], [False] * 5, [False, True, False, False, False]])
    log_probs = selection_log_probs(queries, keys, available_mask=available, temperature=0.5)
    assert log_probs[1].tolist() == [-INF] * 5
    assert log_probs[2].tolist() == [-INF, 0.0, -INF, -INF, -INF]
    # The entropy, the sampled log-probabilities and the entries at −∞ themselves all send finite gradients.
    sampled = log_probs.gather(-1, torch.tensor([[2], [0], [1]])).squeeze(-1)
    weights = torch.tensor([1.0, 0.0, 1.0])
    loss = (
        selection_entropy(log_probs, available).sum()
        - (weights * sampled.masked_fill(~available.any(-1), 0.0)).sum()
        + log_probs[1, 0]
    )
    # Not even in between: whoever hunts another NaN with anomaly detection must not be stopped here.
    with torch.autograd.set_detect_anomaly(True):
        gradients = torch.autograd.grad(loss, (queries, keys))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[0][0].abs().sum() > 0  # the row with a choice learns
    assert gradients[0][1:].abs().max() == 0.0  # rows without one do not
    assert gradients[1][[1, 4]].abs().max() == 0.0  # nor do keys that no row with a choice could take


def test_gradients_in_float64():
    queries = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    keys = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    available = torch.tensor([[True, True, False, True], [False, True, True, False]])

    def available_log_probs(queries, keys):
        return selection_log_probs(queries, keys, available_mask=available, temperature=0.7)[available]

    def entropies(queries, keys):
        log_probs = selection_log_probs(queries, keys, available_mask=available, temperature=0.7)
        return relative_selection_entropy(log_probs, available)

    assert gradcheck(available_log_probs, (queries, keys))
    assert gradcheck(entropies, (queries, keys))


def test_half_precision_is_scored_in_float32():
    # 1 + 1/128 is a bfloat16, its square is not: in bfloat16 both inner products would round to 1.0156.
    queries = torch.tensor([[1 + 1 / 128]], dtype=torch.bfloat16)
    keys = torch.tensor([[1 + 1 / 128], [1.0]], dtype=torch.bfloat16)
    available = torch.ones(1, 2, dtype=torch.bool)
    log_probs = selection_log_probs(queries, keys, available_mask=available, temperature=0.01)
    assert log_probs.dtype == torch.float32
    assert (log_probs[0, 0] - log_probs[0, 1]).item() == pytest.approx((1 + 1 / 128) / 128 / 0.01, rel=1e-5)


@pytest.mark.parametrize("temperature", [0.0, -1.0, INF, float("nan")])
def test_bad_temperature(temperature):
    with pytest.raises(ConfigError, match="temperature must be positive and finite, got"):
        selection_log_probs(
            torch.zeros(1, 2),
            torch.zeros(3, 2),
            available_mask=torch.ones(1, 3, dtype=torch.bool),
            temperature=temperature,
        )


# --- sampling -------------------------------------------------------------------------------------------------------


def test_sampling_follows_the_probabilities_and_never_takes_what_is_gone():
    log_probs = torch.tensor([0.7, 0.0, 0.3]).log().expand(2, 10_000, 3)
    drawn = sample_selection(log_probs, generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (2, 10_000)
    assert (drawn == 1).sum() == 0
    # 20,000 draws: standard error √(0.7 · 0.3 / 20,000) = 0.0032
    assert (drawn == 0).double().mean().item() == pytest.approx(0.7, abs=3 * 0.0033)
    again = sample_selection(log_probs, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)


def test_sampling_from_nothing_is_refused():
    log_probs = torch.tensor([[0.0, -INF], [-INF, -INF]])
    with pytest.raises(ShapeError, match="1 of 2 rows have no available key left"):
        sample_selection(log_probs, generator=None)


# --- entropy --------------------------------------------------------------------------------------------------------


def test_entropy_by_hand():
    probabilities = torch.tensor(
        [[0.5, 0.25, 0.25, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0.5, 0.5, 0, 0]], dtype=torch.float64
    )
    available = torch.tensor([[True] * 3 + [False], [False, True, False, False], [False] * 4, [True] * 4])
    # ½ ln 2 + 2 · ¼ ln 4 = 1.5 ln 2, of at most ln 3; a forced choice; no choice; ln 2 of at most ln 4
    expected = [1.5 * math.log(2), 0.0, 0.0, math.log(2)]
    np.testing.assert_allclose(selection_entropy(probabilities.log(), available), expected, rtol=1e-14)
    relative = relative_selection_entropy(probabilities.log(), available)
    np.testing.assert_allclose(relative, [1.5 * math.log(2) / math.log(3), 1.0, 1.0, 0.5], rtol=1e-14)


# --- calibration ----------------------------------------------------------------------------------------------------


def relative_entropy_at(queries, keys, available, temperature):
    log_probs = slow_log_probs(queries.numpy(), (keys - keys.mean(0)).numpy(), available.numpy(), temperature)
    rows = [row[np.isfinite(row)] for row in log_probs.reshape(-1, log_probs.shape[-1])]
    return np.mean([-(np.exp(row) * row).sum() / math.log(len(row)) for row in rows if len(row) > 1])


def test_calibration_by_hand():
    # Two keys whose inner products differ by 1: the entropy is a bit when p = 1/2, and h(0.11) = 0.4999 of a bit
    # (the capacity of a binary symmetric channel), so the temperature is 1 / ln(0.89 / 0.11) = 0.4783.
    fraction = -(0.11 * math.log2(0.11) + 0.89 * math.log2(0.89))
    temperature = calibrated_temperature(
        torch.tensor([[1.0]]),
        torch.tensor([[5.0], [6.0]]),
        available_mask=torch.tensor([[True, True]]),
        target_fraction=fraction,
    )
    assert temperature == pytest.approx(1 / math.log(0.89 / 0.11), rel=1e-9)


@given(SEEDS, st.floats(0.05, 0.99), st.sampled_from([1e-3, 1.0, 1e3]))
def test_calibrated_entropy_is_the_target(seed, target, scale):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(4, 3, 5, dtype=torch.float64, generator=generator)
    keys = torch.randn(6, 5, dtype=torch.float64, generator=generator) * scale
    available = torch.rand(4, 3, 6, generator=generator) < 0.8
    temperature = calibrated_temperature(queries, keys, available_mask=available, target_fraction=target)
    assert relative_entropy_at(queries, keys, available, temperature) == pytest.approx(target, abs=1e-9)
    # Scale of the embedder is scale of the temperature.
    doubled = calibrated_temperature(queries, 2 * keys, available_mask=available, target_fraction=target)
    assert doubled == pytest.approx(2 * temperature, rel=1e-9)
    higher = calibrated_temperature(queries, keys, available_mask=available, target_fraction=(1 + target) / 2)
    assert higher > temperature


def crowded_unit_vectors(num, dimension, generator):
    """Unit vectors with pairwise cosines of 0.95 to 0.98, as mean hidden states of language models have."""
    common = torch.zeros(dimension)
    common[0] = 1.0
    vectors = common + 0.19 * torch.nn.functional.normalize(torch.randn(num, dimension, generator=generator), dim=-1)
    return torch.nn.functional.normalize(vectors, dim=-1)


@pytest.mark.parametrize("target", [0.1, 0.5, 0.9, 0.99])
def test_crowded_cosines_are_calibrated_in_float32(target):
    generator = torch.Generator().manual_seed(0)
    keys, queries = crowded_unit_vectors(25, 64, generator), crowded_unit_vectors(20, 64, generator)
    cosines = queries @ keys.T
    assert 0.94 < cosines.min() < cosines.max() < 0.99
    available = torch.ones(20, 25, dtype=torch.bool)
    uniform = selection_log_probs(queries, keys, available_mask=available, temperature=1.0)
    assert relative_selection_entropy(uniform, available).min() > 0.9999  # the predecessor's policy
    temperature = calibrated_temperature(queries, keys, available_mask=available, target_fraction=target)
    log_probs = selection_log_probs(queries, keys, available_mask=available, temperature=temperature)
    # float32 cosines carry 6e-8, over temperatures of about 0.003.
    assert relative_selection_entropy(log_probs, available).mean().item() == pytest.approx(target, abs=1e-3)


@pytest.mark.parametrize("value", [0.1, 1e4])
def test_identical_keys_are_refused(value):
    # Sums in another order may differ in the last bit; they are no spread.
    generator = torch.Generator().manual_seed(0)
    keys = (value * torch.randn(1, 1537, generator=generator)).expand(7, -1).contiguous()
    queries = torch.randn(3, 1537, generator=generator)
    with pytest.raises(DataError, match="all keys are equally near"):
        calibrated_temperature(queries, keys, available_mask=torch.ones(3, 7, dtype=torch.bool), target_fraction=0.9)


def test_ties_for_the_best_key_bound_the_entropy_from_below():
    # Two of three keys tie: at temperature 0 the entropy is ln 2 of ln 3 = 0.63.
    queries, keys = torch.tensor([[1.0]]), torch.tensor([[2.0], [2.0], [1.0]])
    available = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(DataError, match=r"lies between 0\.630930 and 1\.000000"):
        calibrated_temperature(queries, keys, available_mask=available, target_fraction=0.5)
    temperature = calibrated_temperature(queries, keys, available_mask=available, target_fraction=0.7)
    log_probs = selection_log_probs(queries, keys, available_mask=available, temperature=temperature)
    assert relative_selection_entropy(log_probs, available).item() == pytest.approx(0.7, abs=1e-6)


def test_forced_choices_do_not_count_and_nothing_else_is_refused():
    queries, keys = torch.tensor([[1.0], [1.0]]), torch.tensor([[2.0], [1.0]])
    both = torch.tensor([[True, True], [False, False]])
    with_forced = torch.tensor([[True, True], [False, True]])
    temperature = calibrated_temperature(queries, keys, available_mask=both, target_fraction=0.4)
    assert temperature == calibrated_temperature(queries, keys, available_mask=with_forced, target_fraction=0.4)
    with pytest.raises(DataError, match="no row has two available keys"):
        calibrated_temperature(queries, keys, available_mask=torch.eye(2, dtype=torch.bool), target_fraction=0.4)


@pytest.mark.parametrize("target", [0.0, 1.0, -0.5, float("nan")])
def test_bad_target(target):
    available = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ConfigError, match=r"target_fraction must lie in \(0, 1\), got"):
        calibrated_temperature(torch.zeros(1, 1), torch.zeros(2, 1), available_mask=available, target_fraction=target)


def test_a_broken_embedding_is_named():
    available = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(DataError, match="not finite"):
        calibrated_temperature(
            torch.ones(1, 1), torch.tensor([[1.0], [float("nan")]]), available_mask=available, target_fraction=0.5
        )
