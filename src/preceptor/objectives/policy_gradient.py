"""Policy-gradient losses on the log-probabilities of sampled actions; every loss is to be minimised.

All of them have REINFORCE's gradient while the policy is still the one that sampled (ratio 1); they differ in what
they do with a token whose probability has moved since. None of them is known to be the best: published rankings
contradict each other.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from preceptor.errors import ConfigError, ShapeError
from preceptor.objectives.aggregation import aggregate
from preceptor.objectives.statistics import check_same_shape, masked_mean


def reinforce_loss(
    log_probs: Float[Tensor, "batch time"],
    advantages: Float[Tensor, "batch time"],
    *,
    mask: Bool[Tensor, "batch time"],
    aggregation: str = "sequence_sum",
    divisor: float | None = None,
) -> Float[Tensor, ""]:
    """−A·ln π(a), aggregated: its gradient is that of REINFORCE, −A·∇ln π(a).

    No gradient into ``advantages``. What is masked out may be NaN or infinite. An empty mask gives exactly 0 with a
    graph (and zero gradients), so a step on which no trajectory passed a filter needs no special case.

    Args:
        log_probs: of the sampled actions (tokens, or selections with ``time`` = step), nats.
        advantages: one per action, any unit.
        mask: True = this action was the policy's own and counts.
        aggregation: see ``aggregate``; ``"sequence_sum"`` is the gradient as derived.
        divisor: see ``aggregate``.

    Raises:
        ShapeError: the shapes differ.
        ConfigError: as ``aggregate``.

    Source: Williams (1992), doi:10.1007/BF00992696.

    >>> log_probs = torch.tensor([[-1.0, -2.0], [-3.0, -9.0]], requires_grad=True)
    >>> mask = torch.tensor([[True, True], [True, False]])
    >>> loss = reinforce_loss(log_probs, torch.tensor([[1.0, 1.0], [-1.0, 5.0]]), mask=mask)
    >>> loss.backward()
    >>> loss.item(), log_probs.grad
    (0.0, tensor([[-0.5000, -0.5000],
            [ 0.5000,  0.0000]]))
    """
    check_same_shape(log_probs=log_probs, advantages=advantages, mask=mask)
    # Masked before the product: the gradient of 0·(−∞) is NaN.
    log_probs = log_probs.masked_fill(~mask, 0.0)
    return aggregate(-advantages.detach() * log_probs, mask, aggregation=aggregation, divisor=divisor)


def ppo_clip_loss(
    log_probs: Float[Tensor, "batch time"],
    old_log_probs: Float[Tensor, "batch time"],
    advantages: Float[Tensor, "batch time"],
    *,
    mask: Bool[Tensor, "batch time"],
    clip_epsilon_low: float = 0.2,
    clip_epsilon_high: float = 0.2,
    dual_clip: float | None = None,
    aggregation: str = "token_mean",
    divisor: float | None = None,
) -> Float[Tensor, ""]:
    """−min(ρ A, clip(ρ, 1 − ε_low, 1 + ε_high) A), aggregated, with the ratio ρ = π(a) / π_old(a).

    An action whose probability has already moved past the clip in the direction that its advantage asks for gets no
    gradient. A negative advantage leaves ρ unbounded above; ``dual_clip`` c bounds the objective there by c A. The
    log-ratio is limited to ±20, far beyond any clip, so that exp cannot overflow. No gradient into ``old_log_probs``
    and ``advantages``; what is masked out may be anything.

    Args:
        log_probs: of the sampled actions under the present policy, nats.
        old_log_probs: the same under the policy that sampled, nats.
        advantages: one per action, any unit.
        mask: True = this action was the policy's own and counts.
        clip_epsilon_low: in (0, 1), how far ρ may fall.
        clip_epsilon_high: > 0, how far ρ may rise; 0.28 with 0.2 below is DAPO's "clip-higher".
        dual_clip: > 1, usually 3; ``None`` for none.
        aggregation: see ``aggregate``.
        divisor: see ``aggregate``.

    Raises:
        ShapeError: the shapes differ.
        ConfigError: an argument out of its range.

    Source: PPO, arXiv 1707.06347, equation 7; dual clip, arXiv 1912.09729, equation 5; DAPO, arXiv 2503.14476.

    >>> old, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    >>> log_probs = torch.tensor([[1.5, 1.1]]).log().requires_grad_()
    >>> loss = ppo_clip_loss(log_probs, old, torch.ones(1, 2), mask=mask)  # ratios 1.5 and 1.1; 1.5 is clipped to 1.2
    >>> loss.backward()
    >>> loss.detach(), log_probs.grad
    (tensor(-1.1500), tensor([[ 0.0000, -0.5500]]))
    """
    check_same_shape(log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages, mask=mask)
    _check_clip(clip_epsilon_low, clip_epsilon_high)
    if dual_clip is not None and not dual_clip > 1:
        raise ConfigError(f"dual_clip must be greater than 1, got {dual_clip}.")
    ratios = _log_ratios(log_probs, old_log_probs, mask).exp()  # ρ, [batch, time]
    objective = _clipped_objective(ratios, advantages.detach(), clip_epsilon_low, clip_epsilon_high)
    if dual_clip is not None:
        bounded = torch.maximum(objective, dual_clip * advantages.detach())
        # The bound is on the side of negative advantages alone; positive ones are bounded by the clip.
        objective = torch.where(advantages < 0, bounded, objective)
    return aggregate(-objective, mask, aggregation=aggregation, divisor=divisor)


def clip_fraction(
    log_probs: Float[Tensor, "batch time"],
    old_log_probs: Float[Tensor, "batch time"],
    advantages: Float[Tensor, "batch time"],
    *,
    mask: Bool[Tensor, "batch time"],
    clip_epsilon_low: float = 0.2,
    clip_epsilon_high: float = 0.2,
) -> Float[Tensor, ""]:
    """The share, in [0, 1], of counted actions whose gradient the clip of ``ppo_clip_loss`` cuts off; no gradient.

    Raises:
        ShapeError: the shapes differ.
        ConfigError: an argument out of its range.

    >>> old, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    >>> clip_fraction(torch.tensor([[1.5, 1.1]]).log(), old, torch.ones(1, 2), mask=mask)
    tensor(0.5000)
    """
    check_same_shape(log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages, mask=mask)
    _check_clip(clip_epsilon_low, clip_epsilon_high)
    ratios = _log_ratios(log_probs, old_log_probs, mask).exp().detach()
    # Past the clip *in the direction that the advantage asks for*; a ratio beyond it the other way still has a
    # gradient.
    too_high = (ratios > 1 + clip_epsilon_high) & (advantages > 0)
    too_low = (ratios < 1 - clip_epsilon_low) & (advantages < 0)
    return masked_mean((too_high | too_low).to(ratios.dtype), mask)


def cispo_loss(
    log_probs: Float[Tensor, "batch time"],
    old_log_probs: Float[Tensor, "batch time"],
    advantages: Float[Tensor, "batch time"],
    *,
    mask: Bool[Tensor, "batch time"],
    max_ratio: float = 5.0,
    aggregation: str = "token_mean",
    divisor: float | None = None,
) -> Float[Tensor, ""]:
    """−sg(min(ρ, ``max_ratio``)) A ln π(a), aggregated: REINFORCE with a truncated importance weight.

    sg is "no gradient", so every token keeps its gradient, also one that PPO would clip away. No gradient into
    ``old_log_probs`` and ``advantages``; what is masked out may be anything.

    Args:
        log_probs: of the sampled actions under the present policy, nats.
        old_log_probs: the same under the policy that sampled, nats.
        advantages: one per action, any unit.
        mask: True = this action was the policy's own and counts.
        max_ratio: > 0, the largest weight itself (not its distance from 1), as in ScaleRL and TRL.
        aggregation: see ``aggregate``.
        divisor: see ``aggregate``.

    Raises:
        ShapeError: the shapes differ.
        ConfigError: ``max_ratio`` is not positive.

    Source: MiniMax-M1, arXiv 2506.13585, equation 4, without its lower clip; ScaleRL, arXiv 2510.13786.

    >>> log_probs = torch.tensor([[0.5, 0.25]]).log()
    >>> mask = torch.ones(1, 2, dtype=torch.bool)
    >>> cispo_loss(log_probs, torch.tensor([[0.5, 0.025]]).log(), torch.ones(1, 2), mask=mask)  # ½ (ln 2 + 5 ln 4)
    tensor(3.8123)
    """
    check_same_shape(log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages, mask=mask)
    if not max_ratio > 0:
        raise ConfigError(f"max_ratio must be positive, got {max_ratio}.")
    # Bounded above only: a small ratio already has a small weight.
    weights = _log_ratios(log_probs, old_log_probs, mask).exp().clamp(max=max_ratio)
    # No gradient goes into the weights: reinforce_loss lets none into its advantages.
    return reinforce_loss(log_probs, weights * advantages, mask=mask, aggregation=aggregation, divisor=divisor)


def gspo_loss(
    log_probs: Float[Tensor, "batch time"],
    old_log_probs: Float[Tensor, "batch time"],
    advantages: Float[Tensor, " batch"],
    *,
    mask: Bool[Tensor, "batch time"],
    clip_epsilon_low: float = 3e-4,
    clip_epsilon_high: float = 4e-4,
) -> Float[Tensor, ""]:
    """PPO's clipped loss with one ratio a sequence, s = (π(y) / π_old(y))^(1/|y|); the mean over sequences.

    s is the geometric mean of the ratios of the counted tokens, hence the small clip. Sequences without a counted token
    are left out of the mean. No gradient into ``old_log_probs`` and ``advantages``; what is masked out may be anything.

    Args:
        log_probs: of the sampled tokens under the present policy, nats.
        old_log_probs: the same under the policy that sampled, nats.
        advantages: one per sequence, any unit.
        mask: True = this token was the policy's own and counts.
        clip_epsilon_low: in (0, 1), how far s may fall.
        clip_epsilon_high: > 0, how far s may rise.

    Raises:
        ShapeError: the shapes do not fit.
        ConfigError: an argument out of its range.

    Source: GSPO, arXiv 2507.18071, equations 5 to 7.

    >>> log_probs, old = torch.tensor([[0.0, 0.0]]), torch.tensor([[-1e-4, -3e-4]])
    >>> loss = gspo_loss(log_probs, old, torch.ones(1), mask=torch.ones(1, 2, dtype=torch.bool))
    >>> f"{loss.item():.5f}"  # s = exp(2e-4), inside the clip
    '-1.00020'
    """
    check_same_shape(log_probs=log_probs, old_log_probs=old_log_probs, mask=mask)
    if advantages.shape != log_probs.shape[:1]:
        raise ShapeError(f"advantages has shape {tuple(advantages.shape)}; {len(log_probs)} sequences need one each")
    _check_clip(clip_epsilon_low, clip_epsilon_high)
    num_tokens = mask.sum(dim=-1)
    # [batch]: mean over counted tokens of ln ρ, the logarithm of a geometric mean.
    mean_log_ratios = _log_ratios(log_probs, old_log_probs, mask).sum(dim=-1) / num_tokens.clamp(min=1)
    objective = _clipped_objective(mean_log_ratios.exp(), advantages.detach(), clip_epsilon_low, clip_epsilon_high)
    return masked_mean(-objective, num_tokens > 0)


def _log_ratios(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor) -> Tensor:
    """ln π − ln π_old within ±20, and 0 where nothing counts: masked first, or their infinities reach the gradient."""
    # ±20 is a factor of 5e8, far beyond every clip; exp overflows in float32 from 88 on.
    return (log_probs.masked_fill(~mask, 0.0) - old_log_probs.detach().masked_fill(~mask, 0.0)).clamp(-20.0, 20.0)


def _clipped_objective(ratios: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float) -> Tensor:
    # The minimum is pessimistic: it takes the clipped side only where that makes the objective smaller.
    return torch.minimum(ratios * advantages, ratios.clamp(1 - epsilon_low, 1 + epsilon_high) * advantages)


def _check_clip(clip_epsilon_low: float, clip_epsilon_high: float) -> None:
    faults = []
    if not 0 < clip_epsilon_low < 1:
        faults.append(f"clip_epsilon_low must lie in (0, 1), got {clip_epsilon_low}.")
    if not clip_epsilon_high > 0:
        faults.append(f"clip_epsilon_high must be positive, got {clip_epsilon_high}.")
    if faults:
        raise ConfigError(*faults)
