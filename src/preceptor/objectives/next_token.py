"""Next-token prediction as reinforcement learning: rewards for every token of the vocabulary, and losses on them.

The true token earns 1. Reward for that alone is maximised by putting all probability on the likeliest token, whatever
the others' chances; the policy's cross-entropy then grows without bound. Taxing every action with the probability that
the policy gives it, r(a) = 1[a = y] − π(a), turns the expected reward into the quadratic score

    Σ_a π(a) (1[a = y] − ½ π(a))        (its gradient is Σ_a ∇π(a) · r(a) with r held constant)

which is *strictly proper* (Brier 1950): over the draw of y its only maximum is π = the true distribution.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from preceptor.errors import ConfigError, ShapeError
from preceptor.objectives.advantages import group_normalised, leave_one_out
from preceptor.objectives.policy_gradient import reinforce_loss
from preceptor.objectives.statistics import check_same_shape


def next_token_rewards(
    logits: Float[Tensor, "batch time vocab"],
    targets: Int[Tensor, "batch time"],
    *,
    referee_probs: Float[Tensor, "batch time vocab"] | None = None,
    partial_reward: float = 0.0,
    confidence_penalty: float = 1.0,
) -> Float[Tensor, "batch time vocab"]:
    """r(a) = 1[a = y] + c · p_referee(a) − κ (1 + c) · π(a) of every token a, dimensionless. No gradient.

    With κ = 1 the expected reward's only maximum is the mixture (p_true + c · p_referee) / (1 + c), which is the true
    distribution without a referee; κ = 0 leaves the predecessor's reward, whose maximum is a single token.

    Args:
        logits: of the policy π.
        targets: the true next token y of each position.
        referee_probs: of another model, for partial credit.
        partial_reward: c ≥ 0, what a token earns that the referee is sure of.
        confidence_penalty: κ ≥ 0.

    Raises:
        ConfigError: a partial reward without a referee.
        ShapeError: the shapes do not fit.

    Source: the quadratic score, Brier (1950); partial credit from a referee, AvataRL (2025).

    >>> logits = torch.log(torch.tensor([[[0.5, 0.3, 0.2]]]))
    >>> next_token_rewards(logits, torch.tensor([[1]]))
    tensor([[[-0.5000,  0.7000, -0.2000]]])
    """
    _check_targets(logits, targets)
    probs = logits.detach().softmax(-1)  # [batch, time, vocab]
    # One-hot of the true token.
    rewards = torch.zeros_like(probs).scatter_(-1, targets[..., None], 1.0)
    if partial_reward:
        if referee_probs is None:
            raise ConfigError(f"`partial_reward` {partial_reward} needs the referee's probabilities; got none")
        check_same_shape(logits=logits, referee_probs=referee_probs)
        rewards = rewards + partial_reward * referee_probs
    # κ (1 + c) rather than κ: the reward sums to 1 + c over the vocabulary, and the tax has to match it.
    return rewards - confidence_penalty * (1 + partial_reward) * probs


def expected_reward_loss(
    logits: Float[Tensor, "batch time vocab"], rewards: Float[Tensor, "batch time vocab"]
) -> Float[Tensor, ""]:
    """−Σ_a π(a) r(a), the mean over positions: the policy gradient with its expectation taken in closed form.

    Its gradient in the logit of a is −π(a) (r(a) − Σ_b π(b) r(b)), what REINFORCE estimates from samples. No gradient
    into ``rewards``.

    Raises:
        ShapeError: the shapes differ.

    >>> logits = torch.zeros(1, 1, 2, requires_grad=True)
    >>> loss = expected_reward_loss(logits, torch.tensor([[[1.0, 0.0]]]))
    >>> loss.backward()
    >>> loss.item(), logits.grad
    (-0.5, tensor([[[-0.2500,  0.2500]]]))
    """
    check_same_shape(logits=logits, rewards=rewards)
    # Σ over the vocabulary, so no sampling noise; only positions are averaged.
    return -(logits.softmax(-1) * rewards.detach()).sum(-1).mean()


def sampled_reward_loss(
    logits: Float[Tensor, "batch time vocab"],
    rewards: Float[Tensor, "batch time vocab"],
    *,
    samples: Int[Tensor, "batch time choices"],
    advantage: str = "leave_one_out",
) -> Float[Tensor, ""]:
    """−A(a) ln π(a) over a group of sampled tokens a at each position, the mean over groups and positions.

    With ``leave_one_out`` its expectation over the samples has the gradient of :func:`expected_reward_loss`. Dividing
    by the group's standard deviation (``group_normalised``) weighs positions by what was drawn, so that the optimum is
    no longer the true distribution. No gradient into ``rewards``.

    Args:
        logits: of the policy that drew the samples.
        rewards: of every token of the vocabulary.
        samples: tokens drawn from the policy at each position, with replacement.
        advantage: ``leave_one_out`` (RLOO) or ``group_normalised`` (GRPO), within each position's group.

    Raises:
        ConfigError: another ``advantage``.
        ShapeError: the shapes differ.

    >>> logits = torch.zeros(1, 1, 2, requires_grad=True)
    >>> rewards, samples = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0, 1]]])
    >>> sampled_reward_loss(logits, rewards, samples=samples).backward()
    >>> logits.grad  # advantages +1 and −1; −½ (1 · (½, −½) − 1 · (−½, ½))
    tensor([[[-0.5000,  0.5000]]])
    """
    check_same_shape(logits=logits, rewards=rewards)
    estimators = {"leave_one_out": leave_one_out, "group_normalised": group_normalised}
    if advantage not in estimators:
        raise ConfigError(f"`advantage` must be one of {', '.join(estimators)}, got {advantage!r}")
    # Each position is a group of its own: [batch, time, choices] -> [batch · time, choices], rows of "sequences".
    advantages = estimators[advantage](rewards.gather(-1, samples), dim=-1).flatten(0, 1)
    log_probs = logits.log_softmax(-1).gather(-1, samples).flatten(0, 1)
    # Every sample counts, and all groups are equally large, so the token mean is the mean of the groups' means.
    mask = torch.ones_like(samples, dtype=torch.bool).flatten(0, 1)
    return reinforce_loss(log_probs, advantages, mask=mask, aggregation="token_mean")


def avatarl_loss(
    logits: Float[Tensor, "batch time vocab"],
    targets: Int[Tensor, "batch time"],
    *,
    referee_probs: Float[Tensor, "batch time vocab"],
    label_smoothing: float = 0.1,
    reality_exponent: float = 0.7,
    max_reward: float = 1.5,
) -> Float[Tensor, ""]:
    """−Σ_a r(a) ln π(a), the mean over positions, with AvataRL's rewards over the full vocabulary.

    Reality puts 1 − ε on the true token and ε / (V − 1) on each other; r ∝ reality^w · referee^(1−w) where that is
    above its mean over the vocabulary, else 0, scaled so that the largest is ``max_reward``. The rewards are constants
    and are *not* weighted by π: this is cross-entropy with soft labels, a distillation, and no policy gradient.

    Args:
        logits: of the policy.
        targets: the true next token of each position.
        referee_probs: of the referee (the text's critic).
        label_smoothing: ε in [0, 1).
        reality_exponent: w in [0, 1].
        max_reward: > 0.

    Raises:
        ShapeError: the shapes do not fit.

    Source: github.com/tokenbender/avataRL, ``compute_avatarl_loss``, with the softmax over the full vocabulary as its
    final version has it, and the mean taken over normalised rewards.

    >>> logits, referee = torch.zeros(1, 1, 3), torch.full((1, 1, 3), 1 / 3)
    >>> avatarl_loss(logits, torch.tensor([[0]]), referee_probs=referee)  # only the true token is above the mean
    tensor(1.6479)
    """
    _check_targets(logits, targets)
    check_same_shape(logits=logits, referee_probs=referee_probs)
    # ε is spread over the V − 1 false tokens.
    others = label_smoothing / (logits.shape[-1] - 1)
    reality = torch.full_like(referee_probs, others).scatter_(-1, targets[..., None], 1 - label_smoothing)
    # A geometric mean of the two, unnormalised, which is fine since the scale is set below.
    mixed = reality.pow(reality_exponent) * referee_probs.pow(1 - reality_exponent)
    # Only tokens above the vocabulary's mean are rewarded.
    kept = torch.where(mixed > mixed.mean(-1, keepdim=True), mixed, 0.0)
    rewards = max_reward * kept / kept.amax(-1, keepdim=True)
    return -(rewards.detach() * logits.log_softmax(-1)).sum(-1).mean()


def _check_targets(logits: Tensor, targets: Tensor) -> None:
    if targets.shape != logits.shape[:-1]:
        raise ShapeError(f"targets have shape {tuple(targets.shape)}; these logits need {tuple(logits.shape[:-1])}")
