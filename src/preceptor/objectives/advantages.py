"""Advantages: how much better a sampled action did than what would have happened anyway."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from preceptor.errors import ConfigError
from preceptor.objectives.statistics import check_same_shape, whiten


def reward_to_go(
    rewards: Float[Tensor, "batch step"], mask: Bool[Tensor, "batch step"], *, discount: float = 1.0
) -> Float[Tensor, "batch step"]:
    """What each step earns from here on, G_t = r_t + discount · G_{t+1}; 0 where ``mask`` is False.

    The reward of a step is what its own action brought about, so it belongs to G_t. Steps that do not count are passed
    over as if they were not there: they add nothing and are not discounted for. No gradient.

    Args:
        rewards: one per step, any unit.
        mask: True = counts.
        discount: γ in [0, 1], per counted step.

    Raises:
        ConfigError: ``discount`` outside [0, 1].
        ShapeError: the shapes differ.

    >>> reward_to_go(torch.tensor([[1.0, 2.0, 4.0]]), torch.ones(1, 3, dtype=torch.bool), discount=0.5)
    tensor([[3., 4., 4.]])
    """
    _check_in_unit_interval(discount=discount)
    check_same_shape(rewards=rewards, mask=mask)
    rewards = rewards.detach()
    returns = torch.zeros_like(rewards)
    following = rewards.new_zeros(rewards.shape[0])  # [batch], G_{t+1}
    # Backwards, one column at a time; a masked step hands the next return on untouched, neither added nor discounted.
    for step in reversed(range(rewards.shape[1])):
        following = torch.where(mask[:, step], rewards[:, step] + discount * following, following)
        returns[:, step] = following
    return returns.masked_fill(~mask, 0.0)


def mean_reward_to_go(
    rewards: Float[Tensor, "batch step"], mask: Bool[Tensor, "batch step"]
) -> Float[Tensor, "batch step"]:
    """The mean of the rewards from each step on, (1/n_t) Σ_{k≥t} r_k; 0 where ``mask`` is False.

    Credit for "what follows a step" in the unit of one reward, so that an early step, which more rewards follow, does
    not weigh more than a late one. No gradient.

    Raises:
        ShapeError: the shapes differ.

    >>> mean_reward_to_go(torch.tensor([[1.0, 2.0, 4.0]]), torch.ones(1, 3, dtype=torch.bool))
    tensor([[2.3333, 3.0000, 4.0000]])
    """
    # A reversed cumulative sum: counted steps at t and after it.
    num_following = mask.flip(-1).cumsum(dim=-1).flip(-1)
    # clamp avoids 0/0 after the last counted step, where the numerator is 0 as well.
    return reward_to_go(rewards, mask) / num_following.clamp(min=1)


def leave_one_out(rewards: Float[Tensor, "*shape"], *, dim: int = 0) -> Float[Tensor, "*shape"]:
    """Each reward minus the mean of the *others* of its group, r_i − 1/(n−1) Σ_{j≠i} r_j.

    The others' mean does not depend on action i, so it is a baseline without bias. Equal rewards, and a group of one,
    give exactly 0. No gradient.

    Args:
        rewards: any unit, finite (drop a failed member before).
        dim: the axis along which the members of a group lie; 0 where the batch is the group.

    Source: RLOO, Kool et al. (2019) and Ahmadian et al. (arXiv 2402.14740), equation 6.

    >>> leave_one_out(torch.tensor([1.0, 2.0, 6.0]))
    tensor([-3.0000, -1.5000,  4.5000])
    """
    num_members = rewards.shape[dim]
    # r_i − mean of the others = n/(n−1) · (r_i − mean of all).
    # A group of one has deviation 0, and the factor 1 keeps 0/0 out.
    return _deviations(rewards, dim=dim) * (num_members / max(num_members - 1, 1))


def group_normalised(
    rewards: Float[Tensor, "*shape"],
    *,
    dim: int = 0,
    with_standard_deviation: bool = True,
    epsilon: float = 1e-4,
) -> Float[Tensor, "*shape"]:
    """Each reward minus its group's mean, over the group's standard deviation: (r_i − mean) / (s + ε).

    Without the division this is Dr. GRPO, which does not weigh up groups that are almost all right or all wrong. Equal
    rewards, and a group of one, give exactly 0. No gradient.

    Args:
        rewards: any unit, finite (drop a failed member before).
        dim: the axis along which the members of a group lie; 0 where the batch is the group.
        with_standard_deviation: GRPO (True) or Dr. GRPO (False).
        epsilon: > 0, in the unit of the rewards; 1e-4 and the sample standard deviation (n − 1) as in TRL.

    Source: GRPO, arXiv 2402.03300, section 4.1.2; Dr. GRPO, arXiv 2503.20783.

    >>> group_normalised(torch.tensor([1.0, 2.0, 3.0]))
    tensor([-0.9999,  0.0000,  0.9999])
    >>> group_normalised(torch.tensor([1.0, 2.0, 6.0]), with_standard_deviation=False)
    tensor([-2., -1.,  3.])
    """
    deviations = _deviations(rewards, dim=dim)
    if not with_standard_deviation:
        return deviations
    # n − 1, as torch.std and TRL have it; 1 for a group of one, whose deviations are 0 anyway.
    degrees_of_freedom = max(rewards.shape[dim] - 1, 1)
    standard_deviation = (deviations.square().sum(dim=dim, keepdim=True) / degrees_of_freedom).sqrt()
    # Equal rewards: 0 / (0 + ε) = 0.
    return deviations / (standard_deviation + epsilon)


def against_baseline(
    rewards: Float[Tensor, "*shape"], baseline: float | Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """``rewards`` − ``baseline``, e.g. the running mean of all rewards so far. No gradient into either.

    Raises:
        ShapeError: ``baseline`` is a tensor of another shape.

    >>> against_baseline(torch.tensor([1.0, 2.0]), 1.5)
    tensor([-0.5000,  0.5000])
    """
    if isinstance(baseline, Tensor):
        check_same_shape(rewards=rewards, baseline=baseline)
        baseline = baseline.detach()
    return rewards.detach() - baseline


def reinforce_plus_plus(
    rewards: Float[Tensor, "batch step"], mask: Bool[Tensor, "batch step"], *, discount: float = 1.0
) -> Float[Tensor, "batch step"]:
    """The reward to go of every step, whitened over all counted steps of the batch; 0 where ``mask`` is False.

    One mean and one standard deviation for the whole batch, whatever prompt a sequence answers, in place of a critic or
    of groups. The per-token KL penalty (k1) belongs into ``rewards``. No gradient.

    Raises:
        ConfigError: ``discount`` outside [0, 1].
        ShapeError: the shapes differ.

    Source: REINFORCE++, arXiv 2501.03262.

    >>> mask = torch.tensor([[True, True], [True, False]])
    >>> reinforce_plus_plus(torch.tensor([[1.0, 1.0], [0.0, 9.0]]), mask)
    tensor([[ 1.,  0.],
            [-1.,  0.]])
    """
    return whiten(reward_to_go(rewards, mask, discount=discount), mask)


def gae(
    rewards: Float[Tensor, "batch step"],
    values: Float[Tensor, "batch step"],
    *,
    mask: Bool[Tensor, "batch step"],
    discount: float,
    gae_lambda: float,
    next_values: Float[Tensor, "batch step"] | None = None,
    ends_episode: Bool[Tensor, "batch step"] | None = None,
) -> Float[Tensor, "batch step"]:
    """Generalised advantage estimates; 0 where ``mask`` is False.

    Â_t = δ_t + γ λ Â_{t+1} with δ_t = r_t + γ V_{t+1} − V_t. λ = 0 gives the one-step error δ_t, λ = 1 the reward to
    go minus V_t. Targets for the value function are Â + ``values``. Steps that do not count are passed over as if they
    were not there. No gradient.

    Args:
        rewards: what the action of each step earned, any unit.
        values: V of the state in which that action was taken, in the same unit.
        mask: True = counts.
        discount: γ in [0, 1], per counted step.
        gae_lambda: λ in [0, 1]: less variance (0) or less bias of the value function (1).
        next_values: V of the state after each step: 0 where that state is terminal, and the true one where a time
            limit or the end of a rollout cut the episode. ``None``: the ``values`` of the next counted step, and 0
            after the last, which is right for sequences that end by themselves, as texts do.
        ends_episode: True = an episode ends with this step, whether it counts or not, so nothing after it counts for
            what was before. ``None``: every row is one episode.

    Raises:
        ConfigError: ``discount`` or ``gae_lambda`` outside [0, 1].
        ShapeError: the shapes differ.

    Source: Schulman et al., arXiv 1506.02438, equation 16.

    >>> rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]])
    >>> gae(rewards, values, mask=torch.ones(1, 2, dtype=torch.bool), discount=1.0, gae_lambda=0.5)
    tensor([[0.1250, 0.7500]])
    """
    _check_in_unit_interval(discount=discount, gae_lambda=gae_lambda)
    given = {"next_values": next_values, "ends_episode": ends_episode}
    check_same_shape(rewards=rewards, values=values, mask=mask, **{k: t for k, t in given.items() if t is not None})
    rewards, values = rewards.detach(), values.detach()
    ends = torch.zeros_like(mask) if ends_episode is None else ends_episode
    if next_values is None:
        # The value of the next counted step, looked for no further than the end of the episode.
        following = _scan_backward(torch.where(mask, values, 0.0), (~mask & ~ends).to(values.dtype))
        following = torch.cat([following[:, 1:], torch.zeros_like(following[:, :1])], dim=1).masked_fill(ends, 0.0)
    else:
        following = next_values.detach()
    errors = rewards + discount * following - values  # δ_t, [batch, step]
    # A step that does not count is passed over, unless the episode ends with it.
    decay = torch.where(mask, discount * gae_lambda, torch.ones_like(rewards)) * (~ends).to(rewards.dtype)
    return _scan_backward(errors.masked_fill(~mask, 0.0), decay).masked_fill(~mask, 0.0)


def _scan_backward(
    terms: Float[Tensor, "batch step"], factors: Float[Tensor, "batch step"]
) -> Float[Tensor, "batch step"]:
    """x with x_t = terms_t + factors_t x_{t+1}, in log₂(steps) passes over all steps at once (Blelloch 1990)."""
    terms, factors = terms.clone(), factors.clone()
    reach = 1
    # Doubling: after k rounds each entry stands for 2^k steps, so 1,000 steps take 10 rounds instead of 1,000.
    while reach < terms.shape[1]:
        # x_t = terms_t + factors_t x_{t + reach}, where both stand for `reach` steps by now.
        terms[:, :-reach] = terms[:, :-reach] + factors[:, :-reach] * terms[:, reach:]
        factors[:, :-reach] = factors[:, :-reach] * factors[:, reach:]
        # The last `reach` entries have taken in everything that follows them.
        factors[:, -reach:] = 0.0
        reach *= 2
    return terms


def _deviations(rewards: Float[Tensor, "*shape"], *, dim: int) -> Float[Tensor, "*shape"]:
    """r − mean along ``dim``, exactly 0 for equal rewards (their computed mean may differ from them by rounding)."""
    # Shifted by the group's first member: equal rewards become exact zeros, whose mean is exactly 0.
    shifted = rewards.detach() - rewards.detach().narrow(dim, 0, 1)
    return shifted - shifted.mean(dim=dim, keepdim=True)


def _check_in_unit_interval(**coefficients: float) -> None:
    faults = [f"{name} must lie in [0, 1], got {value}." for name, value in coefficients.items() if not 0 <= value <= 1]
    if faults:
        raise ConfigError(*faults)
