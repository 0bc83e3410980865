from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from preceptor.errors import ConfigError, ShapeError
from preceptor.objectives import (
    gaussian_log_prob,
    sac_actor_loss,
    sac_critic_loss,
    sac_temperature_loss,
    sample_squashed_gaussian,
    soft_q_targets,
    squashed_gaussian_log_prob,
)

NAN = float("nan")
SEEDS = st.integers(0, 2**32 - 1)


def normal(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- policy ---------------------------------------------------------------------------------------------------------


def test_gaussian_log_prob_by_hand():
    # μ = (1, 0), σ = (2, ½) at (3, ½): standardised (1, 1); −½ − ln 2 and −½ + ln 2, and −½ ln 2π twice
    actions, mean = torch.tensor([[3.0, 0.5]]), torch.tensor([[1.0, 0.0]])
    log_standard_deviation = torch.tensor([[2.0, 0.5]]).log()
    expected = -1 - math.log(2 * math.pi)
    assert gaussian_log_prob(actions, mean, log_standard_deviation).item() == pytest.approx(expected, rel=1e-6)


def test_squashed_log_prob_by_hand():
    # Caught by planting: the sign of the change of variables, softplus(2u), one dimension's term left out.
    # tanh(½ ln 3) = ½, slope 1 − ¼ = ¾ on both dimensions; the Gaussian is at its mean: −ln 2π
    unsquashed = torch.full((1, 2), 0.5 * math.log(3), dtype=torch.float64)
    result = squashed_gaussian_log_prob(unsquashed, unsquashed, torch.zeros(1, 2, dtype=torch.float64))
    assert result.item() == pytest.approx(-math.log(2 * math.pi) - 2 * math.log(0.75), rel=1e-14)


@given(SEEDS)
def test_squashed_log_prob_equals_slow_reference(seed):
    unsquashed, mean, log_standard_deviation = normal(seed, 3, 4, 2)
    result = squashed_gaussian_log_prob(unsquashed, mean, log_standard_deviation)
    for i in range(4):
        slow = 0.0
        for d in range(2):
            a, mu, sigma = math.tanh(unsquashed[i, d]), mean[i, d].item(), math.exp(log_standard_deviation[i, d])
            density = math.exp(-0.5 * ((math.atanh(a) - mu) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
            slow += math.log(density / (1 - a * a))
        assert result[i].item() == pytest.approx(slow, rel=1e-7, abs=1e-9)  # atanh loses digits near ±1


@pytest.mark.parametrize(("mean", "standard_deviation"), [(0.0, 1.0), (0.8, 0.3), (-0.5, 2.0)])
def test_squashed_density_integrates_to_one(mean, standard_deviation):
    edges = torch.linspace(-1, 1, 400_001, dtype=torch.float64)
    actions = (edges[1:] + edges[:-1]) / 2
    unsquashed = torch.atanh(actions)[:, None]
    log_probs = squashed_gaussian_log_prob(
        unsquashed, torch.full_like(unsquashed, mean), torch.full_like(unsquashed, math.log(standard_deviation))
    )
    # The midpoint rule misses up to 1e-3 of the third density, which is infinite at ±1 for σ² > ½.
    assert (log_probs.exp() * 2 / 400_000).sum().item() == pytest.approx(1.0, abs=2e-3)


@pytest.mark.parametrize("extreme", [-1000.0, -50.0, 50.0, 1000.0])
def test_saturated_actions_stay_finite(extreme):
    unsquashed = torch.tensor([[extreme]], requires_grad=True)
    zero = torch.zeros(1, 1)
    log_prob = squashed_gaussian_log_prob(unsquashed, torch.full((1, 1), extreme), zero)
    # ln(1 − tanh² u) → ln 4 − 2|u|
    expected = -0.5 * math.log(2 * math.pi) + 2 * abs(extreme) - math.log(4)
    assert log_prob.item() == pytest.approx(expected, rel=1e-6)
    (gradient,) = torch.autograd.grad(log_prob.sum(), unsquashed)
    assert gradient.item() == pytest.approx(2 * math.copysign(1, extreme), rel=1e-6)


def test_samples_follow_the_density_and_the_generator():
    mean, log_standard_deviation = torch.full((20_000, 1), 0.3), torch.full((20_000, 1), math.log(0.5))

    def draw():
        generator = torch.Generator().manual_seed(0)
        return sample_squashed_gaussian(mean, log_standard_deviation, generator=generator)

    actions, log_probs = draw()
    assert torch.equal(actions, draw()[0])
    assert actions.abs().max() < 1
    unsquashed = torch.atanh(actions.double())
    # standard errors 0.5 / √20,000 = 0.0035 and 0.0025
    assert unsquashed.mean().item() == pytest.approx(0.3, abs=3 * 0.0036)
    assert unsquashed.std().item() == pytest.approx(0.5, abs=3 * 0.0026)
    expected = squashed_gaussian_log_prob(unsquashed, mean.double(), log_standard_deviation.double())
    np.testing.assert_allclose(log_probs, expected, atol=1e-3)  # atanh of a float32 near 1


def test_gradients_in_float64():
    inputs = [normal(seed, 3, 2).requires_grad_() for seed in range(3)]
    assert gradcheck(squashed_gaussian_log_prob, inputs)

    def reparameterised(mean, log_standard_deviation):
        return sample_squashed_gaussian(mean, log_standard_deviation, generator=torch.Generator().manual_seed(0))

    assert gradcheck(reparameterised, inputs[:2])
    assert gradcheck(lambda q: sac_critic_loss(q, inputs[0][:, 0]), inputs[1].detach().T.clone().requires_grad_())
    log_probs, q_values = normal(4, 3).requires_grad_(), normal(5, 2, 3).requires_grad_()
    assert gradcheck(lambda p, q: sac_actor_loss(p, q, temperature=0.3), (log_probs, q_values))
    log_temperature = normal(6, 1)[0].clone().requires_grad_()
    assert gradcheck(lambda t: sac_temperature_loss(t, log_probs, target_entropy=-1.0), log_temperature)


# --- losses ---------------------------------------------------------------------------------------------------------


def test_losses_by_hand():
    # Caught by planting: max for min, the sign of the entropy, a bootstrap past a terminal state, a rising temperature.
    rewards, next_log_probs = torch.tensor([1.0, 1.0]), torch.tensor([-2.0, NAN])
    next_q_values = torch.tensor([[4.0, NAN], [3.0, NAN]])
    terminated = torch.tensor([False, True])
    # 1 + 0.5 · (3 + 0.25 · 2) = 2.75
    targets = soft_q_targets(
        rewards, next_q_values, next_log_probs, terminated=terminated, discount=0.5, temperature=0.25
    )
    assert targets.tolist() == [2.75, 1.0]
    # (½ · 1 + ½ · 4) / 2 and (½ · 9 + 0) / 2
    assert sac_critic_loss(torch.tensor([[3.75, 3.0], [5.75, 1.0]]), targets).item() == 1.25 + 2.25
    # ((0.25 · −2 − 3) + (0.25 · 4 − 1)) / 2
    loss = sac_actor_loss(torch.tensor([-2.0, 4.0]), torch.tensor([[4.0, 1.0], [3.0, 2.0]]), temperature=0.25)
    assert loss.item() == -1.75
    # Entropy −mean(1, 2) = −1.5, below the target −1: the temperature must rise, so the slope of the loss is negative.
    log_temperature = torch.tensor(0.7, requires_grad=True)
    temperature_loss = sac_temperature_loss(log_temperature, torch.tensor([1.0, 2.0]), target_entropy=-1.0)
    assert temperature_loss.item() == pytest.approx(-0.7 * 0.5)
    assert torch.autograd.grad(temperature_loss, log_temperature)[0].item() == -0.5


def test_gradient_policy():
    tensors = [torch.randn(2, 3, generator=torch.Generator().manual_seed(s)).requires_grad_() for s in range(3)]
    targets = soft_q_targets(
        tensors[0][0], tensors[1], tensors[2][0], terminated=torch.tensor([False] * 3), discount=0.9, temperature=0.1
    )
    assert not targets.requires_grad
    sac_critic_loss(tensors[0], tensors[1][0]).backward()
    assert tensors[1].grad is None
    log_temperature = torch.tensor(0.0, requires_grad=True)
    sac_temperature_loss(log_temperature, tensors[2][0], target_entropy=0.0).backward()
    assert tensors[2].grad is None


def test_one_step_problem_has_its_closed_form():
    """r = −‖a − a*‖², no squashing: π* ∝ exp(r / α) is N(a*, α/2), so the mean is a* and the variance α/2."""
    best, temperature = torch.tensor([0.7, -1.3], dtype=torch.float64), 0.36
    mean = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    log_standard_deviation = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    noise = normal(0, 64, 2)
    noise = (noise - noise.mean(0)) / noise.std(0, unbiased=False)  # the two moments that this problem sees are exact
    optimiser = torch.optim.LBFGS([mean, log_standard_deviation], max_iter=25, line_search_fn="strong_wolfe")

    def step():
        actions = mean + log_standard_deviation.exp() * noise
        log_probs = gaussian_log_prob(actions, mean.expand(64, 2), log_standard_deviation.expand(64, 2))
        q_value = -(actions - best).square().sum(dim=-1)
        loss = sac_actor_loss(log_probs, torch.stack([q_value, q_value]), temperature=temperature)
        optimiser.zero_grad()
        loss.backward()
        return loss

    optimiser.step(step)
    np.testing.assert_allclose(mean.detach(), best, atol=1e-4)
    np.testing.assert_allclose((2 * log_standard_deviation).exp().detach(), temperature / 2, rtol=1e-4)


def test_learned_temperature_is_at_rest_where_the_entropy_is_the_target():
    """The same problem with α learned: entropy ½ ln(2πe σ²) = target fixes σ, and σ² = α/2 then fixes α."""
    sigma = 0.4
    noise = normal(0, 64, 1)
    noise = (noise - noise.mean(0)) / noise.std(0, unbiased=False)

    def slopes(mean, standard_deviation, temperature):
        parameters = [
            torch.full((1,), mean, dtype=torch.float64),
            torch.full((1,), math.log(standard_deviation), dtype=torch.float64),
            torch.tensor(math.log(temperature), dtype=torch.float64),
        ]
        mean, log_standard_deviation, log_temperature = (p.requires_grad_() for p in parameters)
        actions = mean + log_standard_deviation.exp() * noise
        log_probs = gaussian_log_prob(actions, mean.expand(64, 1), log_standard_deviation.expand(64, 1))
        actor = sac_actor_loss(log_probs, -(actions - 0.5).square().T, temperature=temperature)
        target_entropy = 0.5 * math.log(2 * math.pi * math.e * sigma**2)
        loss = actor + sac_temperature_loss(log_temperature, log_probs, target_entropy=target_entropy)
        return [gradient.item() for gradient in torch.autograd.grad(loss, parameters)]

    assert slopes(0.5, sigma, 2 * sigma**2) == pytest.approx([0.0, 0.0, 0.0], abs=1e-12)
    # Too wide: the loss falls with a smaller σ and a smaller α. Too narrow: the reverse.
    assert min(slopes(0.5, 1.1 * sigma, 2 * sigma**2)[1:]) > 0.01
    assert max(slopes(0.5, 0.9 * sigma, 2 * sigma**2)[1:]) < -0.01
    # Too hot: the policy widens, and the temperature, whose target is met, waits.
    _, width, heat = slopes(0.5, sigma, 3 * sigma**2)
    assert width < -0.01
    assert heat == pytest.approx(0.0, abs=1e-12)


def test_errors():
    one, two = torch.zeros(1), torch.zeros(2, 1)
    with pytest.raises(ConfigError) as caught:
        soft_q_targets(one, two, one, terminated=torch.tensor([False]), discount=1.5, temperature=-1.0)
    assert len(caught.value.faults) == 2
    with pytest.raises(ConfigError, match=r"temperature must be at least 0, got -0\.1"):
        sac_actor_loss(one, two, temperature=-0.1)
    for function, arguments, keywords in (
        (gaussian_log_prob, (torch.zeros(2, 3), torch.zeros(3), torch.zeros(3)), {}),
        (sac_critic_loss, (torch.zeros(2, 3), torch.zeros(1)), {}),
        (sac_actor_loss, (torch.zeros(1), torch.zeros(2, 3)), {"temperature": 0.1}),
    ):
        with pytest.raises(ShapeError):
            function.__wrapped__(*arguments, **keywords)
