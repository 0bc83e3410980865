from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from preceptor.errors import ConfigError, ShapeError
from preceptor.objectives import cispo_loss, clip_fraction, gspo_loss, kl_k1, ppo_clip_loss, reinforce_loss

NAN, INF = float("nan"), float("inf")
SEEDS = st.integers(0, 2**32 - 1)


def draw(seed, batch=3, time=4):
    """Log-probabilities now and then, advantages and a mask; ratios straddle every clip."""
    rng = np.random.default_rng(seed)
    old = -rng.random((batch, time)) * 2
    return (
        old + 0.6 * rng.normal(size=(batch, time)),
        old,
        rng.normal(size=(batch, time)),
        rng.random((batch, time)) < 0.7,
    )


def tensors(*arrays):
    return [torch.tensor(array) for array in arrays]


def value_and_gradient(loss, log_probs):
    return loss.item(), torch.autograd.grad(loss, log_probs)[0].numpy()


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


# --- PPO ------------------------------------------------------------------------------------------------------------


def slow_ppo(log_probs, old, advantages, mask, low, high, dual):
    """Value and gradient, one action at a time, mean over actions."""
    total, gradient = 0.0, np.zeros_like(log_probs)
    for i, t in np.argwhere(mask):
        ratio, advantage = math.exp(log_probs[i, t] - old[i, t]), advantages[i, t]
        objective, moves = ratio * advantage, True
        if advantage > 0 and ratio > 1 + high:
            objective, moves = (1 + high) * advantage, False
        if advantage < 0 and ratio < 1 - low:
            objective, moves = (1 - low) * advantage, False
        if advantage < 0 and dual is not None and ratio > dual:
            objective, moves = dual * advantage, False
        total -= objective
        gradient[i, t] = -ratio * advantage if moves else 0.0
    num = max(mask.sum(), 1)
    return total / num, gradient / num


def test_ppo_by_hand():
    # Caught by planting: max for min, ε_low and ε_high exchanged, the inverse ratio, the sign.
    ratios = torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.25, 4.0]], dtype=torch.float64)
    log_probs = ratios.log().requires_grad_()
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0, -1.0]], dtype=torch.float64)
    old, mask = torch.zeros_like(ratios), torch.ones(1, 6, dtype=torch.bool)
    # objectives: 1.3 (clipped), −1.5, 0.5, −0.8 (clipped), 1.25 and −4, or −3 with the dual clip
    plain = ppo_clip_loss(log_probs, old, advantages, mask=mask, clip_epsilon_low=0.2, clip_epsilon_high=0.3)
    value, gradient = value_and_gradient(plain, log_probs)
    assert value == pytest.approx(-(1.3 - 1.5 + 0.5 - 0.8 + 1.25 - 4) / 6, rel=1e-14)
    np.testing.assert_allclose(gradient * 6, [[0, 1.5, -0.5, 0, -1.25, 4]], rtol=1e-14)
    dual = ppo_clip_loss(
        log_probs, old, advantages, mask=mask, clip_epsilon_low=0.2, clip_epsilon_high=0.3, dual_clip=3.0
    )
    value, gradient = value_and_gradient(dual, log_probs)
    assert value == pytest.approx(-(1.3 - 1.5 + 0.5 - 0.8 + 1.25 - 3) / 6, rel=1e-14)
    np.testing.assert_allclose(gradient * 6, [[0, 1.5, -0.5, 0, -1.25, 0]], rtol=1e-14)
    fraction = clip_fraction(log_probs, old, advantages, mask=mask, clip_epsilon_low=0.2, clip_epsilon_high=0.3)
    assert fraction.item() == pytest.approx(2 / 6)
    # Without an advantage there is no gradient to cut off, however far the ratio has moved.
    assert clip_fraction(log_probs, old, torch.zeros_like(ratios), mask=mask).item() == 0


@given(SEEDS, st.sampled_from([None, 1.3]))
def test_ppo_equals_slow_reference(seed, dual):
    log_probs, old, advantages, mask = draw(seed)
    expected_value, expected_gradient = slow_ppo(log_probs, old, advantages, mask, 0.1, 0.25, dual)
    now, *others = tensors(log_probs, old, advantages)
    now.requires_grad_()
    loss = ppo_clip_loss(
        now, *others, mask=torch.tensor(mask), clip_epsilon_low=0.1, clip_epsilon_high=0.25, dual_clip=dual
    )
    value, gradient = value_and_gradient(loss, now)
    assert value == pytest.approx(expected_value, abs=1e-12)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-12)


def test_a_huge_ratio_gives_no_nan():
    # exp(200) is infinite in float32, and the clipped branch would pass on 0 · ∞.
    log_probs = torch.tensor([[0.0, 0.0]], requires_grad=True)
    loss = ppo_clip_loss(
        log_probs, torch.tensor([[-200.0, 200.0]]), torch.ones(1, 2), mask=torch.ones(1, 2, dtype=torch.bool)
    )
    loss.backward()
    assert loss.isfinite()
    assert log_probs.grad.isfinite().all()


def test_ppo_with_a_kl_reward_reaches_the_tilted_reference():
    """Five choices, all enumerated: reward r − β k1 must lead to π* ∝ π_ref · exp(r / β)."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(5, dtype=torch.float64, generator=generator)
    reference = torch.log_softmax(torch.randn(5, dtype=torch.float64, generator=generator), -1)
    beta = 0.5
    optimum = torch.softmax(reference + rewards / beta, -1)
    logits = reference.clone().requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=0.05)
    mask = torch.ones(1, 5, dtype=torch.bool)
    assert (torch.softmax(logits, -1) - optimum).abs().sum() / 2 > 0.2
    for _ in range(100):
        old = torch.log_softmax(logits, -1).detach()
        regularised = rewards - beta * kl_k1(old, reference)
        # Weighing every choice by its probability under the old policy is the expectation over samples.
        advantages = old.exp() * (regularised - (old.exp() * regularised).sum())
        for _ in range(2):
            log_probs = torch.log_softmax(logits, -1)
            loss = ppo_clip_loss(
                log_probs[None], old[None], advantages[None], mask=mask, aggregation="constant", divisor=1.0
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    assert (torch.softmax(logits, -1) - optimum).abs().sum().item() / 2 < 0.01


# --- CISPO ----------------------------------------------------------------------------------------------------------


@given(SEEDS)
def test_cispo_equals_slow_reference(seed):
    # Caught by planting: a gradient through the weight (it would double that of ρ ln π), no truncation, the sign.
    log_probs, old, advantages, mask = draw(seed)
    num = max(mask.sum(), 1)
    weights = np.minimum(np.exp(log_probs - old), 1.5) * advantages * mask
    now, *others = tensors(log_probs, old, advantages)
    now.requires_grad_()
    loss = cispo_loss(now, *others, mask=torch.tensor(mask), max_ratio=1.5)
    value, gradient = value_and_gradient(loss, now)
    assert value == pytest.approx(-(weights * log_probs).sum() / num, abs=1e-12)
    np.testing.assert_allclose(gradient, -weights / num, atol=1e-12)


# --- GSPO -----------------------------------------------------------------------------------------------------------


def test_gspo_by_hand():
    # Caught by planting: the product of ratios for their geometric mean, dividing by all positions.
    log_probs = torch.tensor([[2.0, 8.0, NAN], [0.5, 9.0, 9.0], [NAN, NAN, NAN]], dtype=torch.float64).log()
    log_probs.requires_grad_()
    old = torch.zeros(3, 3, dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, False, False], [False] * 3])
    advantages = torch.tensor([1.0, -2.0, NAN], dtype=torch.float64)
    # s = √(2 · 8) = 4 and ½; clipped to [0.2, 5]: objectives 4 and −1, mean of two
    loss = gspo_loss(log_probs, old, advantages, mask=mask, clip_epsilon_low=0.8, clip_epsilon_high=4.0)
    value, gradient = value_and_gradient(loss, log_probs)
    assert value == pytest.approx(-(4 - 1) / 2, rel=1e-14)
    # ds/d ln π_t = s / |y|: −4 · ½ / 2 twice, and 2 · ½ / 2
    np.testing.assert_allclose(gradient, [[-1, -1, 0], [0.5, 0, 0], [0, 0, 0]], atol=1e-14)
    # Clipped to [0.75, 1.5]: objectives 1.5 and −2 · 0.75, and no gradient left.
    clipped = gspo_loss(log_probs, old, advantages, mask=mask, clip_epsilon_low=0.25, clip_epsilon_high=0.5)
    value, gradient = value_and_gradient(clipped, log_probs)
    assert value == pytest.approx(0.0, abs=1e-14)
    assert np.abs(gradient).max() == 0.0


@given(SEEDS)
def test_gspo_equals_slow_reference(seed):
    log_probs, old, advantages, mask = draw(seed)
    terms = []
    for i in range(3):
        if mask[i].any():
            s = math.prod(math.exp(log_probs[i, t] - old[i, t]) for t in np.flatnonzero(mask[i])) ** (1 / mask[i].sum())
            clipped = min(max(s, 0.9), 1.2)
            terms.append(-min(s * advantages[i, 0], clipped * advantages[i, 0]))
    loss = gspo_loss(
        *tensors(
            log_probs,
            old,
            advantages[:, 0],
        ),
        mask=torch.tensor(mask),
        clip_epsilon_low=0.1,
        clip_epsilon_high=0.2,
    )
    assert loss.item() == pytest.approx(np.mean(terms) if terms else 0.0, abs=1e-12)


def test_gspo_wants_one_advantage_a_sequence():
    with pytest.raises(ShapeError, match="3 sequences need one each"):
        gspo_loss.__wrapped__(
            torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(1), mask=torch.ones(3, 2, dtype=torch.bool)
        )


# --- all of them ----------------------------------------------------------------------------------------------------

LOSSES = {
    "reinforce": lambda now, old, advantages, mask: reinforce_loss(
        now, advantages, mask=mask, aggregation="token_mean"
    ),
    "ppo": lambda now, old, advantages, mask: ppo_clip_loss(now, old, advantages, mask=mask),
    "dual": lambda now, old, advantages, mask: ppo_clip_loss(now, old, advantages, mask=mask, dual_clip=3.0),
    "cispo": lambda now, old, advantages, mask: cispo_loss(now, old, advantages, mask=mask),
    "gspo": lambda now, old, advantages, mask: gspo_loss(now, old, advantages[:, 0], mask=mask),
}


@pytest.mark.parametrize("name", LOSSES)
@given(seed=SEEDS)
def test_at_ratio_one_the_gradient_is_that_of_reinforce(name, seed):
    log_probs, _, advantages, mask = draw(seed)
    now, advantages, mask = tensors(log_probs, advantages, mask)
    now.requires_grad_()
    aggregation = "token_mean"
    if name == "gspo":  # one advantage a sequence, and the mean over sequences
        advantages, aggregation = advantages[:, :1].expand(3, 4), "sequence_mean"
    _, gradient = value_and_gradient(LOSSES[name](now, now.detach().clone(), advantages, mask), now)
    _, expected = value_and_gradient(reinforce_loss(now, advantages, mask=mask, aggregation=aggregation), now)
    np.testing.assert_allclose(gradient, expected, atol=1e-14)


@pytest.mark.parametrize("name", LOSSES)
@given(seed=SEEDS, junk=st.sampled_from([NAN, INF, -INF, 7.0]))
def test_padding_changes_nothing(name, seed, junk):
    now, old, advantages, mask = tensors(*draw(seed))
    now.requires_grad_()
    value, gradient = value_and_gradient(LOSSES[name](now, old, advantages, mask), now)
    # A new first row, a new last column, and the positions that do not count, all of junk. (GSPO's advantages, one a
    # sequence, are read from column 0, so they stay.)
    pad = (0, 1, 1, 0)
    wide_now, wide_old, wide_advantages = (
        torch.nn.functional.pad(x.detach().masked_fill(~mask, junk), pad, value=junk) for x in (now, old, advantages)
    )
    if name == "gspo":
        wide_advantages[1:, 0] = advantages[:, 0]
    wide_now.requires_grad_()
    wide_mask = torch.nn.functional.pad(mask, pad, value=False)
    again, wide_gradient = value_and_gradient(LOSSES[name](wide_now, wide_old, wide_advantages, wide_mask), wide_now)
    assert again == pytest.approx(value, abs=1e-14)
    np.testing.assert_allclose(wide_gradient[1:, :-1], gradient, atol=1e-14)
    assert np.abs(wide_gradient[0]).max() == np.abs(wide_gradient[:, -1]).max() == 0.0


@pytest.mark.parametrize("name", LOSSES)
def test_no_gradient_into_what_was_sampled_and_zero_for_nothing(name):
    now, old, advantages, mask = tensors(*draw(0))
    for tensor in (now, old, advantages):
        tensor.requires_grad_()
    LOSSES[name](now, old, advantages, mask).backward()
    assert now.grad.abs().max() > 0
    assert old.grad is None
    assert advantages.grad is None
    nothing = LOSSES[name](now, old, advantages, torch.zeros_like(mask))
    assert value_and_gradient(nothing, now)[0] == 0.0
    assert np.abs(value_and_gradient(LOSSES[name](now, old, advantages, torch.zeros_like(mask)), now)[1]).max() == 0.0


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "cispo"])  # its weight carries no gradient
def test_gradient_in_float64(name):
    now, old, advantages, mask = tensors(*draw(1))
    assert gradcheck(lambda x: LOSSES[name](x, old, advantages, mask), now.requires_grad_())


@pytest.mark.parametrize(
    ("loss", "keywords", "message"),
    [
        (ppo_clip_loss, {"clip_epsilon_low": 1.2}, r"clip_epsilon_low must lie in \(0, 1\), got 1.2"),
        (clip_fraction, {"clip_epsilon_high": 0.0}, "clip_epsilon_high must be positive, got 0.0"),
        (ppo_clip_loss, {"dual_clip": 1.0}, "dual_clip must be greater than 1, got 1.0"),
        (cispo_loss, {"max_ratio": NAN}, "max_ratio must be positive, got nan"),
    ],
)
def test_bad_configuration(loss, keywords, message):
    zeros = torch.zeros(1, 1)
    with pytest.raises(ConfigError, match=message):
        loss(zeros, zeros, zeros, mask=torch.ones(1, 1, dtype=torch.bool), **keywords)
