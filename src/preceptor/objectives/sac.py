"""Soft actor-critic: a squashed Gaussian policy and the losses of its critics, actor and temperature.

Source: Haarnoja et al., arXiv 1801.01290 and 1812.05905. The caller evaluates the networks; here are their numbers.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import softplus

from preceptor.errors import ConfigError
from preceptor.objectives.statistics import check_same_shape


def gaussian_log_prob(
    actions: Float[Tensor, "*batch action"],
    mean: Float[Tensor, "*batch action"],
    log_standard_deviation: Float[Tensor, "*batch action"],
) -> Float[Tensor, "*batch"]:
    """ln N(a; μ, σ²), independent dimensions summed: the log-density of ``actions`` in nats.

    Gradients flow into all three.

    Raises:
        ShapeError: the shapes differ.

    >>> gaussian_log_prob(torch.tensor([[1.0]]), torch.tensor([[0.0]]), torch.tensor([[0.0]]))  # −½ − ½ ln 2π
    tensor([-1.4189])
    """
    check_same_shape(actions=actions, mean=mean, log_standard_deviation=log_standard_deviation)
    # The network gives ln σ, so 1/σ is exp(−ln σ).
    standardised = (actions - mean) * torch.exp(-log_standard_deviation)
    return (-0.5 * standardised.square() - log_standard_deviation - 0.5 * math.log(2 * math.pi)).sum(dim=-1)


def squashed_gaussian_log_prob(
    unsquashed: Float[Tensor, "*batch action"],
    mean: Float[Tensor, "*batch action"],
    log_standard_deviation: Float[Tensor, "*batch action"],
) -> Float[Tensor, "*batch"]:
    """The log-density in nats of the actions a = tanh(u) where u = ``unsquashed`` is Gaussian.

    ln π(a) = ln N(u; μ, σ²) − Σ ln(1 − tanh² u): the change of variables. Its last term is computed as
    2 (ln 2 − u − softplus(−2u)), which is exact for every u; 1 − tanh² u itself is 0 in float32 from |u| = 10 on.
    Actions scaled to ±c on each of d dimensions have a log-density lower by d ln c. Gradients flow into all three.

    Raises:
        ShapeError: the shapes differ.

    >>> zero = torch.zeros(1, 1)
    >>> squashed_gaussian_log_prob(zero, zero, zero)  # at 0 the squashing has slope 1
    tensor([-0.9189])
    """
    # ln |da/du| per dimension, [..., action].
    log_slopes = 2 * (math.log(2) - unsquashed - softplus(-2 * unsquashed))
    return gaussian_log_prob(unsquashed, mean, log_standard_deviation) - log_slopes.sum(dim=-1)


def sample_squashed_gaussian(
    mean: Float[Tensor, "*batch action"],
    log_standard_deviation: Float[Tensor, "*batch action"],
    *,
    generator: torch.Generator | None,
) -> tuple[Float[Tensor, "*batch action"], Float[Tensor, "*batch"]]:
    """Actions in (−1, 1) and their log-density in nats: a = tanh(μ + σ ε) with ε ~ N(0, 1).

    Reparameterised: gradients flow through the actions and the log-density into the mean and the standard deviation.

    Args:
        mean: μ before squashing.
        log_standard_deviation: ln σ before squashing; the caller keeps it in a sane range, usually [−5, 2].
        generator: the source of randomness, on the device of ``mean``; ``None`` is torch's global one.

    Raises:
        ShapeError: the shapes differ.

    >>> mean = torch.tensor([[0.5, -1.0]])
    >>> actions, log_probs = sample_squashed_gaussian(mean, torch.full((1, 2), -20.0), generator=None)
    >>> actions  # hardly any noise: tanh of the mean
    tensor([[ 0.4621, -0.7616]])
    """
    check_same_shape(mean=mean, log_standard_deviation=log_standard_deviation)
    # Noise is drawn first and scaled after, so that the gradient reaches mean and standard deviation.
    noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
    unsquashed = mean + log_standard_deviation.exp() * noise
    # The density is taken at u, not at atanh(a): near ±1 the inverse loses all digits.
    return torch.tanh(unsquashed), squashed_gaussian_log_prob(unsquashed, mean, log_standard_deviation)


def soft_q_targets(
    rewards: Float[Tensor, " batch"],
    next_q_values: Float[Tensor, "critics batch"],
    next_log_probs: Float[Tensor, " batch"],
    *,
    terminated: Bool[Tensor, " batch"],
    discount: float,
    temperature: float,
) -> Float[Tensor, " batch"]:
    """y = r + γ (min_i Q_i(s′, a′) − α ln π(a′|s′)), and y = r where the episode terminated. No gradient.

    The minimum over the (two) target critics counters the overestimation of each.

    Args:
        rewards: of the transitions, any unit.
        next_q_values: of the target critics at an action a′ freshly sampled in the next state, same unit.
        next_log_probs: ln π(a′|s′), nats.
        terminated: True = the next state is terminal. A time limit is no termination: its next state has a value.
        discount: γ in [0, 1].
        temperature: α ≥ 0, reward units per nat.

    Raises:
        ConfigError: ``discount`` or ``temperature`` out of range.
        ShapeError: the shapes do not fit.

    Source: arXiv 1812.05905, equations 3 and 5.

    >>> rewards, next_q = torch.tensor([1.0, 1.0]), torch.tensor([[4.0, 4.0], [2.0, 2.0]])
    >>> terminated = torch.tensor([False, True])
    >>> log_probs = torch.tensor([-1.0, -1.0])
    >>> soft_q_targets(rewards, next_q, log_probs, terminated=terminated, discount=0.5, temperature=0.2)
    tensor([2.1000, 1.0000])
    """
    faults = []
    if not 0 <= discount <= 1:
        faults.append(f"discount must lie in [0, 1], got {discount}.")
    if not temperature >= 0:
        faults.append(f"temperature must be at least 0, got {temperature}.")
    if faults:
        raise ConfigError(*faults)
    smallest = next_q_values.amin(dim=0)  # [batch], the more pessimistic critic
    check_same_shape(
        rewards=rewards, next_q_values_of_a_critic=smallest, next_log_probs=next_log_probs, terminated=terminated
    )
    next_values = smallest - temperature * next_log_probs  # in the mean over a′: Q plus α times the entropy
    # Masked, not multiplied by 0: 0 · inf of a diverged critic would be NaN.
    return (rewards + discount * next_values.masked_fill(terminated, 0.0)).detach()


def sac_critic_loss(q_values: Float[Tensor, "critics batch"], targets: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Σ_i ½ (Q_i − y)², the mean over the batch. No gradient into ``targets``.

    Each critic learns from its own error alone, so the sum trains them as separate losses would.

    Raises:
        ShapeError: the shapes do not fit.

    Source: arXiv 1812.05905, equation 5.

    >>> sac_critic_loss(torch.tensor([[1.0, 3.0], [2.0, 2.0]]), torch.tensor([2.0, 2.0]))  # (½ + ½) / 2 + 0
    tensor(0.5000)
    """
    check_same_shape(targets=targets, q_values_of_a_critic=q_values[0])
    # Mean over the batch, sum over the critics.
    return 0.5 * (q_values - targets.detach()).square().mean(dim=-1).sum()


def sac_actor_loss(
    log_probs: Float[Tensor, " batch"], q_values: Float[Tensor, "critics batch"], *, temperature: float
) -> Float[Tensor, ""]:
    """The mean over the batch of α ln π(a|s) − min_i Q_i(s, a).

    Gradients flow into both; ``q_values`` must have been computed at reparameterised actions, and the critics' own
    parameters are not to be stepped with them.

    Args:
        log_probs: ln π(a|s) at the actions just sampled, nats.
        q_values: of the (two) critics at these actions, reward units.
        temperature: α ≥ 0, reward units per nat.

    Raises:
        ConfigError: ``temperature`` is negative.
        ShapeError: the shapes do not fit.

    Source: arXiv 1812.05905, equation 7.

    >>> sac_actor_loss(torch.tensor([-1.0]), torch.tensor([[3.0], [2.0]]), temperature=0.5)
    tensor(-2.5000)
    """
    if not temperature >= 0:
        raise ConfigError(f"temperature must be at least 0, got {temperature}.")
    smallest = q_values.amin(dim=0)
    check_same_shape(log_probs=log_probs, q_values_of_a_critic=smallest)
    # Entropy is −ln π, so minimising α ln π − Q raises both value and entropy.
    return (temperature * log_probs - smallest).mean()


def sac_temperature_loss(
    log_temperature: Float[Tensor, ""], log_probs: Float[Tensor, " batch"], *, target_entropy: float
) -> Float[Tensor, ""]:
    """−ln α · mean(ln π(a|s) + target): lowers the temperature α while the policy's entropy is above the target.

    No gradient into ``log_probs``. The paper has α where this has ln α; the fixed point is the same, and the size of a
    step does not shrink with α (as in torchrl and stable-baselines3).

    Args:
        log_temperature: ln α, the parameter that is learned.
        log_probs: ln π(a|s) at sampled actions, nats.
        target_entropy: nats; −(number of action dimensions) is usual, for actions in (−1, 1), whose entropy is at most
            ln 2 per dimension.

    Source: arXiv 1812.05905, equation 18.

    >>> sac_temperature_loss(torch.tensor(-1.0), torch.tensor([0.5, 1.5]), target_entropy=-2.0)
    tensor(-1.)
    """
    # d/d(ln α) = −(ln π + target) in the mean: negative while entropy is short of the target, so a descent step raises
    # α.
    return -log_temperature * (log_probs.detach() + target_entropy).mean()
